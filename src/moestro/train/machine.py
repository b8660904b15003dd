"""Which device, precision and threads a run uses, and why; and how it is made repeatable."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """Where a run computes.

    Attributes:
        device: of the model.
        precision: float32, or bfloat16 through autocast (weights and optimiser stay float32), or float64 of all.
        why: the reason of the precision, in words.
        threads: CPU threads.
    """

    device: torch.device
    precision: torch.dtype
    why: str
    threads: int

    @property
    def precision_name(self) -> str:
        return str(self.precision).removeprefix("torch.")

    @property
    def weights(self) -> torch.dtype:
        """The dtype of weights and of the optimiser's state."""
        return torch.float64 if self.precision == torch.float64 else torch.float32

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where that is the precision; nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def describe(self) -> str:
        """One line for the top of a run."""
        cores = os.cpu_count()
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{cores} cores"
        return f"device {self.device} ({name}) · {self.precision_name} ({self.why}) · {self.threads} threads"


def choose_machine(
    device: str = "auto", precision: str = "auto", threads: int = 0, local_rank: int = 0, sharing: int = 1
) -> Machine:
    """Turn the recipe's `auto` and 0 into what this computer has.

    Args:
        device: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N.
        precision: auto (bfloat16 where the processor multiplies it in hardware), float32, bfloat16 or float64.
        threads: CPU threads; 0 = OMP_NUM_THREADS if set, else every core this process may use.
        local_rank: which of the processes of a run on this computer asks; each has a CUDA device of its own.
        sharing: how many they are; they share the cores.

    Raises:
        ValueError: an unknown device, or one that this computer does not have.
    """
    chosen = _device(device, local_rank)
    if sharing > 1 and device.startswith("cuda:"):
        raise ValueError(f"train.device={device!r} names one device for {sharing} processes; pass cuda or cpu")
    dtype, why = _precision(precision, chosen)
    return Machine(chosen, dtype, why, threads or _threads(sharing))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device={name!r}; pass auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device={name!r}; pass auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    index = local_rank if device.index is None else device.index
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= found:
        whose = f" for process {local_rank + 1} here" if local_rank else ""
        raise ValueError(
            f"train.device={name!r}{whose} but this computer has {found} CUDA devices; pass auto or cpu"
        )
    return torch.device("cuda", index)


def _precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name != "auto":
        return getattr(torch, name), "as asked"
    fast, feature = _fast_bfloat16(device)
    return (torch.bfloat16, feature) if fast else (torch.float32, f"no {feature}")


def _fast_bfloat16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False), "bfloat16 on this GPU"
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
    feature = next((title for key, title in names.items() if found.get(key)), None)
    return feature is not None, feature or "bfloat16 arithmetic in this processor"


def _threads(sharing: int) -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // sharing)


@contextmanager
def repeatable(machine: Machine) -> Iterator[None]:
    """Fix the threads and, on the CPU, ask for deterministic kernels; afterwards all is as the caller had it.

    Some scattered additions otherwise run in an order that depends on the threads.
    """
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
        try:
            torch.set_num_threads(machine.threads)
            if machine.device.type == "cpu":
                torch.use_deterministic_algorithms(True, warn_only=True)
                memory.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            memory.fill_uninitialized_memory = fill


def versions() -> dict[str, str]:
    """The versions on which exact numbers depend."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("moestro", "torch", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
