"""Broken, hostile and unsupported folders are refused by name, and nothing is written."""

import json
import os
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from hf.tiny import tiny_model
from safetensors.torch import load_file, save_file

from moestro.cli import main
from moestro.hf.convert import convert
from moestro.hf.layouts import StockFolder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    model = tiny_model("mixtral", width=4, hidden=6, num_experts=3)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size=900)
    return folder


@pytest.fixture
def one(originals, tmp_path):
    """A folder with one file."""
    return shutil.copytree(originals / "one", tmp_path / "model")


@pytest.fixture
def many(originals, tmp_path):
    """A folder with several files and an index."""
    return shutil.copytree(originals / "many", tmp_path / "model")


def assert_refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(folder, folder.parent / "out", "fused")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return edit


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return edit


def rewrite_header(change):
    """Edit the raw header text of the one file."""

    def edit(folder):
        data = (folder / FILE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = change(data[8 : 8 + length].decode()).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return edit


def cut(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-1])


def double_key(text):
    entry = re.search(r'"model\.norm\.weight":\{[^}]*\}', text)[0]
    return text.replace(entry, f"{entry},{entry}")


TOO_DEEP = '{"model_type": ' + "[" * 100_000

DAMAGE = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "config is nested too deep": (lambda f: (f / "config.json").write_text(TOO_DEEP), "not valid JSON"),
    "config names a key twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "mixtral", "model_type": "olmoe"}'),
        "names 'model_type' twice",
    ),
    "no model type": (edit_json("config.json", model_type=None), "no model_type"),
    "auto_map": (edit_json("config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x04."), "holds pytorch_model.bin"),
    "no weights": (lambda f: (f / FILE).unlink(), "has no model.safetensors"),
    "cut by one byte": (cut, "was cut or is still being downloaded"),
    "one byte too many": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes() + b"x"), "its header promises"),
    "empty file": (lambda f: (f / FILE).write_bytes(b""), "no whole safetensors file"),
    "header of 2^62 bytes": (
        lambda f: (f / FILE).write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "header would take 4611686018427387904",
    ),
    "header names a tensor twice": (rewrite_header(double_key), "'model.norm.weight' twice"),
    "header is no JSON": (rewrite_header(lambda t: t[1:]), "not valid JSON"),
    "unknown dtype": (rewrite_header(lambda t: t.replace('"F32"', '"F4"', 1)), "dtype 'F4'"),
    "2^33 elements": (rewrite_header(lambda t: t.replace("[4]", "[8589934592]", 1)), "needs 34359738368 bytes"),
    "100 dimensions": (
        rewrite_header(lambda t: t.replace("[4]", f"[{','.join(['1'] * 99)},4]", 1)),
        "impossible shape",
    ),
    "negative size": (rewrite_header(lambda t: t.replace("[4]", "[-4]", 1)), "impossible shape"),
    "true as a size": (rewrite_header(lambda t: t.replace("[4]", "[true,4]", 1)), "impossible shape"),
    "an expert missing": (edit_tensors(lambda t: t.pop(EXPERT)), f"lacks 1 of the 9 .*{re.escape(EXPERT)}"),
    "an expert too many": (
        edit_tensors(lambda t: t.update({EXPERT.replace(".2.", ".3."): torch.zeros(6, 4)})),
        r"holds model\.layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight",
    ),
    "an expert doubled in another layout": (
        edit_tensors(lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(3, 12, 4)})),
        "holds experts twice, as transformers and as fused .*gate_up_proj",
    ),
    "an expert mis-shaped": (
        edit_tensors(lambda t: t.update({EXPERT: torch.zeros(5, 4)})),
        rf"{re.escape(EXPERT)} has shape \[5, 4\] but config.json describes \[6, 4\]",
    ),
    "an expert of another dtype": (
        edit_tensors(lambda t: t.update({EXPERT: torch.zeros(6, 4).half()})),
        f"{re.escape(EXPERT)} has dtype F16",
    ),
    "a router missing": (
        edit_tensors(lambda t: t.pop("model.layers.0.block_sparse_moe.gate.weight")),
        r"lacks the router of model\.layers\.0",
    ),
    "all experts of a layer missing": (
        edit_tensors(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n and ".experts." in n]),
        "lacks 9 of the 9 expert tensors of model.layers.1",
    ),
    "a layer missing": (
        edit_tensors(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n]),
        r"has no tensor model\.layers\.1\.",
    ),
    "a layer too many": (
        edit_tensors(
            lambda t: t.update({n.replace(".1.", ".7.", 1): t[n].clone() for n in list(t) if "rs.1" in n})
        ),
        r"holds model\.layers\.7\..* but config.json says 2 layers",
    ),
    "more experts in the config": (
        edit_json("config.json", num_local_experts=4),
        "lacks 3 of the 12 expert tensors",
    ),
    "10^12 experts in the config": (edit_json("config.json", num_local_experts=10**12), "num_local_experts=10000"),
    "a word for a count": (edit_json("config.json", num_local_experts="3"), "num_local_experts='3'"),
    "quantised": (edit_json("config.json", quantization_config={"quant_method": "fp8"}), r"is quantised \(fp8\)"),
    "an unknown mark": (edit_json("config.json", moestro_layout="folded"), "moestro_layout='folded'"),
    "dense": (
        lambda f: (
            edit_json("config.json", model_type="llama")(f),
            edit_tensors(lambda t: [t.pop(n) for n in list(t) if "sparse" in n])(f),
        ),
        "llama is a dense model: .* pass one of mixtral",
    ),
    "unknown family": (edit_json("config.json", model_type="hal9000"), "where hal9000 keeps its experts; it knows"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name, one):
    damage, message = DAMAGE[name]
    damage(one)
    if name == "no folder":
        with pytest.raises(ValueError, match=message):
            convert(one, one.parent / "out", "fused")
        return
    assert_refused(one, message)


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


