"""What the models of a run share: recipe, machine, text, and the processes that train them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moestro.data import Corpus
from moestro.parallel import Mesh
from moestro.train.interrupt import Interrupt
from moestro.train.machine import Machine
from moestro.train.progress import Progress
from moestro.train.recipe import Recipe
from moestro.train.state import Checkpoint
from moestro.train.team import ALONE, Team

ONE_PROCESS = "one process"


@dataclass(frozen=True)
class Surroundings:
    """What the models of a run share."""

    recipe: Recipe
    machine: Machine
    corpus: Corpus
    progress: Progress
    interrupt: Interrupt
    team: Team = ALONE
    mesh: Mesh | None = None

    @property
    def mesh_words(self) -> str:
        """How the processes are arranged."""
        return ONE_PROCESS if self.mesh is None else self.mesh.shape.words

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all processes together learn from in an optimiser step."""
        return self.recipe.train.batch_size * self.recipe.data.sequence_length

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a resumed run must share with the one before to repeat it exactly."""
        return {
            "corpus": self.corpus.fingerprint,
            "torch": torch.__version__,
            "threads": str(self.machine.threads),
            "device": self.machine.device.type if self.team.size > 1 else str(self.machine.device),
            "precision": self.machine.precision_name,
            "mesh": self.mesh_words,
        }

    def compare(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another text, and say what else will keep the run from repeating bit for bit."""
        now, before = self.fingerprint, checkpoint.fingerprint
        if before.get("corpus") != now["corpus"]:
            raise ValueError("the text has changed since this run was stopped; restore it, or start a new run")
        for name in sorted(now.keys() - {"corpus"}):
            if before.get(name, ONE_PROCESS if name == "mesh" else None) != now[name]:
                self.progress.say(
                    f"{name} was {before.get(name)} and is {now[name]}: the run will not repeat bit for bit"
                )
