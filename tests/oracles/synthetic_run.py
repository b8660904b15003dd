"""Makes a run folder with made-up but realistic content, for tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

DOMAINS = ["code", "prose"]
TASTES = [
    ("newline or indent", ["↵", "␣", "\\t"]),
    ("digit", ["0", "1", "7"]),
    ("bracket", ["(", ")", "["]),
    ("uppercase letter", ["T", "S", "E"]),
    ("underscore", ["_"]),
    ("quote", ['"', "'", "`"]),
    ("operator", ["=", "+", "<"]),
    ("lowercase letter", ["e", "t", "a"]),
]

RECIPE = """\
seed: 0
twin: true
model:
  method: mixtral
  options: {}
  num_experts: 16
  expert_hidden: 256
  width: 192
  num_layers: 4
data:
  paths: []
  tokenizer: byte
  sequence_length: 256
train:
  steps: 400
  batch_size: 16
  learning_rate: 0.003
  precision: auto
  threads: 2
"""


def make_run(path: Path, steps: int = 400, num_layers: int = 4, num_experts: int = 16, dead: bool = False) -> Path:
    """A finished MoE run with its twin and every file of the schema."""
    chance = random.Random(0)
    _model(path, chance, steps, 1.852, 5_640_000, 1_806_000, 11_850.0)
    _model(path / "twin", chance, steps, 1.882, 1_806_000, 1_806_000, 17_320.0)
    (path / "recipe.yaml").write_text(RECIPE.replace("steps: 400", f"steps: {steps}"))
    _lines(path / "routing.jsonl", _routing(chance, steps, num_layers, num_experts, dead))
    (path / "specialisation.json").write_text(json.dumps(_specialisation(chance, num_layers, num_experts, dead)))
    return path


def _model(
    path: Path, chance: random.Random, steps: int, bits: float, total: int, active: int, speed: float
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    end = bits * math.log(2)

    def loss(step: int) -> float:
        return end + (5.55 - end) * math.exp(-step / 22) * 0.55 + (5.55 - end) * 0.45 * (1 + step / 9) ** -1.1

    metrics = [
        {
            "step": step,
            "loss": loss(step) + chance.gauss(0, 0.03),
            "lr": 3e-3,
            "tokens_per_second": speed * chance.uniform(0.96, 1.03),
            "grad_norm": chance.uniform(0.3, 0.9),
        }
        for step in range(1, steps + 1)
    ]
    bits_at = {
        step: loss(step) / math.log(2) + (bits - loss(steps) / math.log(2)) for step in range(100, steps + 1, 100)
    }
    evaluations = [
        {"step": step, "validation_loss": value * math.log(2), "bits_per_byte": value}
        for step, value in bits_at.items()
    ]
    result = {
        "name": "moe" if total > active else "dense twin",
        "validation_bits_per_byte": bits,
        "validation_loss": bits * math.log(2),
        "validation_tokens": 819_200,
        "tokens_per_second": speed,
        "active_parameters": active,
        "total_parameters": total,
        "seconds": round(4096 * steps / speed, 1),
        "steps": steps,
        "tokens": 4096 * steps,
        "seed": 0,
        "method": "mixtral" if total > active else None,
        "device": "cpu",
        "precision": "float32",
        "threads": 2,
        "corpus": "4d1f9c07aa35e2b1",
        "versions": {"moestro": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    }
    _lines(path / "metrics.jsonl", metrics)
    _lines(path / "evaluations.jsonl", evaluations)
    (path / "result.json").write_text(json.dumps(result))


def _routing(
    chance: random.Random, steps: int, num_layers: int, num_experts: int, dead: bool
) -> list[dict[str, object]]:
    taste = [[chance.gauss(0, 0.22) for _ in range(num_experts)] for _ in range(num_layers)]
    early = [[chance.gauss(0, 0.9) for _ in range(num_experts)] for _ in range(num_layers)]
    records = []
    for step in range(10, steps + 1, 10):
        layers = []
        for layer in range(num_layers):
            fade = math.exp(-step / 70)
            weights = [
                math.exp(t + e * fade + chance.gauss(0, 0.05))
                for t, e in zip(taste[layer], early[layer], strict=True)
            ]
            if dead and layer == 1:
                weights[5] *= math.exp(-step / 60)
            load = [weight / sum(weights) for weight in weights]
            layers.append(
                {
                    "name": f"layers.{layer}.moe",
                    "load": load,
                    "entropy": math.log(num_experts)
                    * (0.55 + 0.1 * layer / num_layers + 0.42 * math.exp(-step / 80)),
                    "margin": (0.11 - 0.015 * layer) * (1 - 0.9 * math.exp(-step / 90)) + chance.gauss(0, 0.002),
                    "dropped": 0.0,
                    "dead": sum(2 * share < 0.01 for share in load),
                    "experts_per_token": 2.0,
                    "tokens": 4096,
                }
            )
        records.append({"step": step, "layers": layers})
    return records


def _specialisation(chance: random.Random, num_layers: int, num_experts: int, dead: bool) -> dict[str, object]:
    layers = []
    for layer in range(num_layers):
        strength = 0.15 + 0.3 * layer
        rows = []
        lean = [chance.gauss(0, strength) for _ in range(num_experts)]
        for sign in (1, -1):
            weights = [math.exp(sign * value + chance.gauss(0, 0.1)) for value in lean]
            weights[5] *= 0.002 if dead and layer == 1 else 1
            rows.append([weight / sum(weights) for weight in weights])
        experts = []
        for expert in range(num_experts):
            name, tokens = TASTES[(expert * 3 + layer) % len(TASTES)]
            other, more = TASTES[(expert + 2 * layer + 1) % len(TASTES)]
            classes = [[name, round(chance.uniform(2, 7), 2)], [other, round(chance.uniform(1.1, 2), 2)]]
            found = [[text, round(chance.uniform(1.2, 8), 2)] for text in tokens + more]
            experts.append(
                {"share": (rows[0][expert] + rows[1][expert]) / 2, "top_classes": classes, "top_tokens": found}
            )
        information = min(0.02 + 0.07 * layer, 0.3)
        layers.append(
            {
                "name": f"layers.{layer}.moe",
                "load_by_domain": rows,
                "normalised_mutual_information": information,
                "highest_possible": 0.4012,
                "told_apart": sum(map(max, *rows)) / 2,
                "experts": experts,
            }
        )
    return {"domains": DOMAINS, "layers": layers}


def _lines(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
