"""The experts of a folder, found, counted and measured before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.hf.layouts.folder import StockFolder
from moestro.hf.layouts.forms import Shape, Slot
from moestro.hf.layouts.table import LAYOUTS, STOCK, Family, Store

MARK = "moestro_layout"  # in config.json, when the layout is none that transformers has
MAX_EXPERTS = 1_000_000


@dataclass(frozen=True)
class Bank:
    """The experts of one layer.

    Attributes:
        layer: prefix of the layer's names.
        store: where and how they are kept.
        num_experts: experts that compute.
        hollow: further experts with gate and up matrices that are never used.
        shapes: of the matrices of one expert, `[out, in]`, by matrix.
        dtypes: by matrix.
    """

    layer: str
    store: Store
    num_experts: int
    hollow: int
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]

    @property
    def experts(self) -> range:
        """All experts that have any tensor, the hollow ones last."""
        return range(self.num_experts + self.hollow)

    def count(self, slot: Slot) -> int:
        """Experts that have this tensor."""
        return self.num_experts + (self.hollow if slot.holds[0] in ("gate", "up") else 0)

    def tensors(self, slot: Slot) -> list[str]:
        """Names on disk: one, or one per expert."""
        name = f"{self.layer}{self.store.block}{slot.name}"
        return [name] if slot.stacked else [name.format(expert=expert) for expert in range(self.count(slot))]

    def names(self) -> set[str]:
        return {name for slot in self.store.form for name in self.tensors(slot)}

    def within(self, store: Store) -> Bank:
        """The same experts kept elsewhere."""
        return Bank(self.layer, store, self.num_experts, self.hollow, self.shapes, self.dtypes)

    def read(self, folder: StockFolder, expert: int) -> dict[str, np.ndarray]:
        """The matrices of one expert as `[out, in]`."""
        matrices: dict[str, np.ndarray] = {}
        for slot in self.store.form:
            if expert >= self.count(slot):
                continue
            names = self.tensors(slot)
            share = folder.read(names[0], expert) if slot.stacked else folder.read(names[expert])
            matrices |= dict(zip(slot.holds, slot.unpack(share), strict=True))
        return matrices


def find_banks(folder: StockFolder, family: Family) -> tuple[str, list[Bank]]:
    """The layout of a folder and the experts of all its layers, complete and of the right sizes.

    Raises:
        ValueError: an expert's tensor, a router or a layer is missing, doubled, one too many or mis-shaped; or
            the experts are quantised.
    """
    layout = _find_layout(folder, family)
    return layout, _banks(folder, family, layout)


def _find_layout(folder: StockFolder, family: Family) -> str:
    marked = folder.config.get(MARK)
    if marked is not None:
        if marked not in LAYOUTS:
            raise ValueError(f"config.json says {MARK}={marked!r}; expected one of {', '.join(LAYOUTS)}")
        return str(marked)
    found = {name: _matches(folder, family, name) for name in STOCK if name in family.stores}
    best = max(found, key=lambda name: found[name])
    if not found[best]:
        raise ValueError(
            f"{folder.path} is a {family.model_type} folder but none of its {len(folder.tensors)} tensors is an "
            f"expert's, for example {_example(family)}"
        )
    others = [name for name, count in found.items() if count and family.stores[name] != family.stores[best]]
    if others:
        double = next(name for name in sorted(folder.tensors) if _pattern(family, others[0]).fullmatch(name))
        raise ValueError(
            f"{folder.path} holds experts twice, as {best} and as {others[0]} ({double}); remove one of them"
        )
    return best


def _example(family: Family) -> str:
    store, stack = family.stores["transformers"], family.stacks[0]
    return (stack.prefix + store.block + store.form[0].name).format(layer=0, expert=0)


def _matches(folder: StockFolder, family: Family, layout: str) -> int:
    pattern = _pattern(family, layout)
    return sum(pattern.fullmatch(name) is not None for name in folder.tensors)


def _pattern(family: Family, layout: str) -> re.Pattern[str]:
    """Any tensor of any expert in a layout."""
    store = family.stores[layout]
    names = [stack.prefix + store.block + slot.name for stack in family.stacks for slot in store.form]
    return re.compile("|".join(_regex(name) for name in names))


def _regex(name: str) -> str:
    return re.escape(name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")


def _banks(folder: StockFolder, family: Family, layout: str) -> list[Bank]:
    _refuse_quantised(folder)
    banks = []
    for stack in family.stacks:
        number = _whole(folder, stack.layers)
        further = _further_layers(folder, stack.prefix, number)
        for layer in [*range(number), *further]:
            bank = _layer_bank(folder, family, layout, stack.prefix.format(layer=layer), stack.hidden)
            banks += [bank] if bank else []
    if not banks:
        raise ValueError(f"{folder.path} has no layer with experts")
    return banks


def _whole(folder: StockFolder, key: str, least: int = 1) -> int:
    value = folder.config.get(key)
    if type(value) is not int or not least <= value <= MAX_EXPERTS:
        raise ValueError(f"config.json says {key}={value!r}; expected a whole number from {least} to {MAX_EXPERTS}")
    return value


def _expert_key(folder: StockFolder, family: Family) -> str:
    """transformers writes some counts under another name than the one that releases have."""
    keys = (family.experts, "num_local_experts", "num_experts")
    return next((key for key in keys if key in folder.config), family.experts)


def _layer_bank(folder: StockFolder, family: Family, layout: str, layer: str, hidden: str) -> Bank | None:
    """The experts of a layer, or None if it is dense."""
    store = family.stores[layout]
    here = [name for name in folder.tensors if name.startswith(layer + store.block)]
    if not here:
        raise ValueError(f"{folder.path} has no tensor {layer}{store.block}*; a layer is missing")
    if not any("expert" in name or name == layer + store.block + store.router for name in here):
        return None
    num_experts = _whole(folder, _expert_key(folder, family))
    hollow = 0 if family.hollow is None else _whole(folder, family.hollow, 0)
    shapes = expert_shapes(_whole(folder, family.width), _whole(folder, hidden), family.gated, family.biased)
    bank = Bank(layer, store, num_experts, hollow, shapes, {})
    _check_names(folder, bank, here)
    dtypes: dict[str, str] = {}
    for slot in store.form:
        dtype = _check_shapes(folder, bank, slot)
        dtypes |= dict.fromkeys(slot.holds, dtype)
    return Bank(layer, store, num_experts, hollow, shapes, dtypes)


def expert_shapes(width: int, hidden: int, gated: bool, biased: bool) -> dict[str, Shape]:
    """Shapes of the matrices and biases of one expert, by name."""
    shapes: dict[str, Shape] = {"gate": (hidden, width)} if gated else {}
    shapes |= {"up": (hidden, width), "down": (width, hidden)}
    return shapes | ({f"{name}_bias": shape[:1] for name, shape in shapes.items()} if biased else {})


def _check_names(folder: StockFolder, bank: Bank, here: Sequence[str]) -> None:
    wanted = bank.names()
    missing = sorted(wanted - set(here), key=natural_key)
    if missing:
        raise ValueError(
            f"{folder.path} lacks {len(missing)} of the {len(wanted)} expert tensors of "
            f"{bank.layer.rstrip('.')}: {missing[0]}"
        )
    router = bank.layer + bank.store.block + bank.store.router
    if router not in folder.tensors:
        raise ValueError(f"{folder.path} lacks the router of {bank.layer.rstrip('.')}: {router}")
    shape = folder.tensors[router].shape
    if shape[0] != bank.num_experts + bank.hollow:
        raise ValueError(f"{router} has shape {list(shape)} but config.json says {bank.num_experts} experts")
    extra = sorted((name for name in here if ".experts." in name and name not in wanted), key=natural_key)
    if extra:
        raise ValueError(
            f"{folder.path} holds {extra[0]}, but config.json says {bank.num_experts} experts and nothing else "
            "belongs there"
        )


def _check_shapes(folder: StockFolder, bank: Bank, slot: Slot) -> str:
    """All tensors of a slot have the shape that config.json describes, and one dtype, which is returned."""
    shape = slot.shape(bank.shapes)
    if slot.stacked:
        shape = (bank.count(slot), *shape)
    names = bank.tensors(slot)
    first = folder.tensors[names[0]].dtype
    for name in names:
        entry = folder.tensors[name]
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {list(entry.shape)} but config.json describes {list(shape)}")
        if entry.dtype != first:
            raise ValueError(f"{name} has dtype {entry.dtype} but {names[0]} has {first}; expected the same")
    return first


def _refuse_quantised(folder: StockFolder) -> None:
    method = folder.config.get("quantization_config")
    if isinstance(method, dict):
        raise ValueError(
            f"{folder.path} is quantised ({method.get('quant_method', 'unknown method')}); its experts are not "
            "plain matrices, so dequantise it first"
        )


def _further_layers(folder: StockFolder, prefix: str, number: int) -> list[int]:
    """Layers behind the last one that predict further tokens; transformers ignores them, we take them along."""
    pattern = re.compile(re.escape(prefix).replace(r"\{layer\}", r"(\d{1,9})") + ".*")
    matches = [pattern.fullmatch(name) for name in folder.tensors]
    found = {int(match[1]): match[0] for match in matches if match and int(match[1]) >= number}
    allowed = folder.config.get("num_nextn_predict_layers") or folder.config.get("num_mtp_layers") or 0
    for layer, name in found.items():
        if layer >= number + allowed:
            raise ValueError(
                f"{folder.path} holds {name}, but config.json says {number} layers (0 to {number - 1})"
            )
    return sorted(found)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort expert 2 before expert 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
