"""The kernel kills or fails a save at each of its system calls: strace stages what Python itself cannot."""

import errno
import shutil
import signal
from collections import Counter

import pytest
from oracles.small_checkpoint import quietly, state
from oracles.strace import available, noted, traced
from torch.testing import assert_close

from moestro.train.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not available(), reason="needs strace and the right to attach it"),
]
PERSISTING = ("mkdir", "openat", "write", "fsync", "close", "rename", "unlink", "unlinkat", "rmdir")
LOUD = ("mkdir", "write", "fsync", "rename")  # a save that meets an error here must say so
QUIET = ("openat", "unlinkat")  # some look for what is not there, or remove what the next start removes


def fresh(folder):
    """Two checkpoints, so that a third also removes one."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    return checkpoints


@pytest.fixture
def calls(tmp_path):
    """How often a save makes each call."""
    checkpoints = fresh(tmp_path / "counted")
    assert traced(lambda: checkpoints.save(state(3)), PERSISTING, tmp_path / "log") == 0
    return Counter(noted(tmp_path / "log"))


def check(checkpoints, outcome):
    """What is there is whole, and the next start sweeps the rest away."""
    latest = checkpoints.latest(quietly)
    assert latest.step in (2, 3), outcome
    expected = state(latest.step).tensors["model.experts.up"]
    assert_close(latest.tensors["model.experts.up"], expected)
    assert not list(checkpoints.folder.glob("*.tmp")), outcome
    checkpoints.save(state(4))
    assert checkpoints.latest(quietly).step == 4
    return latest.step


def test_a_kill_at_every_system_call_of_a_save_leaves_it_whole_or_absent(tmp_path, calls):
    assert calls["fsync"] == 7  # five files and two folders
    assert calls["rename"] == 1
    assert calls["write"] == 5
    left = Counter()
    for call, times in calls.items():
        for when in range(1, times + 1):
            checkpoints = fresh(tmp_path / "c")
            killed = f"{call}:signal=KILL:when={when}"
            outcome = traced(lambda c=checkpoints: c.save(state(3)), PERSISTING, tmp_path / "log", killed)
            assert outcome == -signal.SIGKILL, killed
            left[check(checkpoints, killed)] += 1
    assert left[2] > 15
    assert left[3] > 3


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", LOUD + QUIET)
def test_a_failing_system_call_leaves_the_last_good_checkpoint(tmp_path, calls, call, name):
    for when in range(1, calls[call] + 1):
        checkpoints = fresh(tmp_path / "c")
        failed = f"{call}:error={name}:when={when}"
        outcome = traced(lambda c=checkpoints: c.save(state(3)), PERSISTING, tmp_path / "log", failed)
        assert outcome == getattr(errno, name) or (outcome == 0 and call in QUIET), failed
        assert call in QUIET or not list(checkpoints.folder.glob("*.tmp")), failed
        check(checkpoints, failed)
