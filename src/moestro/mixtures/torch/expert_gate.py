"""Expert Gate: an expert per task, added one after the other, and autoencoders that know whose input it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.experts import ModuleExperts
from moestro.layers import MoE
from moestro.routers import TokenChoice, TopK, softmax
from moestro.routers.autoencoders import Autoencoders, relatedness
from moestro.routers.dense import ones


class TaskNetwork(nn.Module):
    """An expert: a body that a later task may start from, and a head for the classes of its own.

    Shapes: x `[rows, width]` -> logits `[rows, classes]`.
    """

    def __init__(self, body: nn.Module, features: int, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class _Placed(nn.Module):
    """The logits of a task among those of all tasks; classes of the others are impossible."""

    def __init__(self, network: TaskNetwork, begin: int, total: int) -> None:
        super().__init__()
        self.network, self.begin, self.total = network, begin, total

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        rest = self.total - self.begin - logits.shape[1]
        return F.pad(logits, (self.begin, rest), value=-torch.inf)


@dataclass(frozen=True)
class AddedTask:
    """How a task was added.

    Attributes:
        task: its number.
        relatedness: to every earlier task, in their order; 1 = as well reconstructed as by its own autoencoder.
        source: the earlier task whose body the expert started from; None for the first task.
        transfer: `lwf` (learning without forgetting), `fine-tune` or `scratch`.
    """

    task: int
    relatedness: tuple[float, ...]
    source: int | None
    transfer: str


class ExpertGate(nn.Module):
    """Lifelong learning by a growing set of experts.

        er_i(x) = mean_j (v_j - r_i(v)_j)²,   p = softmax(-er / temperature),   task = argmax p
        Rel(k, a) = 1 - |Er_a - Er_k| / Er_k        Aljundi, Chakravarty & Tuytelaars 2017, eqs. 2-4

    `add_task` trains an autoencoder and an expert on the data of one task and leaves what exists as it is. The
    expert starts from the body of the most related one; above `threshold` it also keeps that one's answers to the
    new inputs (learning without forgetting), below it is only fine-tuned. Errors are means over the features, so
    that the temperature does not depend on how many there are; the mean and deviation that standardise them come
    from the first task and are shared. Autoencoders are trained as the authors' code does (cross-entropy, Adagrad
    at 0.01), but start from dense small weights: its 15 large weights per unit saturate narrow inputs.

    Args:
        width: input features, e.g. of a fixed network.
        code: size of an autoencoder's code; smaller than width, or it learns the identity.
        temperature: of the gate.
        threshold: relatedness from which on learning without forgetting is used.
        body: makes the body of an expert and says how many features it has; None = one hidden layer of 100 units.
        distillation: weight λ of the old answers; 0 is fine-tuning.

    Attributes: `tasks`, the list of `AddedTask`.

    Shapes: x `[..., width]` -> logits `[..., classes of all tasks]`, -inf for those of tasks not chosen.
    """

    def __init__(
        self,
        width: int,
        *,
        code: int = 100,
        temperature: float = 2.0,
        threshold: float = 0.85,
        body: Callable[[], tuple[nn.Module, int]] | None = None,
        distillation: float = 1.0,
    ) -> None:
        super().__init__()
        if code < 1 or temperature <= 0:
            raise ValueError(f"code={code} must be at least 1 and temperature={temperature} above 0")
        self.width, self.code, self.temperature = width, code, temperature
        self.threshold, self.distillation = threshold, distillation
        self._body = body or (lambda: (nn.Sequential(nn.Linear(width, 100), nn.ReLU()), 100))
        self.experts = nn.ModuleList()
        self.gate: Autoencoders | None = None
        self.tasks: list[AddedTask] = []
        self.num_classes: list[int] = []

    def add_task(
        self,
        x: Tensor,
        y: Tensor,
        validation: tuple[Tensor, Tensor] | None = None,
        *,
        epochs: int = 100,
        batch: int = 256,
        generator: torch.Generator | None = None,
    ) -> AddedTask:
        """Learn a task from its data alone.

        Args:
            x: inputs `[rows, width]`.
            y: classes 0, 1, ... of this task, `[rows]`.
            validation: rows on which relatedness is measured; None holds out a fifth of the rows.
            epochs: passes over the data, for the autoencoder and for the expert.
            batch: rows per step.
            generator: of the autoencoder's first weights, the order of rows and the rows held out.

        Raises:
            ValueError: inputs of another width, or fewer than two rows.
        """
        if x.dim() != 2 or x.shape[1] != self.width or len(x) != len(y) or len(x) < 2:
            raise ValueError(
                f"x has shape {list(x.shape)} and y {list(y.shape)}; pass x [rows, {self.width}] and as many "
                "classes, at least two rows"
            )
        generator = generator or torch.Generator().manual_seed(len(self.tasks))
        if validation is None:
            order = torch.randperm(len(x), generator=generator)
            held, kept = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]
            validation, x, y = (x[held], y[held]), x[kept], y[kept]
        classes = int(max(y.max(), validation[1].max())) + 1
        gate = self._grown(x, generator)
        batches = _Batches(x, y, epochs, batch, generator)
        self._train_autoencoder(gate, batches)
        errors = gate.errors(validation[0]).mean(0).detach()
        related = tuple(float(relatedness(error, errors[-1])) for error in errors[:-1])
        source = max(range(len(related)), key=related.__getitem__) if related else None
        old = None if source is None else self.experts[source]
        if isinstance(old, TaskNetwork) and source is not None:
            transfer = "lwf" if related[source] > self.threshold else "fine-tune"
            network = TaskNetwork(copy.deepcopy(old.body), old.head.in_features, classes).to(x)
        else:
            transfer, network = "scratch", TaskNetwork(*self._body(), classes).to(x)
        self._train_expert(network, old if transfer == "lwf" else None, batches)
        self.gate = gate
        self.experts.append(network)
        self.num_classes.append(classes)
        self.tasks.append(AddedTask(len(self.tasks), related, source, transfer))
        return self.tasks[-1]

    @property
    def layer(self) -> MoE:
        """The experts behind their gate as a layer.

        Raises:
            ValueError: before the first task.
        """
        if self.gate is None:
            raise ValueError("ExpertGate has no task yet; call add_task(x, y) first")
        total, placed, begin = sum(self.num_classes), [], 0
        for network, classes in zip(self.experts, self.num_classes, strict=True):
            placed.append(_Placed(network, begin, total))  # type: ignore[arg-type]
            begin += classes
        return MoE(TokenChoice(self.gate, TopK(1), softmax, ones), ModuleExperts(placed, self.width))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits

    def task_proba(self, x: Tensor) -> Tensor:
        """Probability of each task by its reconstruction error, `[rows, tasks]`."""
        probs = self.layer.route(x).probs
        assert probs is not None
        return probs

    def predict_task(self, x: Tensor) -> Tensor:
        """The task whose autoencoder reconstructs the input best, `[rows]`."""
        return self.task_proba(x).argmax(1)

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Task, and class within the task, of each row: `[rows]` and `[rows]`."""
        task = self.predict_task(x)
        begin = torch.tensor([0, *self.num_classes], device=x.device).cumsum(0)
        return task, self(x).argmax(1) - begin[task]

    def _grown(self, x: Tensor, generator: torch.Generator) -> Autoencoders:
        """The gate with one autoencoder more; the others and the shared statistics as they are."""
        num = len(self.tasks) + 1
        gate = Autoencoders(self.width, num, self.code, self.temperature * self.width).to(x)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.zero_()
            for weight in (gate.encode[-1], gate.decode[-1]):
                weight.copy_(torch.randn(weight.shape, generator=generator) * len(weight) ** -0.5)
            if self.gate is None:
                gate.fit(x)
                return gate
            for name, old in self.gate.state_dict().items():
                gate.state_dict()[name][: len(old)].copy_(old)
        return gate

    @staticmethod
    def _train_autoencoder(gate: Autoencoders, batches: _Batches) -> None:
        """Cross-entropy of the last autoencoder; Adagrad, weight decay on its weights alone."""
        last = Autoencoders(gate.mean.shape[0], 1, gate.encode.shape[2]).to(gate.mean)
        for name, value in last.state_dict().items():
            new = gate.state_dict()[name]
            value.copy_(new if name in ("mean", "std") else new[-1:])
        weights, biases = [last.encode, last.decode], [last.encode_bias, last.decode_bias]
        optimiser = torch.optim.Adagrad(
            [{"params": weights, "weight_decay": 5e-4}, {"params": biases, "weight_decay": 0.0}], lr=1e-2
        )
        for x, _ in batches:
            optimiser.zero_grad()
            last.cross_entropy(x).mean().backward()
            optimiser.step()
        with torch.no_grad():
            for name, value in last.named_parameters():
                gate.state_dict()[name][-1:].copy_(value)

    def _train_expert(self, network: TaskNetwork, old: nn.Module | None, batches: _Batches) -> None:
        parameters = list(network.parameters())
        kept = copy.deepcopy(old.head) if isinstance(old, TaskNetwork) else None
        if kept is not None:
            parameters += list(kept.parameters())
        optimiser = torch.optim.Adam(parameters, 1e-3)
        for x, y in batches:
            optimiser.zero_grad()
            features = network.body(x)
            loss = F.cross_entropy(network.head(features), y)
            if old is not None and kept is not None and self.distillation:
                with torch.no_grad():
                    answer = old(x)
                loss = loss + self.distillation * distillation_loss(kept(features), answer)
            loss.backward()
            optimiser.step()


def distillation_loss(logits: Tensor, target_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Cross-entropy to softened answers, `-T² sum softmax(target / T) log softmax(logits / T)`, mean over rows.

    Li & Hoiem 2016, learning without forgetting. Shapes: `[rows, classes]` twice -> scalar.
    """
    soft = (target_logits / temperature).softmax(-1)
    return -(temperature**2) * (soft * (logits / temperature).log_softmax(-1)).sum(-1).mean()


@dataclass(frozen=True)
class _Batches:
    """Rows in a new order in each epoch."""

    x: Tensor
    y: Tensor
    epochs: int
    size: int
    generator: torch.Generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(self.x), generator=self.generator).split(self.size):
                yield self.x[chosen], self.y[chosen]
