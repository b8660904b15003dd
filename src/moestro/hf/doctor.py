"""Which known defects of transformers a model and its configuration would meet in training, and what mends each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moestro.hf.experts import BACKEND
from moestro.hf.families import FoundLayer, find_layers
from moestro.hf.mends import copy_input, is_dead
from moestro.hf.watch import logs_of

ALIGNMENT = 16  # bytes that grouped_mm asks of every row
MANY_EXPERTS = 32


@dataclass(frozen=True)
class Finding:
    """A defect that training this model would meet.

    Attributes:
        name: of the defect.
        layers: names of the layers concerned.
        what: what happens.
        mend: the line of Python that mends it; `model` is the model.
    """

    name: str
    layers: tuple[str, ...]
    what: str
    mend: str


def diagnose(model: nn.Module, *, accumulation: int = 1) -> list[Finding]:
    """Look for known defects, without running the model.

    What a log of `moestro.watch` on the model takes care of is not reported.

    Args:
        model: a transformers model, of which no weight is read; it may be on the meta device.
        accumulation: micro-batches of an optimiser step in the training that is planned.

    Raises:
        ValueError: a model without mixture layers, or an accumulation below 1.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation={accumulation}, but a step has at least one micro-batch; pass 1 or more")
    layers = find_layers(model)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    found = [finding for check in CHECKS for finding in check(config, layers)]
    return [*found, *accumulated_loss(model, layers, accumulation)]


def diagnose_folder(folder: str | Path, *, accumulation: int = 1) -> list[Finding]:
    """`diagnose` the model of a folder from its `config.json` alone; no weight is read.

    Args:
        folder: with a `config.json`.
        accumulation: micro-batches of an optimiser step in the training that is planned.

    Raises:
        ValueError: no configuration there, one that needs code of its own, an unknown or a dense model.
    """
    return diagnose(model_without_weights(folder), accumulation=accumulation)


def model_without_weights(folder: str | Path) -> Any:
    """The model that a folder's `config.json` describes, on the meta device, in the dtypes that loading gives it.

    Raises:
        ValueError: see `diagnose_folder`.
    """
    import transformers

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; pass a model folder")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} describes no model that transformers knows: {error}") from None
    if hasattr(config, "auto_map"):
        raise ValueError(
            f"{path / 'config.json'} asks to run code of its own (auto_map); moestro runs none. If "
            "transformers has this architecture, remove the entry auto_map"
        )
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        raise ValueError(f"{path / 'config.json'} names {name}, which this transformers does not have")
    with torch.device("meta"):
        model = kind._from_config(config, dtype=config.dtype or torch.float32)
    exact = model._keep_in_fp32_modules_strict
    for parameter_or_buffer, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in parameter_or_buffer.split(".") for part in exact):
            tensor.data = tensor.data.float()
    return model


Layers = Mapping[str, FoundLayer]


def dead_router(config: Any, layers: Layers) -> Iterator[Finding]:
    """One expert per token and weights normalised over the chosen."""
    dead = tuple(name for name, layer in layers.items() if is_dead(layer))
    if dead:
        what = "each token has one expert whose normalised weight is always 1: the router gets no gradient"
        yield Finding("dead-router", dead, what, "moestro.hf.revive_routers(model)")


def loss_off(config: Any, layers: Layers) -> Iterator[Finding]:
    """A coefficient that nothing uses."""
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not coefficient or _watched(layers):
        return
    kind, mend = config.model_type, _mix_in(coefficient)
    if not _first(layers).family.own_loss:
        what = f"router_aux_loss_coef={coefficient:g} has no effect: transformers never computes a loss for {kind}"
        yield Finding("loss-missing", tuple(layers), what, mend)
    elif not getattr(config, "output_router_logits", False):
        what = f"router_aux_loss_coef={coefficient:g} has no effect while output_router_logits is off"
        yield Finding("loss-off", tuple(layers), what, mend)


def no_balance(config: Any, layers: Layers) -> Iterator[Finding]:
    """Neither a loss nor a bias."""
    first = _first(layers)
    nothing = not hasattr(config, "router_aux_loss_coef") and first.bias is None
    if nothing and not _watched(layers):
        what = f"nothing balances the experts: transformers has no balance loss for {config.model_type}"
        yield Finding("loss-missing", tuple(layers), what, _mix_in(0.001))


def pooled_loss(config: Any, layers: Layers) -> Iterator[Finding]:
    """transformers' own loss over all layers at once."""
    on = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0)
    if not on or not _first(layers).family.own_loss:
        return
    mend = f"model.config.output_router_logits = False; {_mix_in(config.router_aux_loss_coef)}"
    if len(layers) > 1:
        what = "the balance loss pools all layers: layers collapsed on different experts score as balanced"
        yield Finding("pooled-loss", tuple(layers), what, mend)
    what = (
        "its loss counts padding"
        if config.is_encoder_decoder
        else "its loss is NaN for a batch of padding and crashes with a 4-D attention mask"
    )
    yield Finding("loss-mask", tuple(layers), f"the balance loss is on and {what}", mend)


