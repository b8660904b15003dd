"""A run so small that a test can make many of them: one layer, width 16, a page of text."""

from pathlib import Path

from moestro.train import Recipe

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 60


def tiny_recipe(text: Path, *, method="mixtral", options=None, twin=False, seed=0, data=None, **train):
    """A recipe whose text is written to `text`."""
    text.write_text(TEXT, encoding="utf-8")
    sizes = {"num_experts": 4, "expert_hidden": 16, "width": 16, "num_layers": 1, "num_heads": 2}
    defaults = {"steps": 6, "batch_size": 4, "evaluate_every": 2, "evaluation_batches": 2, "log_every": 2}
    return Recipe.model_validate(
        {
            "seed": seed,
            "twin": twin,
            "model": {"method": method, "options": options or {}, **sizes},
            "data": {"paths": [str(text)], "sequence_length": 16, **(data or {})},
            "train": {**defaults, "threads": 1, "precision": "float32", "device": "cpu", **train},
        }
    )
