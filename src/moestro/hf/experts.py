"""The experts of transformers models on our kernels: any size, any dtype, forward and backward."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts.fused import operator_of, run_fused
from moestro.experts.stacked import StackedLinear
from moestro.hf.families import find_layers
from moestro.kernels import as_autocast
from moestro.routing import SparseRouting

BACKEND = "moestro"


def register_backend() -> None:
    """Make `model.set_experts_implementation("moestro")` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(BACKEND, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind `set_experts_implementation("moestro")`: one sort, then grouped products.

    Follows the layout that the experts module declares: gated or plain, concatenated or interleaved, transposed
    or not, with biases, with a norm after the experts, and, under expert parallelism, indices past the last
    local expert, which are left out.

    Shapes: hidden_states `[tokens, width]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, width]`.
    """
    keep = top_k_index < self.num_experts if self._is_expert_parallel else None
    routing = SparseRouting.from_choice(top_k_index, top_k_weights, self.num_experts, keep)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    x = _in_dtype_of(hidden_states, up)
    fused = _as_swiglu(self)
    operator = None if fused is None else operator_of(fused, x)
    if fused is not None and operator is not None:
        return run_fused(fused, x, routing, operator).to(hidden_states.dtype)
    rows = routing.dispatch(x)
    apply = StackedLinear(routing.offsets, "auto")
    up_bias, down_bias = _biases(self)
    hidden = apply(rows, _as_stacked(self, up), up_bias)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    rows = apply(hidden, _as_stacked(self, self.down_proj), down_bias)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return routing.combine(rows).to(hidden_states.dtype)


@dataclass
class SwiGLUView:
    """The weights of a foreign bank as the fused operator takes them: gate and up joined in one, as views."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str = "swiglu"
    kernel: str = "auto"
    recompute: bool = False
    accumulates: bool = False  # views have no gradients of their own to add to


def _as_swiglu(experts: Any) -> SwiGLUView | None:
    """The bank's view if it is `(silu(x W_gate) * (x W_up)) W_down`, as in most families; else None."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import _default_apply_gate

    plain = experts.has_gate and getattr(type(experts), "_apply_gate", None) is _default_apply_gate
    act = getattr(experts, "act_fn", None)
    silu = act is F.silu or isinstance(act, nn.SiLU | type(ACT2FN["silu"]))
    if not plain or not silu or experts.has_post_expert_norm:
        return None
    up, down = (_as_stacked(experts, each) for each in (experts.gate_up_proj, experts.down_proj))
    return SwiGLUView(up, down, *_biases(experts))


def _as_stacked(experts: Any, weight: Tensor) -> Tensor:
    """A weight as `[experts, in, out]`."""
    return weight if experts.is_transposed else weight.transpose(1, 2)


def _biases(experts: Any) -> tuple[Tensor | None, Tensor | None]:
    if not experts.has_bias:
        return None, None
    return experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias, experts.down_proj_bias


def _in_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """Rows as the product will read them: autocast's dtype, or the weights'."""
    cast = as_autocast(x)
    return cast if torch.is_autocast_enabled(x.device.type) else cast.to(weight.dtype)


def use_experts(model: nn.Module, implementation: str = BACKEND) -> nn.Module:
    """Run the experts of a transformers model on our kernels, or put transformers' own back.

        moestro.hf.use_experts(model)               our kernels
        moestro.hf.use_experts(model, "eager")      back

    Does what `model.set_experts_implementation` does, and also reaches the families where that call has no
    effect (llama4_text, longcat_flash, switch_transformers, nllb_moe): there it replaces `forward` on the
    instances, and puts it back for any other implementation. For nllb_moe this changes what the model computes:
    transformers 5.23 runs experts 0 and 1 only, whatever the router chose; ours runs the chosen ones.

    Args:
        model: a transformers model with mixture layers.
        implementation: `moestro`, or a name that transformers knows.

    Returns: the model.

    Raises:
        ValueError: no mixture layer, an unknown implementation, or experts that no implementation reaches.
    """
    layers = find_layers(model)
    deaf = [layer for layer in layers.values() if not layer.family.honours_interface]
    own = {layer.name: _OWN_FORWARDS.get(layer.family.name) for layer in deaf}
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    for layer in deaf:
        target, forward = own[layer.name](layer)  # type: ignore[misc]
        if implementation == BACKEND:
            target.forward = types.MethodType(forward, target)
        else:
            target.__dict__.pop("forward", None)
    return model


def _llama4_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4's block: the score scales the input, and only chosen experts run."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    weight, index = scores.topk(self.top_k, dim=-1)
    routing = SparseRouting.from_choice(index, weight, self.num_experts, scale="input")
    apply = StackedLinear(routing.offsets, "auto")
    gate_up = apply(routing.dispatch(_in_dtype_of(x, self.experts.gate_up_proj)), self.experts.gate_up_proj, None)
    gate, up = gate_up.chunk(2, dim=-1)
    rows = apply(up * self.experts.act_fn(gate), self.experts.down_proj, None)
    return self.shared_expert(x) + routing.combine(rows).to(x.dtype), logits


def _longcat_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Longcat's bank: experts past the routed ones are the identity, a weight on the input."""
    real = top_k_index < self.num_routed_experts
    zero = (top_k_weights * ~real).sum(-1, keepdim=True).to(hidden_states.dtype)
    identity = hidden_states * zero
    if self.gate_up_proj is None:
        return identity
    count = self.num_routed_experts
    routing = SparseRouting.from_choice(top_k_index, top_k_weights, count, real)
    apply = StackedLinear(routing.offsets, "auto")
    rows = routing.dispatch(_in_dtype_of(hidden_states, self.gate_up_proj))
    gate, up = apply(rows, self.gate_up_proj[:count].transpose(1, 2), None).chunk(2, dim=-1)
    rows = apply(self.act_fn(gate) * up, self.down_proj.transpose(1, 2), None)
    return routing.combine(rows).to(hidden_states.dtype) + identity


def _run_modules(experts: Any, x: Tensor, routing: SparseRouting) -> Tensor:
    """Rows of experts held as separate modules, each on its own."""
    groups = routing.dispatch(x).split(routing.load().tolist())
    return torch.cat([experts[f"expert_{e}"](group) if len(group) else group for e, group in enumerate(groups)])


def _switch_forward(self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    chosen = selected_experts.flatten(0, 1)  # [tokens, experts], all 0 where dropped
    index, keep = chosen.argmax(-1, keepdim=True), chosen.any(-1, keepdim=True)
    routing = SparseRouting.from_choice(index, routing_weights, self.num_experts, keep)
    return routing.combine(_run_modules(self, hidden_states, routing)).to(hidden_states.dtype)


def _nllb_forward(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """NLLB's bank with the experts that the gates name; `router_probs [tokens, experts]` is 0 where dropped."""
    weight, index = router_probs.topk(2, dim=-1)
    routing = SparseRouting.from_choice(index, weight, self.num_experts, weight > 0)
    rows = _run_modules(self, hidden_states, routing)
    if self.moe_token_dropout:
        rows = self.token_dropout(rows) if self.training else rows * (1 - self.moe_token_dropout)
    return routing.combine(rows).to(hidden_states.dtype)


def _of_block(forward: Any) -> Any:
    return lambda layer: (layer.block, forward)


def _of_experts(forward: Any) -> Any:
    return lambda layer: (layer.experts, forward)


_OWN_FORWARDS: dict[str, Any] = {
    "llama4_text": _of_block(_llama4_forward),
    "longcat_flash": _of_experts(_longcat_forward),
    "switch_transformers": _of_experts(_switch_forward),
    "nllb_moe": _of_experts(_nllb_forward),
}