def bias_never_trained(config: Any, layers: Layers) -> Iterator[Finding]:
    """A selection bias that stays as it was loaded."""
    biased = tuple(name for name, layer in layers.items() if layer.bias is not None)
    moved = all(any(log.bias_rate is not None for log in logs_of(layers[name])) for name in biased)
    if biased and not moved and not _watched(layers):
        what = "transformers never moves the selection bias: routing drifts apart in training"
        mend = "log = moestro.watch(model, bias_rate=0.001)  # log.update_bias() after optimizer.step()"
        yield Finding("bias-untrained", biased, what, mend)


def bias_rounded(config: Any, layers: Layers) -> Iterator[Finding]:
    """A selection bias in half precision."""
    half = tuple(n for n, layer in layers.items() if layer.bias is not None and layer.bias.dtype.itemsize < 4)
    if half:
        kind = str(layers[half[0]].bias.dtype).removeprefix("torch.")  # type: ignore[union-attr]
        what = f"the selection bias is {kind}: updates of 0.001 are rounded away"
        yield Finding("bias-rounded", half, what, "moestro.hf.exact_bias(model)")


def unaligned_sizes(config: Any, layers: Layers) -> Iterator[Finding]:
    """Sizes that grouped_mm refuses."""
    if config._experts_implementation != "grouped_mm":
        return
    odd = tuple(name for name, layer in layers.items() if layer.family.honours_interface and _unaligned(layer))
    if odd:
        what = "the default experts (grouped_mm) crash: a size is no multiple of 16 bytes"
        yield Finding("unaligned-sizes", odd, what, "moestro.hf.use_experts(model)")


def slow_experts(config: Any, layers: Layers) -> Iterator[Finding]:
    """A Python loop whose backward is quadratic in the number of experts."""
    eager = config._experts_implementation == "eager"
    slow = tuple(
        name
        for name, layer in layers.items()
        if eager and layer.family.honours_interface and layer.num_experts >= MANY_EXPERTS
    )
    if slow:
        what = f"the eager experts' backward pass grows with the square of {layers[slow[0]].num_experts} experts"
        yield Finding("slow-experts", slow, what, "moestro.hf.use_experts(model)")


def deaf_experts(config: Any, layers: Layers) -> Iterator[Finding]:
    """A family where setting an experts implementation does nothing."""
    deaf = tuple(
        name
        for name, layer in layers.items()
        if config._experts_implementation == BACKEND and not layer.family.honours_interface and not _replaced(layer)
    )
    if deaf:
        what = f"set_experts_implementation has no effect on {config.model_type}: the eager experts run"
        yield Finding("deaf-experts", deaf, what, "moestro.hf.use_experts(model)")


def wrong_experts(config: Any, layers: Layers) -> Iterator[Finding]:
    """transformers' NLLB reads a mask as expert numbers."""
    wrong = tuple(n for n, layer in layers.items() if layer.family.name == "nllb_moe" and not _replaced(layer))
    if wrong:
        what = "only experts 0 and 1 ever run, whatever the router chose: its mask is read as expert numbers"
        yield Finding("wrong-experts", wrong, what, "moestro.hf.use_experts(model)")


def jitter(config: Any, layers: Layers) -> Iterator[Finding]:
    """Noise that is multiplied into the caller's tensor."""
    noisy = tuple(
        name
        for name, layer in layers.items()
        if layer.family.jitter is not None
        and attrgetter(layer.family.jitter)(layer.block) > 0
        and copy_input not in layer.block._forward_pre_hooks.values()
    )
    if noisy:
        what = "jitter in training multiplies its input in place, which also changes the caller's tensor"
        yield Finding("jitter-in-place", noisy, what, "moestro.hf.protect_inputs(model)")


def accumulated_loss(model: Any, layers: Layers, accumulation: int) -> Iterator[Finding]:
    """A language-model loss that accumulation multiplies, unless Trainer is told to divide it."""
    told = getattr(model, "accepts_loss_kwargs", True) is False
    if accumulation > 1 and _first(layers).family.drops_counts and not told:
        what = (
            "the model ignores num_items_in_batch: Trainer makes its loss and gradient "
            f"{accumulation} times as large in {accumulation} accumulation steps"
        )
        yield Finding("accumulated-loss", tuple(layers), what, "model.accepts_loss_kwargs = False")


CHECKS: tuple[Callable[[Any, Layers], Iterator[Finding]], ...] = (
    wrong_experts,
    dead_router,
    loss_off,
    no_balance,
    pooled_loss,
    bias_never_trained,
    bias_rounded,
    unaligned_sizes,
    deaf_experts,
    slow_experts,
    jitter,
)


def _first(layers: Layers) -> FoundLayer:
    return next(iter(layers.values()))


def _watched(layers: Layers) -> bool:
    return all(logs_of(layer) for layer in layers.values())


def _mix_in(coefficient: float) -> str:
    return (
        f"Trainer(..., balance={coefficient:g})  # class Trainer(moestro.hf.BalancedTrainer, transformers.Trainer)"
    )


def _replaced(layer: FoundLayer) -> bool:
    """Whether `use_experts` has put our forward on this layer."""
    return "forward" in layer.experts.__dict__ or "forward" in layer.block.__dict__


def _unaligned(layer: FoundLayer) -> bool:
    return any(
        size * weight.element_size() % ALIGNMENT
        for weight in layer.experts.parameters()
        if weight.dim() == 3
        for size in weight.shape[1:]
    )
