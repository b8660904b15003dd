"""What routing costs: choosing, sorting by expert, finding the way back, and their share of a layer's time.

`choose` is `top_k`, `over_sort` how much longer a stable sort of the scores takes; `route` makes the
`SparseRouting`, `back` its order by token. `outside` is the share of forward and backward that is not matrix
products, for a layer of width 256 with experts of 128 on one thread: the products' own time by torch's profiler,
which sees one thread only, over the time of a step without the profiler, which slows small operators down.

    python benchmarks/router.py
"""

from __future__ import annotations

from statistics import median

import torch
from harness import Report, all_times, interleaved, parse, profiled

import moestro
from moestro.routing import SparseRouting, top_k

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


def outside_products(num_experts: int, tokens: int, k: int) -> float:
    """The share of a layer's forward and backward on one thread that is not products."""
    sizes = {"width": 256, "hidden": 128, "num_experts": num_experts, "top_k": k}
    layer = moestro.build("mixtral", **sizes).bfloat16()
    x = torch.randn(tokens, 256).bfloat16().requires_grad_()

    def step() -> None:
        layer(x).float().square().mean().backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = all_times({"step": step}, repeat=5)["step"]
        products = [
            sum(event.self_cpu_time_total for event in profiled(step).key_averages() if event.key in PRODUCTS)
            for _ in range(3)
        ]
    finally:
        torch.set_num_threads(threads)
    return 1 - 1e-6 * median(products) / median(whole)


def main() -> None:
    report = Report("router", parse(__doc__))
    for num_experts in (64, 128, 256, 512):
        for tokens in (1, 64, 1024, 4096, 16384, 65536):
            scores, weight = torch.rand(tokens, num_experts), torch.rand(tokens, 8)
            index = top_k(scores, 8)
            routing = SparseRouting.from_choice(index, weight, num_experts)
            seconds = interleaved(
                {
                    "choose": lambda scores=scores: top_k(scores, 8),
                    "sort": lambda scores=scores: scores.sort(dim=-1, descending=True, stable=True),
                    "route": lambda i=index, w=weight, e=num_experts: SparseRouting.from_choice(i, w, e),
                    "back": lambda routing=routing: routing.by_token(),
                },
                report.repeat,
            )
            report.add(
                experts=num_experts,
                tokens=tokens,
                choose_us=seconds["choose"] * 1e6,
                over_sort=seconds["sort"] / seconds["choose"],
                route_us=seconds["route"] * 1e6,
                back_us=seconds["back"] * 1e6,
                outside=outside_products(num_experts, tokens, 8) if tokens <= 4096 else None,
            )
    report.finish()


if __name__ == "__main__":
    main()
