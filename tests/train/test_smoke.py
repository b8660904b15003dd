"""A real run on real text, end to end: a minute of training that must learn."""

import json
import math
from collections import Counter
from pathlib import Path

from moestro.data import default_documents
from moestro.inspect import write_report
from moestro.models import load_model
from moestro.train import train_run
from moestro.train.recipe import load_recipe

OVERRIDES = {
    "model": {"width": 64, "num_layers": 2, "num_heads": 2, "num_experts": 8, "expert_hidden": 64},
    "data": {"sequence_length": 128},
    "train": {
        "steps": 150,
        "batch_size": 8,
        "threads": 1,
        "evaluate_every": 75,
        "evaluation_batches": 4,
        "final_evaluation_batches": 40,
    },
}


def bits_of_single_bytes() -> float:
    """Bits per byte of the best guess that looks at no context: what a model must beat to have learned."""
    texts = (document.text for document in default_documents())
    counts = Counter(b"".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    total = sum(counts.values())
    return -sum(n / total * math.log2(n / total) for n in counts.values())


def test_a_minute_of_training_on_the_default_text_learns(tmp_path: Path) -> None:
    result = train_run(load_recipe(None, OVERRIDES), tmp_path / "run")
    assert result["validation_bits_per_byte"] < 0.8 * bits_of_single_bytes()
    assert result["twin"]["validation_bits_per_byte"] < 0.8 * bits_of_single_bytes()
    assert result["dead_experts"] == 0
    assert abs(result["active_parameters"] / result["twin"]["active_parameters"] - 1) <= 0.01
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, 151))
    assert {"loss", "lr", "tokens_per_second", "grad_norm"} <= metrics[0].keys()
    assert load_model(tmp_path / "run" / "model").parameter_counts().total == result["total_parameters"]
    page = write_report(tmp_path / "run").read_text()
    for word in ("dense twin", "prose", "code"):
        assert word in page
