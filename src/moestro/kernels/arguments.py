"""The arguments of the fused bank, named once for all of its operators."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """What a bank is called with.

    Products are computed in the dtype of `x`; weights of another are cast an expert at a time.

    Attributes:
        x: `[tokens, width]`; without `token`, `[pairs, width]` grouped by expert.
        offsets: where each expert's pairs begin, `[experts + 1]`.
        token: source of each pair, `[pairs]`.
        weight: combine weight of each pair, `[pairs]`.
        order: pairs by token, `[pairs]`; with `starts`, where each token's pairs begin, `[tokens]`. Without
            them, outputs stay rows.
        gate, up, down: `[experts, width, hidden]` twice and `[experts, hidden, width]`. A gated activation without
            a gate takes both from `up`, `[experts, width, 2 hidden]`, the gate first; a plain one has none.
        gate_bias, up_bias, down_bias: `[experts, hidden]` (or `2 hidden`) twice and `[experts, width]`, or None.
        activation: see `moestro.experts.activations`.
        rounding: `exact`, `few_sizes` or `tiles`, see `moestro.kernels.plan`.
    """

    x: Tensor
    offsets: Tensor
    token: Tensor | None
    weight: Tensor | None
    order: Tensor | None
    starts: Tensor | None
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    rounding: str


SCHEMA = (
    "Tensor x, Tensor offsets, Tensor? token, Tensor? weight, Tensor? order, Tensor? starts, "
    "Tensor? gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "str activation, str rounding"
)
PARAMETERS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
LEARNING = ("x", "weight", *PARAMETERS)  # arguments that have a gradient

# earlier gradients of the parameters, that an operator adds theirs to
EARLIER = ", ".join(f"Tensor({letter}!)? earlier_{name}" for letter, name in zip("abcdef", PARAMETERS, strict=True))
