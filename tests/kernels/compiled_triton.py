"""The Triton kernels compiled to machine code, without a device. `test_triton.py` runs this in its own process.

    python compiled_triton.py CAPABILITY SHARED_BYTES DTYPE

Each kernel is compiled with the arguments of a real call and must fit the shared memory of the architecture; a few
values may spill out of registers, a tile may not.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moestro.experts import make_experts
from moestro.kernels.triton import launch
from moestro.kernels.triton.operator import triton_bank
from moestro.kernels.triton.settings import SETTINGS
from moestro.routing import SparseRouting

MOST_SPILLED_BYTES = 256  # of a thread; a tile of float32 that does not fit spills thousands
RESOURCES = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice(DriverBase):
    """A driver that only knows for which architecture to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def spilled(cubin: bytes) -> int:
    """Bytes of stack per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [RESOURCES, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(text.split("STACK:")[1].split()[0])


def main() -> None:
    capability, shared, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    driver.set_active(NoDevice(GPUTarget("cuda", capability, 32)))
    found: list[tuple[str, Any]] = []

    def compile_only(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: found.append((self.__name__, self.warmup(*args, grid=grid, **kwargs)))

    JITFunction.__getitem__ = compile_only
    launch.SHARED_BYTES = shared
    for activation, bias in (("swiglu", False), ("gelu", True)):
        for setting in SETTINGS:
            found.clear()
            experts = make_experts(4, 256, 512, activation, bias).to(dtype)
            x, weight = torch.randn(64, 256).to(dtype).requires_grad_(), torch.rand(64, 2).requires_grad_()
            routing = SparseRouting.from_choice(torch.rand(64, 4).topk(2).indices, weight, 4)
            gate, gate_bias = getattr(experts, "gate", None), getattr(experts, "gate_bias", None)
            y = triton_bank(
                x, routing.offsets, routing.token, routing.weight, *routing.by_token(), gate, experts.up,
                experts.down, gate_bias, experts.up_bias, experts.down_bias, activation, setting, True,
            )[0]  # fmt: skip
            y.backward(torch.randn_like(y))
            kernels = dict(found)
            assert len(kernels) == (7 if bias else 6), sorted(kernels)
            for name, kernel in kernels.items():
                stack = spilled(kernel.asm["cubin"])
                print(
                    f"sm_{capability} {dtype} {activation} {setting} {name}: {kernel.metadata.shared} B, {stack} B"
                )
                assert kernel.metadata.shared <= shared, "too much shared memory"
                assert stack <= MOST_SPILLED_BYTES, "registers spill"


if __name__ == "__main__":
    main()
