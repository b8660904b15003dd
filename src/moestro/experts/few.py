"""A bank run on a handful of tokens, as in decoding: bound by the bytes of the chosen experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moestro.experts.activations import PLAIN, UNITS
from moestro.kernels import as_autocast
from moestro.kernels.gathered import gathered_product, gathered_rows, suits_few
from moestro.routing import Routing, SparseRouting


def run_few(bank: Any, x: Tensor, routing: Routing) -> Tensor | None:
    """`y = C F(D x)` for few pairs of tokens and experts; None where another way is better or is asked for.

    Args:
        bank: a `GLU` or `MLP`.
        x: the tokens.
        routing: who goes where.

    Shapes: x `[tokens, width]` -> `[tokens, width]`.
    """
    if not isinstance(routing, SparseRouting) or not len(x):
        return None
    if not takes_few(bank, as_autocast(x[:0]), len(routing.token)):  # no need to cast all of x to know
        return None
    return combine_few(routing, few_rows(bank, routing.dispatch(as_autocast(x)), routing.expert))


def takes_few(bank: Any, x: Tensor, pairs: int) -> bool:
    """Whether `few_rows` is the way for so many pairs of rows like `x` and experts of a `GLU` or `MLP`."""
    return bank.kernel == "auto" and suits_few(x, bank.up, pairs)


def few_rows(bank: Any, rows: Tensor, expert: Tensor) -> Tensor:
    """Each row through its own expert. Shapes: rows `[pairs, width]`, expert `[pairs]` -> `[pairs, width]`."""
    index = gathered_rows(expert, bank.width)
    hidden = _add(gathered_product(rows, index, bank.up), bank.up_bias, expert)
    if bank.activation in PLAIN:
        hidden = PLAIN[bank.activation](hidden)
    else:
        gate = _add(gathered_product(rows, index, bank.gate), bank.gate_bias, expert)
        hidden = UNITS[bank.activation](gate, hidden)
    rows = gathered_product(hidden, gathered_rows(expert, bank.hidden), bank.down)
    return _add(rows, bank.down_bias, expert)


def combine_few(routing: SparseRouting, rows: Tensor) -> Tensor:
    """`C rows`; of one token that is a weighted sum of all rows."""
    if routing.num_tokens == 1 and routing.scale == "output":
        return (routing.weight.to(rows.dtype).unsqueeze(1) * rows).sum(0, keepdim=True)
    return routing.combine(rows)


def _add(rows: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    return rows if bias is None else rows + bias.index_select(0, expert).to(rows.dtype)
