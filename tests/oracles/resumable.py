"""Training in two lives: what the second needs must have been in the checkpoint of the first.

Run as a program it is the second life: it reads every checkpoint of a folder, trains on, and writes how each ended.
"""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

import moestro
from moestro.data import Batch
from moestro.layers import MoE
from moestro.methods import Method, all_methods
from moestro.methods.registry import Option
from moestro.models import DecoderLM
from moestro.models.attention import GroupedQueryAttention
from moestro.models.decoder import Block
from moestro.models.initialise import initialise
from moestro.train.checkpoints import Checkpoints
from moestro.train.machine import choose_machine, repeatable
from moestro.train.optimiser import build_optimiser, set_learning_rate
from moestro.train.schedule import schedule
from moestro.train.seeds import seed_everything
from moestro.train.state import capture, restore
from moestro.train.step import Stepper

VOCAB, WIDTH, EXPERTS, HALF = 31, 8, 4, 3
SIZES = {"vocab_size": VOCAB, "num_domains": 2, "segment_length": 8}
GROUPS = {"num_groups": 2, "groups_kept": 2}
CLUSTERS = {"clusters": [token % EXPERTS for token in range(VOCAB)]}
TOGETHER: dict[tuple[str, str], dict[str, Any]] = {  # what an option is refused without
    ("deepseek-v2", "capacity_factor"): GROUPS,
    ("deepseek-v2", "device_balance"): GROUPS,
    ("deepseek-v2", "communication_balance"): GROUPS | {"groups_kept": 1},
    ("deepseekmoe", "device_balance"): {"num_devices": 2},
    ("ds-moe", "threshold"): {"top_k": None},
    ("hash-layers", "balanced"): {"frequencies": [1.0 + token for token in range(VOCAB)]},
    ("hash-layers", "clustered"): CLUSTERS,
    ("hash-layers", "dispersed"): CLUSTERS,
    ("locmoe", "locality"): {"num_devices": 2},
    ("task-moe", "sentence"): {"num_domains": 1},
    ("task-moe", "token"): {"num_domains": 1},
    ("routers-vision-study", "sinkhorn"): {"chooser": "token"},
}
MORE: dict[str, dict[str, Any]] = {  # parts that only a number brings in
    "gating-dropout": {"num_devices": 2, "rate": 0.5},
    "dense-softmax": {"branches": 2},
    "mmoe-ple": {"own_experts": 1},
    "moduleformer-mi": {"sampled": 1},
    "hash-layers": {"num_hashes": 2},
    "smile": {"num_nodes": 2},
}


@dataclass(frozen=True)
class Case:
    """A way to train, by what differs from the default."""

    method: str = "mixtral"
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)  # other settings of the training step
    schedule: str = "cosine"

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in {**self.options, **self.step}.items()]
        return " ".join([self.method, *words, *([] if self.schedule == "cosine" else [self.schedule])])


def all_cases() -> list[Case]:
    """Every method, every other kind of layer that its options make, every schedule and way to take a step."""
    methods = all_methods().values()
    cases = [Case(method.name) for method in methods]
    cases += [Case(method.name, options) for method in methods for options in other_options(method)]
    cases += [Case(name, options) for name, options in MORE.items()]
    steps: list[dict[str, Any]] = [{"accumulate": 2}, {"accumulate": 2, "statistics": "step"}, {"clip": 0.0}]
    steps += [{"precision": "bfloat16"}, {"precision": "float64"}, {"layers": "pooled"}]
    cases += [Case("deepseek-v3", step=step) for step in steps]
    return cases + [Case(schedule=name) for name in ("wsd", "constant")]


def other_options(method: Method) -> Iterator[dict[str, Any]]:
    """Options that make another layer: other words, switches, and what is off by default turned on."""
    for name, option in method.options.items():
        for value in _other_values(name, option):
            together = TOGETHER.get((method.name, name), TOGETHER.get((method.name, str(value)), {}))
            yield {name: value} | together


def _other_values(name: str, option: Option) -> list[Any]:
    if typing.get_origin(option.type) is typing.Literal:
        return [value for value in typing.get_args(option.type) if value != option.default]
    if option.type is bool:
        return [not option.default]
    if name.endswith(("_steps", "_updates")):
        return [HALF + 1]  # a phase that ends in the second life
    if option.default == 0 and option.type is float:
        return [1.0 if name == "capacity_factor" else 0.1]  # a tenth of a slot keeps nothing, which is refused
    return [1.0] if option.default is None and option.type == float | None else []


def fitting_options(method: Method) -> dict[str, Any]:
    """What a method needs to be this small."""
    options = {name: SIZES[name] for name in method.options if name in SIZES}
    if "top_k" in method.options and method.options["top_k"].default is not None:
        options["top_k"] = min(method.options["top_k"].default, 2)
    return options


