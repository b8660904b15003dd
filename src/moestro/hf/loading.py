"""Stock folders into our layers and back, and between our own layout and the stock ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moestro.hf.layouts import FAMILIES, StockFolder, find_banks, find_family
from moestro.hf.layouts.bank import Bank
from moestro.hf.layouts.forms import Slot
from moestro.hf.layouts.relayout import Progress, beside_names, copy_beside, write_json
from moestro.hf.layouts.writer import NewTensor, ShardWriter
from moestro.hf.stock import stock_arguments
from moestro.models import DecoderLM, SavedModel, build_language_model, save_model
from moestro.models.folder import model_config
from moestro.models.layouts import LAYOUTS, Choice, Layout, choose_layout
from moestro.models.layouts.rules import Rule
from moestro.models.staging import write_folder

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ONE_FILE = 2**62  # bytes: `load_model` reads models of one file


def load(path: str | Path) -> DecoderLM:
    """A moestro language model with the weights of a folder of transformers, in evaluation mode on the CPU.

    Every family of `moestro.hf.stock_blocks.ARGUMENTS`, in any layout of its experts (see `moestro.hf.layouts`),
    and folders that moestro saved.

    Args:
        path: the folder.

    Raises:
        ValueError: a family whose block we do not have, a setting that our layers do not compute, a tensor that is
            missing, one too many or mis-shaped, or a folder that is not safe to read.
    """
    with StockFolder(path) as folder:
        model = build_language_model(**_arguments(folder))
        layout = _layout(folder, model)
        rules, tensors = layout.rules(model), StockTensors(folder)
        _check_names(rules, tensors, model)
        model.to(tensors.dtype)
        state = model.state_dict()
        for rule in rules:
            for name, tensor in zip(rule.ours, _ours(rule, tensors, state), strict=True):
                state[name].copy_(tensor)
    return model.eval()


def save_pretrained(model: DecoderLM, folder: str | Path, like: str | Path | None = None) -> SavedModel:
    """Write a model so that stock transformers opens it where its architecture is a stock one.

    Args:
        model: the model.
        folder: where; a model that is there already is replaced.
        like: a folder, usually the one it was loaded from, whose tokenizer, templates and further settings go
            along.

    Raises:
        ValueError: `folder` exists and holds something else than a model.
    """
    if like is None:
        return save_model(model, folder)
    with StockFolder(like) as source, write_folder(Path(folder)) as staging:
        saved = save_model(model, staging / "model")
        config = json.loads((staging / "model/config.json").read_text(encoding="utf-8"))
        if source.model_type == config["model_type"]:
            special = {key: source.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = {**source.config, **config, **special}
        write_json(staging / "model/config.json", config)
        for path in (staging / "model").iterdir():
            path.rename(staging / path.name)
        (staging / "model").rmdir()
        copy_beside(source, staging)
    return SavedModel(Path(folder), saved.layout, saved.reason, saved.stock)


class StockTensors(Mapping[str, Tensor]):
    """The tensors of a folder under the names of the stock layout, read when asked for.

    Args:
        folder: in any layout of its experts.
    """

    def __init__(self, folder: StockFolder):
        self.folder = folder
        self._plain = {name: name for name in folder.tensors}
        self._experts: dict[str, tuple[Bank, int | None, Slot]] = {}
        if folder.model_type in FAMILIES:
            self._find_experts()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which must be one."""
        kinds = sorted({entry.dtype for entry in self.folder.tensors.values() if entry.dtype in DTYPES})
        told = str(self.folder.config.get("dtype") or self.folder.config.get("torch_dtype"))
        if len(kinds) == 1:
            return DTYPES[kinds[0]]
        named = getattr(torch, told.removeprefix("torch."), None)
        if named in CODES:
            return named  # norms or biases of another dtype than the rest
        raise ValueError(
            f"{self.folder.path} holds tensors of {', '.join(kinds)} and names no dtype in config.json"
        )

    def __getitem__(self, name: str) -> Tensor:
        if name in self._experts:
            bank, expert, slot = self._experts[name]
            experts = range(bank.count(slot)) if expert is None else [expert]
            shares = [self._share(bank, each, slot) for each in experts]
            return _tensor(np.stack(shares) if expert is None else shares[0], bank.dtypes[slot.holds[0]])
        source = self._plain[name]
        return _tensor(self.folder.read(source), self.folder.tensors[source].dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._experts

    def __len__(self) -> int:
        return len(self._plain) + len(self._experts)

    def _share(self, bank: Bank, expert: int, slot: Slot) -> np.ndarray:
        """What an expert takes in a tensor of the stock layout."""
        matrices = bank.read(self.folder, expert)
        return slot.pack([matrices[matrix] for matrix in slot.holds])

    def _find_experts(self) -> None:
        family = find_family(self.folder.model_type, self.folder.tensors)
        _, banks = find_banks(self.folder, family)
        names = beside_names(self.folder, family, banks, "transformers")
        self._plain = {new: old for old, new in names.items()}
        for bank in banks:
            stock = bank.within(family.stores["transformers"])
            for slot in stock.store.form:
                for expert, name in enumerate(stock.tensors(slot)):
                    self._experts[name] = (bank, None if slot.stacked else expert, slot)


def to_own_layout(folder: StockFolder, target: Path, progress: Progress) -> int:
    """Write a stock folder in our own layout, a tensor in memory at a time; the number of tensors.

    Raises:
        ValueError: see `load`.
    """
    return _rewrite(folder, target, Choice(LAYOUTS["moestro"], "asked for"), progress)


def to_stock_layout(folder: StockFolder, target: Path, progress: Progress) -> int:
    """Write a folder in our own layout as a stock one; the number of tensors.

    Raises:
        ValueError: no stock architecture computes this model, with the reasons.
    """
    with torch.device("meta"):
        choice = choose_layout(build_language_model(**_arguments(folder)))
    if choice.layout.architecture is None:
        raise ValueError(f"no architecture of transformers computes this model: {choice.reason}")
    return _rewrite(folder, target, choice, progress)


def _rewrite(folder: StockFolder, target: Path, choice: Choice, progress: Progress) -> int:
    with torch.device("meta"):  # shapes and names only
        model = build_language_model(**_arguments(folder))
    before, tensors = _layout(folder, model).rules(model), StockTensors(folder)
    _check_names(before, tensors, model)
    model.to(tensors.dtype)
    after = list(choice.layout.rules(model))
    new = list(new_tensors(after, model.state_dict()))
    eos = folder.config.get("eos_token_id")
    write_json(target / "config.json", model_config(model, choice, eos if isinstance(eos, int) else None))
    copy_beside(folder, target)
    done, total = 0, sum(tensor.nbytes for tensor in new)
    with ShardWriter(target, new, ONE_FILE) as writer:
        for theirs, part in _rejoined(before, after, tensors, model.state_dict()):
            data = part.contiguous().reshape(-1).view(torch.uint8).numpy()
            writer.write(theirs, data.data)
            done += data.nbytes
            progress(done, total)
    return len(new)


def _rejoined(
    before: Iterable[Rule], after: Iterable[Rule], tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layout from those of another; what one rule needs of ours is in memory at a time."""
    rules = {name: rule for rule in before for name in rule.ours}
    ours: dict[str, Tensor] = {}
    for rule in after:
        for name in rule.ours:
            if name not in ours:
                source = rules[name]
                ours |= dict(zip(source.ours, _ours(source, tensors, state), strict=True))
        parts = rule.split([ours.pop(name) for name in rule.ours])
        yield from zip(rule.theirs, parts, strict=True)


def new_tensors(rules: Iterable[Rule], state: Mapping[str, Tensor]) -> Iterator[NewTensor]:
    for rule in rules:
        parts = rule.split([state[name] for name in rule.ours])
        yield from (
            NewTensor(name, CODES[part.dtype], tuple(part.shape))
            for name, part in zip(rule.theirs, parts, strict=True)
        )


def _arguments(folder: StockFolder) -> dict[str, Any]:
    """Those that moestro noted when it saved the folder, else those of the stock configuration."""
    noted = folder.config.get("moestro")
    if isinstance(noted, dict) and isinstance(noted.get("arguments"), dict):
        return noted["arguments"]
    try:
        return stock_arguments(folder.config)
    except KeyError as error:
        raise ValueError(f"config.json of {folder.path} lacks {error.args[0]!r}") from None


def _layout(folder: StockFolder, model: DecoderLM) -> Layout:
    layout = LAYOUTS[folder.model_type]
    misfit = layout.why_not(model)
    if misfit is not None:
        raise ValueError(f"{folder.path} is no {layout.name} that our layers compute: {misfit}")
    return layout


def _check_names(rules: Iterable[Rule], tensors: StockTensors, model: DecoderLM) -> None:
    wanted = {name for rule in rules for name in rule.theirs}
    tied = {"lm_head.weight", "head.weight"} if model.config["tied_embeddings"] else set()
    for problem, names in (
        ("lacks", wanted - set(tensors)),
        ("has no place in our layers for", set(tensors) - wanted),
    ):
        if names - tied:
            raise ValueError(f"{tensors.folder.path} {problem} {min(names - tied)}")


def _ours(rule: Rule, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[Tensor]:
    """What a rule makes of their tensors, of the shapes and dtypes that the model has."""
    found = list(rule.join([tensors[name] for name in rule.theirs]))
    for name, tensor in zip(rule.ours, found, strict=True):
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{rule.theirs[0]} makes {name} of shape {list(tensor.shape)}, but config.json describes "
                f"{list(state[name].shape)}"
            )
    return [tensor.to(state[name].dtype) for name, tensor in zip(rule.ours, found, strict=True)]


def _tensor(bits: np.ndarray, dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"moestro's layers take {', '.join(DTYPES)}, not {dtype}")
    flat = torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(np.uint8))
    return flat.view(DTYPES[dtype]).reshape(bits.shape)
