"""What a run does about a step that is not finite: halt, leave its batch out, or go back and do so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moestro.train.build import training_batches
from moestro.train.errors import NonFiniteLoss
from moestro.train.learner import Learner
from moestro.train.records import Records
from moestro.train.repro import FailedStep, with_random_state, write_repro

MOST_BAD_STEPS = 10  # in a hundred; more are no accident


class BadNumbers:
    """The recipe's policy `train.on_non_finite`.

    Args:
        learner: the model; it stands before the step that failed.
        records: of the model.
        folder: of the model's files.
    """

    def __init__(self, learner: Learner, records: Records, folder: Path):
        self.learner, self.records, self.folder = learner, records, folder / "repro"
        self.policy = learner.around.recipe.train.on_non_finite
        self._left_out: set[int] = set()

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of a step met a bad number before and is not to be learned from."""
        return step in self._left_out

    def met(self, error: NonFiniteLoss, learning_rate: float, random_state: Any) -> None:
        """Keep the step for `moestro replay`, then halt, skip or roll back.

        Args:
            error: what the step said.
            learning_rate: of the step.
            random_state: of torch's generator when it began.

        Raises:
            NonFiniteLoss: the policy is to halt, has no checkpoint to go back to, or has not helped.
        """
        learner, around = self.learner, self.learner.around
        events = self.records.events.records
        recently = [each for each in events if each["event"] == "non-finite" and each["step"] > learner.step - 100]
        kept_step = bool(self.records.metrics.records)  # a run that fails at once leaves nothing behind
        if kept_step:
            write_repro(self.folder, self._failed(error, learning_rate, random_state), around.team)
        if self.policy == "halt":
            raise _with(error, f"; the step is kept: moestro replay {self.folder}" if kept_step else "") from None
        if len(recently) >= MOST_BAD_STEPS:
            often = f"; that is one of {len(recently) + 1} in 100 steps, which {self.policy} does not mend"
            raise _with(error, often) from None
        around.progress.say(f"{error}; {self.policy}: the batch is left out")
        self._left_out.add(error.step)
        if self.policy == "rollback":
            self._go_back(error)
        else:
            learner.step += 1
        self.records.event(error.step, "non-finite", policy=self.policy, what=str(error))

    def _go_back(self, error: NonFiniteLoss) -> None:
        """Take the state of the newest whole checkpoint, and forget what was recorded since."""
        checkpoint = self.learner.newest()
        if checkpoint is None:
            raise _with(error, "; there is no checkpoint to go back to: lower train.checkpoint_every") from None
        self.learner.goodput.lose(self.records.seconds_after(checkpoint.step))
        self.learner.take(checkpoint)
        self.records.rewind()
        self.learner.around.progress.say(f"{self.learner.name}: back to step {self.learner.step}")

    def _failed(self, error: NonFiniteLoss, learning_rate: float, random_state: Any) -> FailedStep:
        """The step as one process would do it: the whole batch, and what each process knows of the state."""
        around, captured = self.learner.around, self.learner.captured()
        return FailedStep(
            recipe=around.recipe,
            vocab_size=around.corpus.tokenizer.vocab_size,
            num_domains=len(around.corpus.domains),
            dense=self.learner.log is None,
            learning_rate=learning_rate,
            state=with_random_state(captured, random_state) if around.team.first else captured,
            batch=training_batches(around.corpus, around.recipe).at(self.learner.step),
            error=error,
        )


def _with(error: NonFiniteLoss, more: str) -> NonFiniteLoss:
    """The same error, with a word on what became of it."""
    return NonFiniteLoss(f"{error}{more}", error.step, error.kind, error.name)
