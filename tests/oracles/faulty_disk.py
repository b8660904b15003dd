"""A disk that dies or fails at a chosen call: stands between the program and the system calls that persist."""

import errno
import os
import signal
from contextlib import contextmanager

import pytest

CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")


class Counter:
    """Counts persisting calls, and does `act` instead of, before or after the n-th."""

    def __init__(self, at=None, act=None):
        self.at, self.act, self.names = at, act, []

    def wrap(self, name, real):
        def call(*arguments, **keywords):
            self.names.append(name)
            if len(self.names) == self.at:
                self.act(name)
            return real(*arguments, **keywords)

        return call


@contextmanager
def intercepted(counter, calls=CALLS):
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, counter.wrap(name, getattr(os, name)))
        yield counter


def die(name):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    def act(name):
        raise OSError(number, os.strerror(number))

    return act


FULL, BROKEN, QUOTA = errno.ENOSPC, errno.EIO, errno.EDQUOT


def in_a_child(work):
    """Run `work()` in a forked process; the signal that killed it, or 0 if it ended well."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the child failed in another way"
    return 0
