"""Starting the device's programs: how many, with which tiles, on which rows. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from moestro.kernels.triton import is_interpreted
from moestro.kernels.triton.device import backward, forward, tiles
from moestro.kernels.triton.settings import Setting, most_tiles

INTERPRETED_PROGRAMS = 3  # so that each takes several tiles, as on a device
SHARED_BYTES = 227 * 1024


class Launch:
    """Products of rows grouped by expert.

    Args:
        like: says dtype and device.
        offsets: where groups begin, `[experts + 1]`.
        pairs: rows of all groups.
        setting: the tiles.
    """

    def __init__(self, like: Tensor, offsets: Tensor, pairs: int, setting: Setting) -> None:
        self.like, self.offsets, self.setting = like, offsets.contiguous(), setting
        self.pairs, self.num_experts = pairs, len(offsets) - 1
        self.on_device = like.device.type != "cpu"
        properties = torch.cuda.get_device_properties(like.device) if self.on_device else None
        shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
        self.options = {"num_warps": setting.warps, "num_stages": setting.stages_within(shared)}
        self.programs = INTERPRETED_PROGRAMS if properties is None else properties.multi_processor_count
        self.programs *= 1 if properties is None else setting.programs
        self.bound = most_tiles(pairs, self.num_experts, setting.rows)
        self.table = torch.empty(1 + 2 * self.bound, dtype=torch.int32, device=like.device)
        self.columns = setting.columns_of(like.dtype)
        self.products = {
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "WIDEN": is_interpreted() and like.dtype == torch.bfloat16,
            "COLUMNS": self.columns,
            "DEPTH": setting.depth(like.dtype),
            "GROUP": setting.group,
        }
        with self.device():
            tiles.write_table[(self.num_experts,)](
                self.offsets,
                self.table,
                self.num_experts,
                ROWS=setting.rows,
                EXPERTS=triton.next_power_of_2(self.num_experts),
                STEP=128,
            )

    def device(self) -> AbstractContextManager[Any]:
        """Make the tensors' device the current one: Triton launches there."""
        return torch.cuda.device(self.like.device) if self.on_device else nullcontext()

    def empty(self, rows: int, columns: int) -> Tensor:
        """Memory in the rows' dtype."""
        return self.like.new_empty(rows, columns)

    def _start(self, kernel: Any, num_tiles: int, *arguments: Any, **constants: Any) -> None:
        if not num_tiles:
            return
        with self.device():
            kernel[(min(self.programs, num_tiles),)](*arguments, **{**self.products, **constants}, **self.options)

    def _even(self, depth: int) -> bool:
        return depth % self.setting.depth(self.like.dtype) == 0

    def _column_tiles(self, columns: int) -> int:
        return -(-columns // self.columns)

    def hidden_units(
        self,
        x: Tensor,
        token: Tensor | None,
        gate: Tensor | None,
        up: Tensor,
        biases: tuple[Tensor | None, Tensor | None],
        activation: str,
        keep: tuple[Tensor | None, Tensor | None] = (None, None),
        h: Tensor | None = None,
    ) -> None:
        """Fill `keep` with the pre-activations of gate and up and `h` with the hidden units, where given."""
        width, hidden = up.shape[1:]
        gate_bias, up_bias = (None if each is None else each.contiguous() for each in biases)
        self._start(
            forward.hidden_units,
            self.bound * self._column_tiles(hidden),
            x, token, self.offsets, self.table, gate, up, gate_bias, up_bias, *keep, h, width, hidden,
            *x.stride(), *(0, 0, 0) if gate is None else gate.stride(), *up.stride(),
            ACTIVATION=activation,
            GATED=gate is not None,
            GATHER=token is not None,
            BIAS=up_bias is not None,
            KEEP=keep[1] is not None,
            ACTIVATE=h is not None,
            EVEN=self._even(width),
            ROWS=self.setting.rows,
        )  # fmt: skip

    def product(
        self,
        rows: Tensor,
        weight: Tensor,
        second: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        token: Tensor | None = None,
    ) -> Tensor:
        """`rows W_e`, plus `second[0] second[1]_e` of the same sizes, plus `bias_e`.

        Rows are gathered by `token`.
        """
        depth, columns = weight.shape[1:]
        out = self.empty(self.pairs, columns)
        c, d = (None, None) if second is None else second
        self._start(
            forward.grouped_product,
            self.bound * self._column_tiles(columns),
            rows, token, weight, c, d, None if bias is None else bias.contiguous(), out, self.offsets, self.table,
            depth, columns, *rows.stride(), *weight.stride(),
            *(0, 0) if c is None else c.stride(), *(0, 0, 0) if d is None else d.stride(),
            GATHER=token is not None,
            SECOND=second is not None,
            BIAS=bias is not None,
            EVEN=self._even(depth),
            ROWS=self.setting.rows,
        )  # fmt: skip
        return out

    def combine(self, rows: Tensor, weight: Tensor | None, order: Tensor, starts: Tensor) -> Tensor:
        """The (weighted) sum of each token's rows, in the order of its choices."""
        num_tokens, columns = len(starts), rows.shape[1]
        y = self.empty(num_tokens, columns)
        block = min(1024, triton.next_power_of_2(columns))
        if num_tokens:
            with self.device():
                forward.combine[(num_tokens, -(-columns // block))](
                    rows, weight, order, starts, y, num_tokens, len(order), columns,
                    WEIGHTED=weight is not None,
                    COLUMNS=block,
                )  # fmt: skip
        return y

    def hidden_gradients(
        self,
        grad: Tensor,
        token: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        weight: Tensor | None,
        pre: tuple[Tensor | None, Tensor],
        activation: str,
        need_weight: bool,
        need_h: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """Gradients of the pre-activations of gate and up, `weight * h`, and the gradient of `weight`."""
        hidden, width = down.shape[1:]
        pre_gate, pre_up = pre
        grad_gate = None if pre_gate is None else torch.empty_like(pre_gate)
        grad_up = torch.empty_like(pre_up)
        weighted = torch.empty_like(pre_up) if need_h else None
        num_shares = -(-hidden // self.setting.narrow)
        shares = self.like.new_empty(self.pairs, num_shares, dtype=torch.float32) if need_weight else None
        self._start(
            backward.hidden_gradients,
            self.bound * num_shares,
            grad, token, self.offsets, self.table, down, None if down_bias is None else down_bias.contiguous(),
            weight, pre_gate, pre_up, grad_gate, grad_up, weighted, shares, width, hidden,
            *grad.stride(), *down.stride(), num_shares,
            ACTIVATION=activation,
            GATED=pre_gate is not None,
            GATHER=token is not None,
            WEIGHTED=weight is not None,
            BIAS=down_bias is not None,
            SHARES=need_weight,
            NEED_H=need_h,
            EVEN=self._even(width),
            ROWS=self.setting.rows,
            COLUMNS=self.setting.narrow,
        )  # fmt: skip
        return grad_gate, grad_up, weighted, None if shares is None else shares.sum(1)

    def weight_gradient(
        self, a: Tensor, b: Tensor, out: Tensor, a_token: Tensor | None = None, b_token: Tensor | None = None
    ) -> None:
        """`out[e] = A_e^T B_e`; rows of a and b are gathered by their tokens."""
        size, columns = out.shape[1:]
        self._start(
            backward.weight_gradient,
            self.num_experts * self._column_tiles(size) * self._column_tiles(columns),
            a, a_token, b, b_token, out, self.offsets, self.num_experts, size, columns,
            *a.stride(), *b.stride(), *out.stride(),
            A_GATHER=a_token is not None,
            B_GATHER=b_token is not None,
            ROWS=self.columns,
        )  # fmt: skip

    def bias_gradient(
        self, rows: Tensor, out: Tensor, token: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """`out[e]` = the sum of the (weighted) rows of expert e."""
        block = min(128, triton.next_power_of_2(rows.shape[1]))
        with self.device():
            backward.bias_gradient[(self.num_experts, -(-rows.shape[1] // block))](
                rows, token, weight, out, self.offsets, rows.shape[1], *rows.stride(),
                GATHER=token is not None,
                WEIGHTED=weight is not None,
                ROWS=64,
                COLUMNS=block,
            )  # fmt: skip
