"""The steps of decoding as compiled calls, one for attention and one for experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moestro.experts import QuantisedLinear
from moestro.experts.compiled import (
    CompiledBank,
    CompiledNetwork,
    stack_matrix,
    suits_compiled,
    suits_compiled_network,
)
from moestro.inference.attention_step import by_head, head_weights
from moestro.inference.feed_forward_step import Choice
from moestro.inference.moment import Moment
from moestro.inference.single_row import Norm, as_map
from moestro.models import Block, GroupedQueryAttention
from moestro.models.cache import LayerCache


def linear_matrix(module: nn.Module) -> Any:
    """The matrix of a linear map as compiled steps read it, without bias; None for maps that they do not know."""
    from moestro.kernels.compiled.memory import float_matrix

    if type(module) is QuantisedLinear:
        return stack_matrix(module.matrix)
    if type(module) is nn.Linear:
        return float_matrix(module.weight.detach().unsqueeze(0).transpose(1, 2))
    return None


def float_bias(module: Any) -> Tensor | None:
    """A copy of the bias of a linear map in float32, None without."""
    return None if module.bias is None else module.bias.detach().to(torch.float32, copy=True).contiguous()


class CompiledMap:
    """A linear map of one row.

    Shapes: `[1, in]` float32 -> `[1, out]`, which the next call overwrites.
    """

    def __init__(self, module: nn.Linear | QuantisedLinear) -> None:
        from moestro.kernels.compiled.call import Call
        from moestro.kernels.compiled.linear import LINEAR, linear_step
        from moestro.kernels.compiled.memory import Rounded

        parts, matrix = torch.get_num_threads(), linear_matrix(module)
        self.row, self.inputs = torch.zeros(1, matrix.inputs), module.in_features
        sums = matrix.sums(parts)
        rounded = Rounded(parts, matrix.inputs, matrix.group)
        self.call = Call(linear_step(), LINEAR, parts, row=self.row, matrix=matrix, rounded=rounded, sums=sums)
        self.out, self.bias = sums[0, :, : module.out_features], float_bias(module)

    def __call__(self, row: Tensor) -> Tensor:
        self.row[:, : self.inputs] = row
        self.call()
        return self.out if self.bias is None else self.out.add_(self.bias)


class CompiledAttention:
    """`CachedAttention` with its norm, its maps and the residual as one call.

    Keys and values are kept in the dtype of the model.

    Args:
        block: one that `suits_compiled_attention`.
        cache: what its layer stored so far, and how much it may store.

    Shapes: x `[1, width]` float32 -> the same.
    """

    def __init__(self, block: Block, cache: LayerCache) -> None:
        from moestro.kernels.compiled.attention import ATTENTION, NORMS, attention_step
        from moestro.kernels.compiled.call import Call
        from moestro.kernels.compiled.memory import Rounded

        attention, parts = block.attention, torch.get_num_threads()
        assert isinstance(attention, GroupedQueryAttention)
        qkv, output = linear_matrix(attention.qkv), linear_matrix(attention.output)
        keys, values = (by_head(each, cache.length, each.dtype) for each in (cache.first, cache.second))
        norm = Norm(block.attention_norm)
        norms = {"query_eps": attention.query_norm, "key_eps": attention.key_norm}
        self.call = Call(
            attention_step(),
            ATTENTION,
            parts,
            width=len(norm.weight),
            heads=attention.num_heads,
            kv_heads=attention.num_kv_heads,
            dim=attention.head_dim,
            positions=keys.shape[1],
            window=attention.window or keys.shape[1],
            norm=NORMS.index(attention.qk_norm),
            bfloat16=int(keys.dtype == torch.bfloat16),
            qkv=qkv,
            output=output,
            qkv_bias=float_bias(attention.qkv),
            output_bias=float_bias(attention.output),
            norm_weight=norm.weight.contiguous(),
            head_weight=head_weights(attention),
            sinks=None if attention.sinks is None else attention.sinks.detach().to(torch.float32, copy=True),
            keys=keys,
            values=values,
            row=torch.zeros(parts, qkv.inputs),
            rounded=Rounded(parts, max(qkv.inputs, output.inputs), qkv.group),
            projected=qkv.sums(parts),
            queries=torch.empty(attention.num_heads, attention.head_dim),
            scores=torch.empty(parts, keys.shape[1]),
            mixed=torch.zeros(output.inputs),
            sums=output.sums(parts),
            eps=norm.eps,
            **{name: getattr(each, "eps", 0.0) for name, each in norms.items()},
        )

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        out = torch.empty_like(x)
        tensors = (x, out, moment.cosine, moment.sine)
        self.call(*(tensor.data_ptr() for tensor in tensors), moment.position)
        return out


def suits_compiled_attention(block: Block) -> bool:
    """Whether a `CompiledAttention` can be made of a block's attention."""
    attention = block.attention
    if type(attention) is not GroupedQueryAttention or not attention.plain:
        return False
    matrices = [linear_matrix(module) for module in (attention.qkv, attention.output)]
    return all(matrix is not None for matrix in matrices) and len({matrix.group for matrix in matrices}) == 1


class CompiledMixture:
    """`MixtureStep` whose chosen experts are one call.

    Args:
        block: whose mixture `routes_plainly` to a bank that `suits_compiled`.
        dtype: of the model.

    Shapes: x `[1, width]` float32 -> the same.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        assert block.moe is not None
        self.norm, self.choice = Norm(block.ffn_norm), Choice(block.moe.router)
        self.experts = CompiledBank(block.moe.experts)  # type: ignore[arg-type]
        self.shared = None if block.moe.shared is None else _shared(block.moe.shared, dtype)

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        row = self.norm(x)
        index, weight = self.choice(row)
        if self.shared is not None:
            x = self.shared(row, x)
        return self.experts(row, index, weight, x)


def _shared(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """`y = residual + f(row)` of a shared expert, by torch's operators where compiled steps do not know it."""
    if suits_compiled_network(module):
        return CompiledNetwork(module)
    plain = as_map(module, dtype)
    return lambda row, residual: residual + plain(row)


def suits_compiled_mixture(block: Block) -> bool:
    """Whether a `CompiledMixture` can be made of a block whose mixture `routes_plainly`."""
    return block.moe is not None and suits_compiled(block.moe.experts)


class CompiledDense:
    """A dense feed-forward network with its norm and residual connection as one call.

    Args:
        block: whose dense network `suits_compiled_network`.

    Shapes: x `[1, width]` float32 -> the same.
    """

    def __init__(self, block: Block) -> None:
        assert block.ffn is not None
        self.norm, self.network = Norm(block.ffn_norm), CompiledNetwork(block.ffn)

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        return self.network(self.norm(x), x)


def suits_compiled_dense(block: Block) -> bool:
    """Whether a `CompiledDense` can be made of a block."""
    return block.ffn is not None and suits_compiled_network(block.ffn)
