"""Checkpoints are whole or absent, damaged ones are named, and the disk may fail at any call."""

import json
import os
import random
import signal

import pytest
import torch
from oracles.faulty_disk import BROKEN, FULL, QUOTA, Counter, die, fail, in_a_child, intercepted
from oracles.small_checkpoint import quietly, state
from torch.testing import assert_close

from moestro.train import checkpoint_files
from moestro.train.checkpoint_files import DamagedCheckpoint, read_checkpoint, verify_checkpoint
from moestro.train.checkpoints import Checkpoints


def steps(folder):
    return [int(path.name[5:]) for path in folder.paths()]


def test_what_was_written_is_read_back_bit_for_bit(tmp_path):
    written = state(7, bits_per_byte=1.9)
    Checkpoints(tmp_path / "c").save(written)
    read = Checkpoints(tmp_path / "c").latest(quietly)
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert_close(read.tensors[name], tensor, rtol=0, atol=0)
    for name in ("step", "seconds", "numbers", "fingerprint", "spent", "bits_per_byte"):
        assert getattr(read, name) == getattr(written, name)


def test_no_checkpoint_is_none_and_nothing_is_pickled(tmp_path):
    folder = Checkpoints(tmp_path / "c")
    assert folder.latest(quietly) is None
    path = folder.save(state(1))
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "model.safetensors",
        "optimiser.safetensors",
        "random.safetensors",
        "state.json",
    ]


def test_retention_keeps_the_last_the_best_and_milestones(tmp_path):
    folder = Checkpoints(tmp_path / "c", keep_last=2, keep_best=True, keep_every=40)
    for step, score in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.6), (60, 2.7), (70, None)):
        folder.save(state(step, score))
    assert steps(folder) == [20, 40, 60, 70]
    assert list(folder.kept().values()) == [["best"], ["milestone"], ["last"], ["last"]]
    folder.finish()
    assert steps(folder) == [20, 40]
    plain = Checkpoints(tmp_path / "d", keep_last=1)
    for step in (1, 2, 3):
        plain.save(state(step))
        assert steps(plain) == [step]
    plain.finish()
    assert not plain.folder.exists()


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path):
    folder, said = Checkpoints(tmp_path / "c"), []
    folder.save(state(1))
    newest = folder.save(state(2))
    (newest / "model.safetensors").unlink()
    assert folder.latest(said.append).step == 1
    assert said == [f"{newest} is damaged: model.safetensors is missing; falling back to the checkpoint before it"]
    folder.save(state(2))  # the damaged one is replaced
    assert folder.latest(quietly).step == 2
    for path in folder.paths():
        (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* is whole; start again with --overwrite"):
        folder.latest(said.append)


def test_a_tensor_that_changed_is_named(tmp_path):
    path = Checkpoints(tmp_path / "c").save(state(3))
    file = path / "optimiser.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=r"the tensor optimiser\.experts\.up\.exp_avg is not what was"):
        read_checkpoint(path)


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    folder = Checkpoints(tmp_path / "c")
    folder.save(state(1))
    monkeypatch.setattr(checkpoint_files, "FORMAT", 5)
    folder.save(state(2))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"newer moestro \(format 5\); upgrade") as caught:
        folder.latest(quietly)
    assert not isinstance(caught.value, DamagedCheckpoint)


