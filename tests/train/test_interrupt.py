"""The first signal asks, the second insists."""

import os
import signal
import threading

import pytest

from moestro.train.interrupt import Interrupt, StopRequested


def raise_signal(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_check(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        raise_signal(number)
        assert interrupt.signal_number == number
        with pytest.raises(StopRequested):
            interrupt.check()
    assert signal.getsignal(number) is before


def test_the_second_signal_acts_at_once():
    with Interrupt():
        raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_signal(signal.SIGINT)
    with Interrupt():
        raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            raise_signal(signal.SIGTERM)


def test_another_thread_leaves_signals_alone():
    before, inside = signal.getsignal(signal.SIGINT), []

    def enter():
        with Interrupt():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]
