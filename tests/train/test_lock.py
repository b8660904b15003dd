"""One writer at a time, and the dead hold nothing."""

import os
import signal

import pytest

from moestro.train.lock import LOCK, writing


def in_another_process(folder):
    """A process that takes the lock, tells us, and waits."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with writing(folder):
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return pid


def test_the_lock_is_given_back(tmp_path):
    for _ in range(2):
        with writing(tmp_path) as dead:
            assert dead is None
            assert (tmp_path / LOCK).read_text() == str(os.getpid())
        assert not (tmp_path / LOCK).exists()


def test_a_second_writer_is_refused_by_number_until_the_first_dies(tmp_path):
    pid = in_another_process(tmp_path)
    try:
        with (
            pytest.raises(ValueError, match=f"is being written by process {pid}; wait for it, or"),
            writing(tmp_path),
        ):
            raise AssertionError("two writers")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists()
    with writing(tmp_path) as dead:
        assert dead == pid