class Life:
    """A model in training, from its first step or from a checkpoint."""

    def __init__(self, case: Case):
        self.machine = choose_machine("cpu", case.step.get("precision", "float32"), 1)
        self.model = build_model(case).to(self.machine.weights)
        self.optimiser = build_optimiser(self.model, learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95))
        self.log = moestro.RoutingLog(self.model, case.step.get("layers", "sum"))
        settings = {key: value for key, value in case.step.items() if key not in ("precision", "layers")}
        self.stepper = Stepper(self.model, self.optimiser, self.machine, self.log, **settings)
        self.share = schedule(case.schedule, steps=2 * HALF, warmup_fraction=0.3)
        self.losses: dict[int, list[float]] = {}
        seed_everything(5)

    def live(self, begin: int, end: int) -> Life:
        for step in range(begin, end):
            set_learning_rate(self.optimiser, 0.02 * self.share(step))
            result = self.stepper(batch_of(step), step + 1)
            self.losses[step] = [result.loss, result.auxiliary_loss, result.grad_norm, *result.named.values()]
        return self

    def ending(self) -> dict[str, str]:
        """How it ended, bit by bit: losses, all that a checkpoint holds, and whatever else the parts remember."""
        kept = capture(self.model, self.optimiser, 2 * HALF, 0.0)
        ended = {name: _digest(tensor) for name, tensor in kept.tensors.items()}
        ended |= {f"memory.{name}": value for name, value in memories(self.model)}
        ended |= {f"loss {step}": str([x.hex() for x in self.losses[step]]) for step in range(HALF, 2 * HALF)}
        return ended | {"numbers": xxhash.xxh3_128_hexdigest(json.dumps(kept.numbers).encode())}


def build_model(case: Case) -> DecoderLM:
    """Two layers of the method, causal or not."""
    method = all_methods()[case.method]
    seed_everything(3)
    options = fitting_options(method) | case.options
    moes = [
        moestro.build(case.method, width=WIDTH, hidden=8, num_experts=EXPERTS, bias=True, **options)
        for _ in range(2)
    ]
    blocks = [Block(GroupedQueryAttention(WIDTH, 2, 2, 4, "none", 1e-5), moe, WIDTH, 1e-5) for moe in moes]
    model = DecoderLM(
        VOCAB, blocks, WIDTH, max_length=8, rope_theta=100.0, eps=1e-5, tied_embeddings=True, config={}
    )
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():  # every part shall change what comes out
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (4, 9), generator=generator)
    domain = (tokens[:, :1] % 2).expand(4, 8).to(torch.uint8).contiguous()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), domain, 32)


def first_lives(cases: list[Case], folder: Path) -> dict[str, dict[str, str]]:
    """Train every case without a stop, and again until the middle, where it is saved; how the whole lives ended."""
    endings = {}
    with repeatable(choose_machine("cpu", "float32", 1)):
        for number, case in enumerate(cases):
            endings[case.name] = Life(case).live(0, 2 * HALF).ending()
            half = Life(case).live(0, HALF)
            (folder / str(number)).mkdir()
            Checkpoints(folder / str(number) / "checkpoint").save(capture(half.model, half.optimiser, HALF, 0.0))
    return endings


def second_lives(cases: list[Case], folder: Path) -> dict[str, dict[str, str]]:
    """Train every case on from its checkpoint; in another order, so that nothing is as it was by chance."""
    endings = {}
    with repeatable(choose_machine("cpu", "float32", 1)):
        for number, case in reversed(list(enumerate(cases))):
            life, checkpoint = Life(case), Checkpoints(folder / str(number) / "checkpoint").latest(print)
            assert checkpoint is not None
            restore(checkpoint, life.model, life.optimiser)
            endings[case.name] = life.live(HALF, 2 * HALF).ending()
    return endings


def memories(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What the parts of a model remember outside parameters and saved buffers: numbers and tensors, by place."""
    for name, module in model.named_modules():
        parts: dict[str, Any] = {"": module}
        if isinstance(module, MoE):
            parts |= {f"loss {title}": loss for title, (_, loss) in module.losses.items()}
            parts |= {f"controller {index}": each for index, each in enumerate(module.controllers)}
        for title, part in parts.items():
            for key, value in _remembered(part):
                yield f"{name} {title} {key}", value


def _remembered(part: Any) -> Iterator[tuple[str, str]]:
    for key, value in {**getattr(part, "__dict__", {}), **getattr(part, "_buffers", {})}.items():
        if isinstance(value, Tensor):
            yield key, _digest(value)
        elif isinstance(value, int | float | str | bool | None):
            yield key, repr(value)


def parts_of(model: nn.Module) -> Iterator[type]:
    """The kinds of everything that a model's layers are made of."""
    for module in model.modules():
        yield type(module)
        found: list[Any] = [*vars(module).values()]
        if isinstance(module, MoE):
            found += [loss for _, loss in module.losses.values()] + module.controllers
        for each in found:
            yield type(each)
            yield from (type(inner) for inner in getattr(each, "__dict__", {}).values())


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{list(tensor.shape)} {xxhash.xxh3_128_hexdigest(data)}"


if __name__ == "__main__":
    where, begin, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (where / "endings.json").write_text(json.dumps(second_lives(all_cases()[begin:end], where)))
