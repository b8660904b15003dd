"""A layer spread over ranks against the same layer in one process, whose experts run one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from tempfile import gettempdir
from typing import Any

import torch
import torch.distributed as dist
from oracles.layer import run_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moestro
from moestro.balance import Loss, RoutingLog
from moestro.experts.parallel import parallel_banks
from moestro.layers import Gradients, spread
from moestro.parallel import Mesh, MeshShape, Placement, Transport
from moestro.parallel.restore import Files, strategies
from moestro.parallel.transports import Adaptive, Chunked, DropCopies, Granular, Measured, Pairwise, Shadow
from moestro.routing import Context

VOCAB, WIDTH, HIDDEN, EXPERTS, CLIP = 31, 8, 4, 8, 0.25
TOKENS = {2: (7, 0), 4: (5, 0, 9, 3)}  # of each rank that sees tokens of its own
# the sizes of a mesh, ranks per node, and for replicas the expert of every slot
MESHES: dict[str, tuple[dict[str, int], int]] = {
    "expert=2": ({"expert": 2}, 1),
    "data=2": ({"data": 2}, 1),
    "expert=4": ({"expert": 4}, 2),
    "data=2 expert=2": ({"data": 2, "expert": 2}, 1),
    "expert=2 tensor=2": ({"expert": 2, "tensor": 2}, 2),
    "tensor=4": ({"tensor": 4}, 2),
    "expert=2 tensor=2 copies=2": ({"expert": 2, "tensor": 2, "copies": 2}, 2),
    "expert=4 copies=2": ({"expert": 4, "copies": 2}, 2),
    "data=2 expert=2 copies=2": ({"data": 2, "expert": 2, "copies": 2}, 2),
}
REPLICAS = Placement((3, 1, 7, 0, 0, 2, 5, 3, 4, 6, 3, 1), EXPERTS, 4)


@dataclass(frozen=True)
class Scene:
    """What is run.

    Attributes:
        method: name of the layer.
        transport: name, or "pairwise 2" for groups of two, "drop-copies TRANSPORT",
            "adaptive DEGREE TRANSPORT" or "chunked STRATEGY".
        mesh: a key of MESHES.
        parts: micro-batches of each rank.
        again: whether the layer is activation-checkpointed.
        tilt: whether the router's weights favour one expert.
        replicas: whether experts have replicas.
    """

    method: str
    transport: str
    mesh: str
    parts: int = 1
    again: bool = False
    tilt: bool = False
    replicas: bool = False

    @property
    def shape(self) -> MeshShape:
        return MeshShape(**MESHES[self.mesh][0])

    @property
    def question(self) -> Scene:
        """The part of the scene that the answer depends on."""
        return replace(self, transport="", mesh=f"tokens of {self.shape.dense} ranks", again=False, replicas=False)

    def make_transport(self) -> str | Transport:
        name, *rest = self.transport.split()
        if rest and rest[0].isdigit() and name == "pairwise":
            return Pairwise(int(rest[0]))
        if name == "shadow" and rest:
            return Shadow(bandwidth=float(rest[0]))
        if name in ("chunked", "pairwise") and rest:
            return {"chunked": Chunked, "pairwise": Pairwise}[name](2, strategies(Files(gettempdir()))[rest[0]])
        if name == "adaptive" and rest:
            return Adaptive(*rest[1:], degree=int(rest[0]))
        if name == "measured":
            return Measured(repeats=1)
        if name == "granular":
            return Granular(memory=int(rest[0]) if rest else None, store=Files(gettempdir()), repeats=1)
        return DropCopies(rest[0]) if rest else name


class Net(nn.Module):
    """A layer between two dense ones."""

    def __init__(self, scene: Scene, experts_bias: bool = True) -> None:
        super().__init__()
        options: dict[str, Any] = {}
        for name, option in moestro.all_methods()[scene.method].options.items():
            if name == "vocab_size":
                options[name] = VOCAB
            elif name == "num_domains":
                options[name] = 2
            elif name == "top_k" and option.default is not None:
                options[name] = min(option.default, 3)
            elif name == "segment_length":
                options[name] = 12
        torch.manual_seed(0)
        sizes = {"width": WIDTH, "hidden": HIDDEN, "bias": experts_bias, **options}
        more = moestro.build(scene.method, num_experts=EXPERTS, **sizes).experts.num_experts - EXPERTS
        self.moe = moestro.build(scene.method, num_experts=EXPERTS - more, **sizes)  # trivial ones count too
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(self.moe.experts.out_width, WIDTH)
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim():
                    parameter.normal_(0, 0.5)
            for parameter in self.moe.router.parameters() if scene.tilt else ():
                if parameter.dim() == 2:
                    parameter.zero_()
                    parameter[0] = 1.0
        self.again = False

    def forward(self, x: Tensor, context: Context, slow: bool = False) -> Tensor:
        h = self.before(x)
        if slow:
            decision = self.moe.route(h, context)
            valid = decision.notes.get("valid")
            y = run_layer(self.moe, h if valid is None else h.masked_fill(~valid.unsqueeze(1), 0), decision)
        elif self.again:
            y = checkpoint(self.moe, h, context, use_reentrant=False)
        else:
            y = self.moe(h, context)
        return self.after(y)


@dataclass
class Part:
    """One micro-batch. Ranks draw the same random numbers: some routers let rank 0 draw for all."""

    seed: int
    x: Tensor
    context: Context


def parts_of(scene: Scene, shard: int) -> list[Part]:
    """The micro-batches of one rank's tokens."""
    tokens = TOKENS[4 if scene.shape.ranks == 4 else 2][shard]
    generator = torch.Generator().manual_seed(shard)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64) + 3 * scene.tilt
    ids = torch.randint(VOCAB, (tokens,), generator=generator)
    found = []
    for number, piece in enumerate(torch.arange(tokens).tensor_split(scene.parts)):
        sequence = torch.zeros(len(piece), dtype=torch.long)
        facts = Context(token_ids=ids[piece], sequence=sequence, position=piece - piece[:1], domain=ids[piece] % 2)
        found.append(Part(number, x[piece].clone().requires_grad_(), facts))
    return found


