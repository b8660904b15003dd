"""What comes of a training: the model's folder, and result.json, which says that it is done."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from moestro.inference import Evaluation
from moestro.models import DecoderLM, save_model
from moestro.train.files import write_json
from moestro.train.learner import Learner
from moestro.train.machine import versions
from moestro.train.placing import summary_of
from moestro.train.records import Records
from moestro.train.witness import Witness


def write_outcome(
    folder: Path, learner: Learner, records: Records, evaluation: Evaluation, witness: Witness | None
) -> dict[str, Any]:
    """Write the whole model and its result, by the first process; the content of result.json in all."""
    whole = learner.part.whole(learner.model)
    return learner.around.team.by_first(lambda: _write(folder, whole, learner, records, evaluation, witness))


def _write(
    folder: Path,
    whole: DecoderLM,
    learner: Learner,
    records: Records,
    evaluation: Evaluation,
    witness: Witness | None,
) -> dict[str, Any]:
    saved = save_model(whole, folder / "model", learner.around.corpus.tokenizer)
    described: dict[str, Any] = {"layout": saved.layout}
    if witness is not None:
        specialisation, routing = witness.result()
        write_json(folder / "specialisation.json", specialisation)
        described |= routing
    result = _facts(learner, records, evaluation) | described
    write_json(folder / "result.json", result)
    learner.checkpoints.finish()
    return result


def _facts(learner: Learner, records: Records, evaluation: Evaluation) -> dict[str, Any]:
    around, counts = learner.around, learner.counts
    seconds = learner.elapsed()
    return {
        "name": learner.name,
        "method": learner.model.config["method"],
        "validation_bits_per_byte": evaluation.bits_per_byte,
        "validation_loss": evaluation.loss,
        "validation_accuracy": evaluation.accuracy,
        "validation_bytes": evaluation.num_bytes,
        "tokens_per_second": statistics.median(each["tokens_per_second"] for each in records.metrics.records),
        "active_parameters": counts.active,
        "total_parameters": counts.total,
        "seconds": round(seconds, 1),
        "steps": learner.step,
        "tokens": learner.step * around.tokens_per_step,
        "seed": around.recipe.seed,
        "device": str(around.machine.device),
        "precision": around.machine.precision_name,
        "threads": around.machine.threads,
        "mesh": around.mesh_words,
        "corpus": around.corpus.fingerprint,
        "versions": versions(),
        **({} if learner.rebalancer is None else {"placement": summary_of(records.events.records)}),
        "goodput": learner.goodput.summary(seconds + learner.goodput.seconds["lost"]),
    }