def edit_map(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def place(file):
    return edit_map(lambda weights: weights.update({"model.norm.weight": file}))


def link_out(folder):
    shard = first_shard(folder)
    outside = folder.parent / "model" / ".." / "elsewhere"
    os.makedirs(outside, exist_ok=True)
    shutil.move(shard, outside / shard.name)
    shard.symlink_to(outside / shard.name)


LIES = {
    "a shard missing": (lambda f: first_shard(f).unlink(), "lacks model-00001-of-"),
    "half a shard": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:300]), "model-00001-of-"),
    "no index": (lambda f: (f / INDEX).unlink(), "holds model-00001-of-.* but no model.safetensors.index.json"),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index names a tensor twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "names 'a' twice",
    ),
    "index places a tensor elsewhere": (
        lambda f: place(first_shard(f).name)(f),
        "does not hold model.norm.weight, which the index places there",
    ),
    "index forgets a tensor": (
        edit_map(lambda weights: weights.pop("model.norm.weight")),
        "holds model.norm.weight, which the index does not place there",
    ),
    "index forgets a file": (
        lambda f: shutil.copy(first_shard(f), f / "model-00099-of-00099.safetensors"),
        "does not mention model-00099-of-00099.safetensors",
    ),
    "path out of the folder": (
        place("../model/model-00001-of-00002.safetensors"),
        "is no file name of this folder",
    ),
    "absolute path": (place("/etc/passwd.safetensors"), "is no file name of this folder"),
    "backslashes": (place("..\\x.safetensors"), "is no file name of this folder"),
    "NUL": (place("x\0.safetensors"), "is no file name of this folder"),
    "not a name": (place(7), "is no file name of this folder"),
    "300 letters": (place("a" * 300 + ".safetensors"), "is no file name of this folder"),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_indices_are_refused(name, many):
    damage, message = LIES[name]
    damage(many)
    assert_refused(many, message)


def test_links_out_of_the_folder_are_refused(many):
    link_out(many)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        StockFolder(many)


def test_links_into_a_hub_cache_are_followed(one):
    """A Hugging Face cache keeps the files of a snapshot as links into its store."""
    cache = one.parent / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in one.iterdir():
        shutil.move(path, cache / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(cache / "blobs" / f"blob-{path.name}")
    assert convert(snapshot, one.parent / "out", "fused").layout == "fused"


def test_mutated_headers_never_crash(one):
    data, random = (one / FILE).read_bytes(), np.random.default_rng(0)
    (length,) = struct.unpack("<Q", data[:8])
    refused = 0
    for _ in range(500):
        changed = bytearray(data)
        for place in random.integers(0, 8 + length, 3):
            changed[place] = int(random.choice(list(b'"{}[],:0123456789-eE\0\xff')))
        (one / FILE).write_bytes(changed)
        try:
            StockFolder(one)
        except ValueError:
            refused += 1
    assert refused > 300


def test_an_existing_target_is_left_alone(one, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="out exists; choose another place"):
        convert(one, tmp_path / "out", "fused")
    with pytest.raises(ValueError, match="model exists"):
        convert(one, one, "fused")
    assert (tmp_path / "out/notes.txt").read_text() == "keep me"


def test_a_file_cut_while_it_is_read_leaves_nothing(one, tmp_path):
    def progress(done, total):
        with open(one / FILE, "r+b") as file:
            file.truncate(total // 3)

    with pytest.raises(ValueError, match="while it was read"):
        convert(one, tmp_path / "out", "fused", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_layouts_are_refused(one, tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'fuzed'; expected transformers, fused"):
        convert(one, tmp_path / "out", "fuzed")
    with pytest.raises(ValueError, match="dtype=F16 has no meaning"):
        convert(one, tmp_path / "out", "fused", dtype="F16")
    tiny_model("olmoe").save_pretrained(tmp_path / "olmoe")
    with pytest.raises(ValueError, match="olmoe has no mergekit layout"):
        convert(tmp_path / "olmoe", tmp_path / "out", "mergekit")


def test_the_command_says_what_it_did_and_what_went_wrong(one, tmp_path, capsys):
    assert main(["convert", str(one), str(tmp_path / "out"), "--to", "fused"]) == 0
    assert "mixtral from transformers to fused" in capsys.readouterr().out
    assert main(["convert", str(one), str(tmp_path / "out"), "--to", "fused"]) == 2
    assert "exists; choose another place" in capsys.readouterr().err
    assert main(["convert", str(one), str(tmp_path / "json"), "--to", "fused", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "fused"
