"""The Triton kernels: refused where they cannot run, and tested in the interpreter, in processes of their own.

Triton decides at its first import whether it interprets, and other tests import it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moestro.kernels.triton as kernels
from moestro.experts import all_kernels, make_experts
from moestro.kernels import all_backends, grouped_matmul
from moestro.kernels.triton.settings import SETTINGS, most_tiles, setting_for

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(marks: str) -> None:
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", marks,
        str(HERE / "interpreted_triton.py"),
    ]  # fmt: skip
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@needs_triton
@pytest.mark.timeout(1800)
def test_the_kernels_pass_in_the_interpreter() -> None:
    interpret("not nightly")


@needs_triton
@pytest.mark.nightly
@pytest.mark.timeout(5400)
def test_the_kernels_pass_at_length_in_the_interpreter() -> None:
    interpret("nightly")


@needs_triton
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("capability", "shared"),
    [(80, 163 * 1024), (89, 99 * 1024), (90, 227 * 1024), (100, 227 * 1024), (120, 99 * 1024)],
    ids=["ampere", "ada", "hopper", "blackwell", "blackwell consumer"],
)
def test_the_kernels_compile_and_fit(capability: int, shared: int, dtype: str) -> None:
    command = [sys.executable, str(HERE / "compiled_triton.py"), str(capability), str(shared), dtype]
    env = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}  # unset, Triton warns
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


def test_a_cpu_is_refused() -> None:
    bank = make_experts(2, 4, 4, kernel="triton")
    with pytest.raises(ValueError, match="runs on a GPU, not on a CPU; use kernel='auto'"):
        bank(torch.randn(2, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="runs on a GPU, not on a CPU; use kernel='auto'"):
        grouped_matmul(torch.randn(2, 4), torch.randn(1, 4, 3), torch.tensor([0, 2]), "triton")
    assert "triton" in all_kernels()
    assert "triton" in all_kernels("cuda")
    assert "triton" in all_backends()
    assert "triton" not in all_kernels("cpu")
    assert "fused" not in all_kernels("cuda")


def test_a_missing_triton_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed: pip install triton"):
        make_experts(2, 4, 4, kernel="triton")(torch.randn(2, 4), torch.tensor([0, 1, 2]))


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, moestro.experts, moestro.kernels.triton.settings; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bound_on_tiles_holds() -> None:
    for _ in range(300):
        load = torch.randint(0, 50, (int(torch.randint(1, 20, ())),)) * (torch.rand(1) < 0.7)
        rows = 16
        needed = int(((load + rows - 1) // rows).sum())
        assert needed <= most_tiles(int(load.sum()), len(load), rows) <= needed + len(load)


def test_settings_fit_and_follow_the_load() -> None:
    assert [setting_for(pairs, 8) for pairs in (1, 255, 256, 1023, 1024, 10**6)] == [
        "few", "few", "some", "some", "many", "many",
    ]  # fmt: skip
    for setting in SETTINGS.values():
        assert setting.shared_bytes(setting.stages_within(99 * 1024)) <= 99 * 1024
        assert setting.stages_within(227 * 1024) == setting.stages
