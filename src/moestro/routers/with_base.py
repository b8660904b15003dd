"""What the experts leave over goes to a base network."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moestro.routers.wrapped import Wrapped
from moestro.routing import Context, Decision


class BaseTakesTheRest(Wrapped):
    """Weighs the shared network by what the combine weights of a token fall short of one.

        y_t = sum_e a[t, e] f_e(x_t) + (1 - sum_e a[t, e]) base(x_t)        Royer et al. 2023

    With experts equal to the base the output is the base's, whatever the gate says.
    """

    def decide(self, x: Tensor, context: Context) -> Decision:
        decision: Decision = self.router.decide(x, context)
        rest = 1 - decision.routing.combine_matrix().sum(1)
        return replace(decision, notes={**decision.notes, "shared_weight": rest})
