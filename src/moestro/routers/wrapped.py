"""Routers around routers: they change how a decision is carried out, not what is decided."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moestro.routers.base import Router
from moestro.routing import Context, Decision, SparseRouting


class Wrapped(Router):
    """A router inside another, with its flags.

    Args:
        router: the router inside.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.num_experts, self.top_k = router.num_experts, router.top_k
        self.causal, self.batch_independent = router.causal, router.batch_independent


class WeighsInputs(Wrapped):
    """Combine weights multiply what goes into an expert, not what comes out.

        y = sum_e f_e(a_e x)        Meta 2025 (Llama 4); Hwang et al. 2023 (Tutel, `is_postscore=False`)

    Not the same function: experts are not linear.
    """

    def decide(self, x: Tensor, context: Context) -> Decision:
        decision: Decision = self.router.decide(x, context)
        assert isinstance(decision.routing, SparseRouting)
        return replace(decision, routing=replace(decision.routing, scale="input"))
