"""Recognising the routing of stock architectures by its parts, whatever method put them together."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.models.decoder import DecoderLM
from moestro.routers import (
    Biased,
    BiasedSelection,
    Dropless,
    GroupLimitedTopK,
    Linear,
    NoNoise,
    Renormalised,
    Router,
    Scaled,
    SparseMixer,
    TokenChoice,
    TopK,
    as_is,
    sigmoid,
    softmax,
    softmax_over_selected,
)


@dataclass(frozen=True)
class SoftmaxTopK:
    """Softmax over all experts, the k highest of them, weights raw or normalised to one."""

    top_k: int
    normalised: bool


@dataclass(frozen=True)
class BiasedSigmoidTopK:
    """Sigmoid scores, chosen with a bias within groups, normalised to a constant: DeepSeek-V3."""

    top_k: int
    num_groups: int
    groups_kept: int
    scale: float


@dataclass(frozen=True)
class GroupedSoftmaxTopK:
    """Softmax over all experts, the k highest within the best groups, times a constant: DeepSeek-V2."""

    top_k: int
    num_groups: int
    groups_kept: int
    scale: float


@dataclass(frozen=True)
class BiasedLogitsTopK:
    """Logits with a learned bias, the k highest, weighed by a softmax over them: gpt-oss."""

    top_k: int


@dataclass(frozen=True)
class BiasedSoftmaxTopK:
    """Softmax over all experts, chosen with a bias, weights normalised to one: ERNIE 4.5."""

    top_k: int


@dataclass(frozen=True)
class SparseMixing:
    """One choice after another, each weighed among the experts close to it: Phi-3.5-MoE."""

    top_k: int
    epsilon: float


def biased_logits_top_k(model: DecoderLM) -> BiasedLogitsTopK | None:
    """The routing of all MoE layers if it is gpt-oss's, the same everywhere, and else None."""
    found = {_biased_logits_top_k(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def biased_softmax_top_k(model: DecoderLM) -> BiasedSoftmaxTopK | None:
    """The routing of all MoE layers if it is ERNIE 4.5's, the same everywhere, and else None."""
    found = {_biased_softmax_top_k(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def sparse_mixing(model: DecoderLM) -> SparseMixing | None:
    """The routing of all MoE layers if it is Phi-3.5-MoE's, the same everywhere, and else None."""
    found = {_sparse_mixing(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def softmax_top_k(model: DecoderLM) -> SoftmaxTopK | None:
    """The routing of all MoE layers if it is softmax top-k, the same everywhere, and else None."""
    found = {_softmax_top_k(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def biased_sigmoid_top_k(model: DecoderLM) -> BiasedSigmoidTopK | None:
    """The routing of all MoE layers if it is DeepSeek-V3's, the same everywhere, and else None."""
    found = {_biased_sigmoid_top_k(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def grouped_softmax_top_k(model: DecoderLM) -> GroupedSoftmaxTopK | None:
    """The routing of all MoE layers if it is DeepSeek-V2's, the same everywhere, and else None."""
    found = {_grouped_softmax_top_k(router) for router in _routers(model)}
    return found.pop() if len(found) == 1 else None


def _routers(model: DecoderLM) -> list[Router]:
    return [block.moe.router for block in model.blocks if block.moe is not None]


def _plain(router: Router, scorer: type = Linear) -> TokenChoice | None:
    """A linear scorer without noise in front and nobody dropped behind."""
    if type(router) is not TokenChoice or type(router.scorer) is not scorer:
        return None
    return router if isinstance(router.noise, NoNoise) and isinstance(router.capacity, Dropless) else None


def _softmax_top_k(router: Router) -> SoftmaxTopK | None:
    plain = _plain(router)
    if plain is None or plain.gate is not softmax or type(plain.select) is not TopK:
        return None
    if plain.weigh is as_is:
        return SoftmaxTopK(plain.select.k, normalised=False)
    normalised = plain.weigh is softmax_over_selected or plain.weigh == Renormalised()
    return SoftmaxTopK(plain.select.k, normalised=True) if normalised else None


def _biased_logits_top_k(router: Router) -> BiasedLogitsTopK | None:
    plain = _plain(router, Biased)
    if plain is None or type(plain.scorer.scorer) is not Linear:
        return None
    fits = plain.gate is softmax and type(plain.select) is TopK and plain.weigh is softmax_over_selected
    return BiasedLogitsTopK(plain.select.k) if fits else None


def _biased_softmax_top_k(router: Router) -> BiasedSoftmaxTopK | None:
    plain = _plain(router)
    if plain is None or plain.gate is not softmax or type(plain.select) is not BiasedSelection:
        return None
    fits = type(plain.select.select) is TopK and plain.weigh == Renormalised()
    return BiasedSoftmaxTopK(plain.select.k) if fits else None


def _sparse_mixing(router: Router) -> SparseMixing | None:
    if type(router) is not SparseMixer or type(router.scorer) is not Linear:
        return None
    return SparseMixing(int(router.top_k), router.epsilon)


def _biased_sigmoid_top_k(router: Router) -> BiasedSigmoidTopK | None:
    plain = _plain(router)
    if plain is None or plain.gate is not sigmoid or type(plain.select) is not BiasedSelection:
        return None
    groups, weigh = plain.select.select, plain.weigh
    if type(groups) is not GroupLimitedTopK or type(weigh) is not Renormalised:
        return None
    if groups.num_groups > 1 and groups.best_of != 2:
        return None
    return BiasedSigmoidTopK(groups.k, groups.num_groups, groups.groups_kept, weigh.scale)


def _grouped_softmax_top_k(router: Router) -> GroupedSoftmaxTopK | None:
    plain = _plain(router)
    if plain is None or plain.gate is not softmax or type(plain.weigh) is not Scaled:
        return None
    groups = plain.select
    if type(groups) is not GroupLimitedTopK or (groups.num_groups > 1 and groups.best_of != 1):
        return None
    return GroupedSoftmaxTopK(groups.k, groups.num_groups, groups.groups_kept, plain.weigh.scale)