def corrupt(path, chance):
    """Damage one file of a checkpoint at random; what was done."""
    files = sorted(path.iterdir())
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    kind = chance.choice(["flip", "flip", "flip", "cut", "remove", "append", "swap", "zero", "strange"])
    if kind == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.randrange(len(data)) :]
    elif kind == "append":
        data += bytes([chance.randrange(256)])
    elif kind == "swap":
        other = chance.choice([one for one in files if one != file])
        data = bytearray(other.read_bytes())
    elif kind == "zero":
        begin = chance.randrange(len(data))
        zeros = bytes(len(data[begin : begin + 16]))
        if data[begin : begin + 16] == zeros:
            return corrupt(path, chance)
        data[begin : begin + 16] = zeros
    if kind == "remove":
        file.unlink()
    elif kind == "strange":
        (path / f"extra{chance.randrange(9)}.safetensors").write_bytes(data)
    else:
        file.write_bytes(data)
    return f"{kind} {file.name}"


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.nightly)])
def test_random_corruptions_are_all_detected_and_named(tmp_path, count):
    chance, folder = random.Random(0), Checkpoints(tmp_path / "c")
    folder.save(state(1))
    newest = folder.save(state(2))
    originals = {file: file.read_bytes() for file in newest.iterdir()}
    for _ in range(count):
        done, said = corrupt(newest, chance), []
        with pytest.raises(DamagedCheckpoint) as caught:
            verify_checkpoint(newest)
        named = done.split()[1] in str(caught.value) or done.startswith(("strange", "swap"))
        assert named, (done, str(caught.value))
        assert folder.latest(said.append).step == 1, done
        assert len(said) == 1
        for file in newest.iterdir():
            file.unlink()
        for file, data in originals.items():
            file.write_bytes(data)
    assert folder.latest(quietly).step == 2


def test_a_kill_at_every_persisting_call_of_a_save_leaves_it_whole_or_absent(tmp_path):
    torch.set_num_threads(1)
    folder = Checkpoints(tmp_path / "c", keep_last=1)
    folder.save(state(1))
    seen, at, outcome = [], 0, signal.SIGKILL
    while outcome == signal.SIGKILL:
        at += 1
        outcome = in_a_child(lambda at=at: save_and_die(folder, at))
        latest = folder.latest(quietly)  # sweeps, too
        seen.append(latest.step)
        assert_close(latest.tensors["model.experts.up"], torch.full((3, 4, 5), float(latest.step)))
        assert not list(folder.folder.glob("*.tmp"))
        if latest.step == 2:
            Checkpoints(tmp_path / "c", keep_last=9).save(state(1))
            for path in folder.paths()[1:]:
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
    assert at > 15
    assert set(seen) == {1, 2}
    assert seen == sorted(seen)


def save_and_die(folder, at):
    with intercepted(Counter(at, die)):
        folder.save(state(2))


@pytest.mark.parametrize("number", [FULL, BROKEN, QUOTA])
def test_a_failing_disk_leaves_the_last_good_checkpoint_and_no_litter(tmp_path, number):
    folder = Checkpoints(tmp_path / "c")
    folder.save(state(1))
    with intercepted(Counter(), ("mkdir", "write", "fsync", "rename")) as counter:
        folder.save(state(2))
    failures = len(counter.names)
    assert failures > 10
    for at in range(1, failures + 1):
        other = Checkpoints(tmp_path / f"fault{at}")
        other.save(state(1))
        with (
            intercepted(Counter(at, fail(number)), ("mkdir", "write", "fsync", "rename")),
            pytest.raises(OSError, match=os.strerror(number)),
        ):
            other.save(state(2))
        assert not list(other.folder.glob("*.tmp")), at
        assert other.latest(quietly).step in (1, 2)  # 2 once only the parent's sync was left
        assert other.save(state(3)).name == "step-00000003"


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    folder = Checkpoints(tmp_path / "c")
    folder.save(state(1))
    usage = checkpoint_files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 1 MiB and .* has 0 MiB free; make room there"):
        folder.save(state(2))
    assert steps(folder) == [1]


def test_the_manifest_knows_every_tensor(tmp_path):
    path = Checkpoints(tmp_path / "c").save(state(1))
    files = json.loads((path / "manifest.json").read_text())["manifest"]["files"]
    named = {name for file in files.values() for name in file.get("tensors", {})}
    assert named == state(1).tensors.keys()
    assert verify_checkpoint(path).num_bytes == sum(file["bytes"] for file in files.values())
