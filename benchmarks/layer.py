"""One bank of experts, forward and backward, as a share of a dense layer of equal FLOPs, and beside its peers.

Every round draws a new random routing, the same for all. `of_dense` is dense time / bank time, dense being the
fastest of three dense layers; `over_x` is x's time / bank time. The peers have our weights and are checked to give
our outputs. Memory freed by a step is kept for the next, for all alike (`--malloc default` leaves that to glibc).

    python benchmarks/layer.py [--shapes OLMoE,Mixtral] [--tokens 512,4096] [--dtypes bfloat16] [--passes both]
                               [--paths grouped_mm,eager]
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from harness import Report, interleaved, parse, peer
from limits import SHAPES, Shape, bank, dense_layers, routed, transformers_experts
from torch import Tensor

from moestro.kernels.allocator import keep_freed_memory

PEER_BYTES = 4 * 2**30  # batched_mm copies the weights of every choice: left out where they need more


class Case:
    """The steps that compete on one shape, and the routing of the round."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, backward: bool) -> None:
        self.shape, self.tokens, self.backward = shape, tokens, backward
        self.x = torch.randn(tokens, shape.width).to(dtype).requires_grad_(backward)
        self.upstream = torch.randn(tokens, shape.width).to(dtype)
        self.ours = bank(shape, dtype)
        self.steps: dict[str, Callable[[], Tensor]] = {}
        self.deal()
        for name, (layer, parameters) in dense_layers(shape, dtype).items():
            self.add(f"dense: {name}", lambda layer=layer: layer(self.x), parameters)
        self.add("moestro", lambda: self.ours.run(self.x, self.routing), list(self.ours.parameters()))
        native = bank(shape, dtype, "native")
        native.load_state_dict(self.ours.state_dict())
        self.add("torch grouped_mm", lambda: native.run(self.x, self.routing), list(native.parameters()))

    def deal(self) -> None:
        """Draw this round's routing."""
        self.index, self.weight, self.routing = routed(self.shape, self.tokens)

    def add(self, name: str, forward: Callable[[], Tensor], parameters: list[Tensor]) -> None:
        def step() -> Tensor:
            with torch.set_grad_enabled(self.backward):
                y = forward()
            if self.backward:
                for each in (self.x, *parameters):
                    each.grad = None
                y.backward(self.upstream)
            return y.detach()

        self.steps[name] = step

    def add_transformers(self, path: str) -> None:
        copies = self.tokens * self.shape.top_k * self.shape.width * self.shape.hidden * 3 * self.x.element_size()
        if path == "batched_mm" and copies > PEER_BYTES:
            return
        theirs, parameters = transformers_experts(self.shape, self.ours, path)
        name = f"transformers {path}"
        self.add(name, lambda: theirs(self.x, self.index, self.weight.to(self.x.dtype)), parameters)
        try:
            found, expected = self.steps[name](), self.steps["moestro"]()
        except RuntimeError as error:
            print(f"{name} fails on {self.shape.name}: {str(error).splitlines()[0]}", flush=True)
            del self.steps[name]
            return
        error = float((found - expected).float().norm() / expected.float().norm())
        if error > 0.03:
            raise SystemExit(f"{name} on {self.shape.name} does not compute our layer: relative error {error:.3f}")


def measure(case: Case, dtype: torch.dtype, report: Report) -> None:
    seconds = interleaved(case.steps, report.repeat, 2, case.deal)
    ours = seconds["moestro"]
    dense, how = min((value, name) for name, value in seconds.items() if name.startswith("dense"))
    theirs = {name.split()[1]: value for name, value in seconds.items() if name.startswith("transformers")}
    report.add(
        shape=case.shape.name,
        dtype=str(dtype).removeprefix("torch."),
        passes="both" if case.backward else "forward",
        tokens=case.tokens,
        ms=ours * 1e3,
        of_dense=dense / ours,
        over_native=seconds["torch grouped_mm"] / ours,
        over_best_transformers=min(theirs.values()) / ours if theirs else None,
        over_grouped=theirs["grouped_mm"] / ours if "grouped_mm" in theirs else None,
        over_batched=theirs["batched_mm"] / ours if "batched_mm" in theirs else None,
        over_eager=theirs["eager"] / ours if "eager" in theirs else None,
        dense=how.removeprefix("dense: "),
    )


def main() -> None:
    arguments = parse(
        __doc__, repeat=5, shapes="OLMoE,Mixtral,tiny", tokens="512,4096", dtypes="bfloat16,float32",
        passes="both", malloc="keep", paths="eager,grouped_mm,batched_mm",
    )  # fmt: skip
    report = Report("layer", arguments)
    if arguments.malloc == "keep":
        keep_freed_memory()
    with_peer = peer("transformers") is not None
    for name in arguments.dtypes.split(","):
        dtype = getattr(torch, name)
        for shape in (each for each in SHAPES if any(word in each.name for word in arguments.shapes.split(","))):
            for tokens in map(int, arguments.tokens.split(",")):
                for passes in arguments.passes.split(","):
                    case = Case(shape, tokens, dtype, passes == "both")
                    for path in arguments.paths.split(",") if with_peer else ():
                        case.add_transformers(path)
                    measure(case, dtype, report)
                    del case
                    gc.collect()  # its steps know it: several of the large shapes at once are killed without a word
    report.finish()


if __name__ == "__main__":
    main()