@dataclass
class Answer:
    """What one step gives, by name; losses and the norm are of all ranks."""

    y: list[Tensor]
    x: list[Tensor]
    loss: Tensor
    named: dict[str, Tensor]
    norm: Tensor
    load: Tensor


def step(
    net: Net, parts: list[Part], tokens: int, *, reduce: Any = None, group: Any = None, slow: bool = False
) -> Answer:
    """One step on micro-batches: losses divided by the tokens of all, auxiliary ones exact over all."""
    log = RoutingLog(net)
    exact = all(isinstance(loss, Loss) for _, loss in net.moe.losses.values())

    def forward(part: Part) -> Tensor:
        torch.manual_seed(part.seed)
        return net(part.x, part.context, slow)

    passes = (partial(forward, part) for part in parts)
    totals = log.first_pass(passes, group) if exact and net.moe.losses else None
    outputs, loss, load = [], torch.zeros((), dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
    for part in parts:
        with log.recording():
            y = forward(part)
        probe = torch.linspace(-1, 1.5, WIDTH, dtype=torch.float64)
        task = ((y * probe).sum() + y.square().sum()) / tokens
        auxiliary = log.auxiliary_loss(totals) * (1 if totals is not None else len(y) / tokens)
        (task + auxiliary).backward()
        outputs.append(y.detach())
        loss = loss + task.detach() + (0 if totals is not None else auxiliary.detach())
        for decision in log.decisions["moe"]:
            load = load + decision.routing.load().detach().double()
    named = {} if totals is None else log.losses(totals)
    norm = (reduce or _one_process)(net)
    log.update_controllers()
    log.close()
    return Answer(outputs, [part.x.grad for part in parts], loss, named, norm, load)


def _one_process(net: Net) -> Tensor:
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(net.parameters(), CLIP, norm)
    return norm


def prepare(scenes: list[dict[str, Any]]) -> list[tuple[Scene, Net, Answer]]:
    """The answer to every scene, by one process; ranks share it."""
    answers: dict[Scene, tuple[Net, Answer]] = {}
    found = []
    for fields in scenes:
        scene = Scene(**fields)
        sliced = scene.shape.tensor > 1
        key = replace(scene.question, mesh=scene.question.mesh + (" sliced" if sliced else ""))
        if key not in answers:
            net = Net(scene, experts_bias=not sliced)
            parts = [part for shard in range(scene.shape.dense) for part in parts_of(scene, shard)]
            answers[key] = net, step(net, parts, sum(len(part.x) for part in parts), slow=True)
        found.append((scene, *answers[key]))
    return found


def compare(rank: int, prepared: list[tuple[Scene, Net, Answer]]) -> list[list[str]]:
    """What differs on this rank, in each scene."""
    meshes: dict[str, Mesh] = {}
    for scene, _, _ in prepared:
        if scene.mesh not in meshes:
            meshes[scene.mesh] = Mesh(scene.shape, ranks_per_node=MESHES[scene.mesh][1])
    return [list(_differences(scene, meshes[scene.mesh], net, answer)) for scene, net, answer in prepared]


def _differences(scene: Scene, mesh: Mesh, reference: Net, answer: Answer) -> Iterator[str]:
    net = Net(scene, experts_bias=scene.shape.tensor == 1)
    placement = REPLICAS if scene.replicas else None
    network = spread(net, mesh, transport=scene.make_transport(), placement=placement)
    net.again = scene.again
    gradients, shard = Gradients(net, mesh), mesh.tokens.get_local_rank("dense")
    parts = parts_of(scene, shard)
    tokens = sum(len(part.x) for s in range(scene.shape.dense) for part in parts_of(scene, s))

    def reduce(_: nn.Module) -> Tensor:
        gradients.reduce(mean=False)
        return gradients.clip(CLIP)

    got = step(net, parts, tokens, reduce=reduce, group=mesh.dense)
    loss, load = got.loss.clone(), got.load.clone()
    for total in (loss, load):
        dist.all_reduce(total, group=mesh.dense)
    first = shard * scene.parts
    yield from _apart("loss", loss, answer.loss)
    yield from _apart("norm", got.norm, answer.norm)
    yield from _apart("load", load, answer.load)
    for name, value in answer.named.items():
        yield from _apart(name, got.named[name], value)
    for place in range(scene.parts):
        yield from _apart(f"output {place}", got.y[place], answer.y[first + place])
        yield from _apart(f"input gradient {place}", got.x[place], answer.x[first + place])
    yield from _of_parameters(net, reference, mesh)
    again = network.traffic.bytes(phase="recompute")
    if bool(again) != (scene.again or scene.transport.endswith((" S2", " S4"))) and network.traffic.bytes(
        "dispatch", "forward"
    ):
        yield f"{again} bytes were sent again"


def _of_parameters(net: Net, reference: Net, mesh: Mesh) -> Iterator[str]:
    """Differences of gradients, of dense parameters and of this rank's experts, and of what routers keep."""
    (_, bank), whole = next(parallel_banks(net)), reference.moe.experts
    whole = getattr(whole, "inner", whole)
    ours = {id(p) for p in bank.parameters()}
    theirs = dict(reference.named_parameters())
    for name, p in net.named_parameters():
        if id(p) not in ours:
            yield from _apart(name, p.grad, theirs[name].grad)
    part, parts = mesh.experts.get_local_rank("tensor"), mesh.shape.tensor
    for place, expert in enumerate(bank.placement.experts_of(mesh.experts.get_local_rank("expert"))):
        pieces = bank.local.parameters_of(place)
        for name, (p, row) in whole.parameters_of(expert).items():
            own, own_row = pieces[name]
            wanted = None if p.grad is None else p.grad if row is None else p.grad[row]
            if wanted is not None and parts > 1:
                wanted = wanted.chunk(parts, dim=0 if name == "down" else -1)[part]
            grad = None if own.grad is None else own.grad if own_row is None else own.grad[own_row]
            yield from _apart(f"expert {expert} {name}", grad, wanted)
    buffers = dict(reference.moe.router.named_buffers())
    for name, buffer in net.moe.router.named_buffers():
        yield from _apart(name, buffer.double(), buffers[name].double())


def _apart(name: str, got: Tensor | None, wanted: Tensor | None) -> Iterator[str]:
    if got is None or wanted is None:
        if not all(each is None or not each.any() for each in (got, wanted)):
            yield f"{name}: {'nothing' if got is None else 'something'} instead of the other"
        return
    if got.shape != wanted.shape:
        yield f"{name}: shape {list(got.shape)} instead of {list(wanted.shape)}"
    elif got.numel():
        scale = max(1.0, float(wanted.abs().max()))
        error = float((got - wanted).abs().max()) / scale
        if not error <= 1e-10:
            yield f"{name}: {error:.1e} apart"
