"""The layer: a router decides, experts compute, a shared expert may run beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moestro.experts import Experts
from moestro.routers import Router
from moestro.routing import Context, Decision

Loss = Callable[[Decision], Tensor]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a layer.

    Attributes:
        total: all of them.
        active: those that one token meets: router, shared expert and `top_k` experts.
        router: of the router.
        per_expert: of one expert, on average.
        shared: of the shared expert.
    """

    total: int
    active: int
    router: int
    per_expert: int
    shared: int


class MoE(nn.Module):
    """A Mixture-of-Experts layer.

        y = experts.run(x, router(x).routing) + shared_weight * shared(x)        shared_weight = 1 unless noted

    Args:
        router: decides.
        experts: compute.
        shared: runs on every token, e.g. a `FeedForward`.
        losses: name -> (coefficient, loss of a Decision); `moestro.balance.RoutingLog` adds them up.
        controllers: adjust the router after an optimiser step, e.g. `moestro.balance.LossFreeBias`.

    Raises:
        ValueError: a router and experts that disagree about the number of experts, or a controller that cannot act.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        *,
        losses: Mapping[str, tuple[float, Loss]] | None = None,
        controllers: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts but the bank holds {experts.num_experts}"
            )
        self.router, self.experts, self.shared = router, experts, shared
        self.losses = dict(losses or {})
        for name, (_, loss) in self.losses.items():
            if isinstance(loss, nn.Module):  # a loss with a state, saved with the weights
                self.add_module(f"{name}_loss", loss)
        self.controllers = list(controllers)
        for controller in self.controllers:
            controller.check(self)
        self.method: str | None = None
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor, context: Context | None = None, decisions: list[Decision] | None = None) -> Tensor:
        """Route, run and add the shared expert.

        Args:
            x: hidden states `[..., width]`; of `[batch, length, width]` each batch entry is a sequence.
            context: facts about the tokens, flattened to one entry per token.
            decisions: gets the decision appended, for a caller that tells the next layer (`Context.previous`).

        Returns: the shape of `x`, its last size being `experts.out_width`.
        """
        tokens = x.reshape(-1, x.shape[-1])
        decision = self.route(tokens, (context or Context()).with_sequences_of(x))
        if decisions is not None:
            decisions.append(decision)
        y = self.run(tokens, decision)
        return y.view(*x.shape[:-1], y.shape[-1])

    def route(self, x: Tensor, context: Context | None = None) -> Decision:
        """Only decide. Shapes: x `[tokens, width]`."""
        decision: Decision = self.router(x, context)
        return decision

    def run(self, x: Tensor, decision: Decision) -> Tensor:
        """Only carry out a decision, this call's or a stored one.

        Shapes: x `[tokens, width]` -> `[tokens, out_width]`.
        """
        if "valid" in decision.notes:
            x = x.masked_fill(~decision.notes["valid"].unsqueeze(1), 0)  # padding may hold anything, also NaN
        y = self.experts.run(x, decision.routing)
        if self.shared is None:
            return y
        shared = self.shared(x)
        for name in ("shared_weight", "valid"):
            if name in decision.notes:
                shared = shared * decision.notes[name].unsqueeze(1).to(shared.dtype)
        return y + shared

    @property
    def top_k(self) -> float:
        """Experts that serve a token, on average."""
        return self.router.top_k

    @property
    def causal(self) -> bool:
        """Whether later tokens cannot change the outputs of earlier ones, with this layer's options."""
        return self.router.causal

    @property
    def causal_evaluation(self) -> bool:
        """Whether that holds in evaluation at least, so that the layer can generate."""
        return self.router.causal or self.router.causal_evaluation

    @property
    def batch_independent(self) -> bool:
        """Whether a sequence's output does not depend on the others of the batch."""
        return self.router.batch_independent

    def parameter_counts(self) -> ParameterCounts:
        """Count parameters; see `ParameterCounts`."""
        router, shared = _count(self.router), _count(self.shared)
        per_expert = self.experts.parameters_per_expert()
        active = router + shared + round(self.top_k * per_expert)
        return ParameterCounts(_count(self), active, router, per_expert, shared)

    def extra_repr(self) -> str:
        return f"method={self.method!r}" if self.method else ""


def _count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
