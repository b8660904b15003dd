"""Of what a decoder is built: for every layer a step of its attention and one of its feed-forward part."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from moestro.inference.attention_step import CachedAttention, ModuleAttention
from moestro.inference.feed_forward_step import MixtureStep, ModuleStep, routes_plainly
from moestro.inference.moment import Moment
from moestro.inference.single_row import Map, as_map
from moestro.models import Block, DecoderLM, GroupedQueryAttention
from moestro.models.cache import LayerCache

Step = Callable[[Tensor, Moment], Tensor]


class TorchSteps:
    """Short programs of torch's operators.

    Args:
        model: one that `suits_decoder`.
    """

    def __init__(self, model: DecoderLM) -> None:
        self.dtype = model.embedding.weight.dtype
        mixtures = [block.moe for block in model.blocks if block.moe is not None]
        # all or none: a router that reads the decision of the layer before needs that there is one
        self.plain = all(map(routes_plainly, mixtures))

    def map(self, module: nn.Module) -> Map:
        return as_map(module, self.dtype)

    def attention(self, block: Block, memory: LayerCache) -> Step:
        short = type(block.attention) is GroupedQueryAttention and block.attention.plain
        return (CachedAttention if short else ModuleAttention)(block, memory, self.dtype)

    def feed_forward(self, block: Block) -> Step:
        return (MixtureStep if self.plain and block.moe is not None else ModuleStep)(block, self.dtype)


class CompiledSteps:
    """Machine code that numba makes, see `moestro.kernels.compiled`; torch's steps for what it does not know.

    Args:
        model: one that `suits_decoder`.
    """

    def __init__(self, model: DecoderLM) -> None:
        from moestro.inference import compiled_step

        self.kinds, self.torch = compiled_step, TorchSteps(model)

    def compiles_attention(self, block: Block) -> bool:
        return self.kinds.suits_compiled_attention(block)

    def compiles_feed_forward(self, block: Block) -> bool:
        if block.ffn is not None:
            return self.kinds.suits_compiled_dense(block)
        return self.torch.plain and self.kinds.suits_compiled_mixture(block)

    def map(self, module: nn.Module) -> Map:
        if self.kinds.linear_matrix(module) is None:
            return self.torch.map(module)
        return self.kinds.CompiledMap(module)  # type: ignore[arg-type]

    def attention(self, block: Block, memory: LayerCache) -> Step:
        if not self.compiles_attention(block):
            return self.torch.attention(block, memory)
        return self.kinds.CompiledAttention(block, memory)

    def feed_forward(self, block: Block) -> Step:
        if not self.compiles_feed_forward(block):
            return self.torch.feed_forward(block)
        if block.ffn is not None:
            return self.kinds.CompiledDense(block)
        return self.kinds.CompiledMixture(block, self.torch.dtype)


STEPS: dict[str, type[TorchSteps] | type[CompiledSteps]] = {"torch": TorchSteps, "compiled": CompiledSteps}
