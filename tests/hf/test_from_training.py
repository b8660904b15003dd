"""A checkpoint, of one process or many, becomes the folder that saving its model would have written."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from oracles.tiny_run import tiny_recipe
from safetensors.torch import load_file

import moestro
from moestro.cli import main
from moestro.data import open_tokenizer
from moestro.models import load_model, save_model
from moestro.train import launch_run, train_run
from moestro.train.checkpoint_files import read_checkpoint, write_checkpoint
from moestro.train.fragments import Pieces
from moestro.train.progress import Silent

KEPT = {"checkpoint_every": 2, "keep_every": 2, "steps": 4, "batch_size": 4}


def in_pieces(run):
    """Replace the newest checkpoint by one whose experts are tensors of their own."""
    newest = sorted((run / "checkpoint").glob("step-*"))[-1]
    saved = read_checkpoint(newest)
    tensors = {}
    for name, tensor in saved.tensors.items():
        rows = (
            {f"{name}[{row}]": each for row, each in enumerate(tensor)}
            if ".experts." in name and tensor.ndim
            else {}
        )
        tensors |= rows or {name: tensor}
    shutil.rmtree(newest)
    write_checkpoint(newest, replace(saved, tensors=tensors))


@pytest.mark.parametrize(
    ("method", "options", "processes", "to", "layout"),
    [
        ("mixtral", {}, 0, None, "mixtral"),
        pytest.param("mixtral", {}, 2, None, "mixtral", marks=pytest.mark.nightly),
        ("deepseek-v3", {"top_k": 2}, 1, "transformers", "deepseek_v3"),
        ("switch", {}, 1, None, "moestro"),
        ("mixtral", {}, 1, "moestro", "moestro"),
    ],
)
def test_a_checkpoint_becomes_the_folder_of_its_model(tmp_path, capsys, method, options, processes, to, layout):
    recipe = tiny_recipe(tmp_path / "text.txt", method=method, options=options, **KEPT)
    run = tmp_path / "run"
    if processes < 2:
        train_run(recipe, run, progress=Silent())
    else:
        launch_run(recipe, run, processes, progress="silent")
    if processes == 0:  # as several processes would have saved it
        in_pieces(run)
    assert main(["convert", str(run), str(tmp_path / "hf"), *(["--to", to] if to else []), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model_type"] == layout
    saved = read_checkpoint(sorted((run / "checkpoint").glob("step-*"))[-1])
    pieces = Pieces(saved.tensors)
    model = moestro.build_language_model(**saved.model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            value = pieces.read(f"model.{name}")
            if value is not None:
                tensor.copy_(value)
    opened = load_model(tmp_path / "hf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    if to is None:
        save_model(model, tmp_path / "saved", open_tokenizer(run / "tokenizer"))
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "hf"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
