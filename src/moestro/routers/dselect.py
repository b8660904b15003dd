"""Selectors that write the number of an expert in soft bits: differentiable, and sparse once trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.routers.base import Router, check_top_k, context_notes
from moestro.routing import Context, Decision, SparseRouting, top_k


class DSelectK(Router):
    """k selectors, each a code of smooth bits, mixed by a softmax.

        S(t) = 0 below -g/2, 1 above g/2, else -2 t^3 / g^3 + 3 t / (2 g) + 1/2
        r_j(e) = prod_b S(z_jb) if bit b of e is set, else 1 - S(z_jb);   a = sum_j softmax(w)_j r_j
        Hazimeh et al. 2021, eqs. 3-6; z = x W + b and w = x V + c depend on the token

    No expert is cut off by a rank: gradients are exact. Every expert whose weight is not exactly 0 runs, at first
    all of them; in the end at most k. Bits come most significant first.

    Args:
        width: model width.
        num_experts: number of experts; codes beyond it carry weight to nobody.
        top_k: selectors.
        gamma: width of the band in which a bit is soft.

    Raises:
        ValueError: a band without width, or more selectors than experts.

    Parameters: weight `[k, bits, width]` and bias `[k, bits]` (uniform within gamma / 100), mixer `[k, width]` and
    mixer_bias `[k]` (zero). Notes `selectors` `[tokens, k, experts]`.
    """

    codes: Tensor

    def __init__(self, width: int, num_experts: int, top_k: int = 2, gamma: float = 1.0) -> None:
        super().__init__()
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be above 0: it is the width of the soft band")
        self.num_experts, self.gamma, self.top_k = num_experts, gamma, check_top_k(top_k, num_experts)
        bits = (num_experts - 1).bit_length()
        self.weight = nn.Parameter(torch.empty(top_k, bits, width).uniform_(-gamma / 100, gamma / 100))
        self.bias = nn.Parameter(torch.empty(top_k, bits).uniform_(-gamma / 100, gamma / 100))
        self.mixer = nn.Parameter(torch.zeros(top_k, width))
        self.mixer_bias = nn.Parameter(torch.zeros(top_k))
        places = torch.arange(bits - 1, -1, -1)
        codes = (torch.arange(num_experts).unsqueeze(1) >> places) & 1
        self.register_buffer("codes", codes.bool(), persistent=False)

    def decide(self, x: Tensor, context: Context) -> Decision:
        z = torch.einsum("tw,kbw->tkb", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)
        bit = smooth_step(z, self.gamma).unsqueeze(2)  # [tokens, k, 1, bits]
        selectors = torch.where(self.codes, bit, 1 - bit).prod(-1)  # [tokens, k, experts]
        mix = (x @ self.mixer.to(x.dtype).t() + self.mixer_bias.to(x.dtype)).softmax(-1)
        probs = (mix.unsqueeze(-1) * selectors).sum(1)
        index = top_k(probs, self.num_experts)
        weight = probs.gather(1, index)
        wanted = weight.detach() != 0
        kept = wanted if context.valid is None else wanted & context.valid.unsqueeze(1)
        routing = SparseRouting.from_choice(index, weight, self.num_experts, kept)
        notes = {"choice": index, "wanted": wanted, "kept": kept, "selectors": selectors}
        return Decision(routing, None, probs, {**context_notes(context), **notes})

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, gamma={self.gamma}"


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """Cubic from 0 at -gamma/2 to 1 at gamma/2, constant outside, with a continuous slope."""
    inside = t.clamp(-gamma / 2, gamma / 2) / gamma
    step = -2 * inside**3 + 1.5 * inside + 0.5
    return torch.where(t <= -gamma / 2, torch.zeros_like(t), torch.where(t >= gamma / 2, torch.ones_like(t), step))
