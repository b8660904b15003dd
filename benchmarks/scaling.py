"""What more experts cost at equal FLOPs: a bank of top-8 experts, forward and backward, from 16 to 128 experts.

Every bank has the same width, hidden size and choices per token, so the same products, with ever fewer rows each.
`over_fewest` is the seconds / those of the bank with the fewest experts; `grouped_over_fewest` is the same for
transformers' fastest path in its own terms.

    python benchmarks/scaling.py [--experts 16,32,64,128] [--tokens 4096] [--dtype bfloat16]
"""

from __future__ import annotations

import torch
from harness import Report, interleaved, parse, peer
from layer import Case
from limits import Shape

from moestro.kernels.allocator import keep_freed_memory

PEER = "transformers grouped_mm"


def main() -> None:
    arguments = parse(
        __doc__, repeat=9, experts="16,32,64,128", tokens=4096, dtype="bfloat16", width=1024, hidden=512, top_k=8
    )
    report = Report("scaling", arguments)
    keep_freed_memory()
    with_peer = peer("transformers") is not None
    cases = {}
    for experts in map(int, arguments.experts.split(",")):
        shape = Shape(f"{experts} experts", arguments.width, arguments.hidden, experts, arguments.top_k)
        cases[experts] = Case(shape, arguments.tokens, getattr(torch, arguments.dtype), backward=True)
        if with_peer:
            cases[experts].add_transformers("grouped_mm")
    names = ["moestro", *([PEER] if with_peer else [])]
    steps = {f"{name} {experts}": case.steps[name] for experts, case in cases.items() for name in names}

    def deal() -> None:
        for case in cases.values():
            case.deal()

    seconds = interleaved(steps, report.repeat, 2, deal)
    fewest = min(cases)
    for experts in cases:
        ours, theirs = seconds[f"moestro {experts}"], seconds.get(f"{PEER} {experts}")
        report.add(
            experts=experts,
            tokens=arguments.tokens,
            ms=1e3 * ours,
            over_fewest=ours / seconds[f"moestro {fewest}"],
            grouped_over_fewest=theirs and theirs / seconds[f"{PEER} {fewest}"],
        )
    report.finish()


if __name__ == "__main__":
    main()
