"""Experts move between all layouts bit for bit, and stock transformers opens what it should."""

import json
import shutil

import pytest
import torch
from hf.tiny import FAMILIES as TINY_FAMILIES
from hf.tiny import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file

from moestro.hf.convert import convert
from moestro.hf.layouts import FAMILIES, StockFolder, find_banks, find_family

transformers = pytest.importorskip("transformers")

MODEL_TYPES = {name: "nllb-moe" if name == "nllb_moe" else name for name in TINY_FAMILIES}


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def stock(request, tmp_path_factory):
    """A tiny model of a family, and the folder that transformers writes for it."""
    folder = tmp_path_factory.mktemp("stock") / request.param
    model = tiny_model(request.param)
    model.save_pretrained(folder, max_shard_size=20_000)
    return model, folder


def tensors_of(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_tensors(first, second):
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def test_the_table_has_every_family():
    assert set(FAMILIES) == set(MODEL_TYPES.values())


def test_every_layout_comes_back_bit_for_bit(stock, tmp_path):
    _, folder = stock
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    for layout in family.stores:
        convert(folder, tmp_path / layout, layout, max_shard_size=30_000)
        done = convert(tmp_path / layout, tmp_path / f"{layout}-back", "transformers")
        assert family.stores[done.source] == family.stores[layout]
        assert_same_tensors(folder, tmp_path / f"{layout}-back")
        assert json.loads((tmp_path / f"{layout}-back/config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )


def test_transformers_opens_what_it_should_with_the_same_logits(stock, tmp_path):
    model, folder = stock
    batch, kind = tiny_batch(model), type(model)
    expected = logits_of(kind, folder, batch)
    family = find_family(model.config.model_type, {})
    for layout in family.opens:
        convert(folder, tmp_path / layout, layout)
        assert torch.equal(logits_of(kind, tmp_path / layout, batch), expected), layout


def logits_of(kind, folder, batch):
    model = kind.from_pretrained(folder, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # where weights lie in memory decides the last bit of a product
    with torch.no_grad():
        return model(**batch).logits


def test_the_fused_layout_has_the_names_of_the_modules(stock, tmp_path):
    model, folder = stock
    if "fused" not in find_family(model.config.model_type, {}).opens:
        pytest.skip("transformers keeps these experts one by one")
    convert(folder, tmp_path / "fused", "fused")
    state = model.state_dict()
    fused = tensors_of(tmp_path / "fused")
    assert set(fused) <= set(state)
    assert all(torch.equal(fused[name], state[name]) for name in fused)
    assert {name for name in state if "expert" in name} <= set(fused)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    tiny_model("mixtral", width=4, hidden=6, num_experts=3).save_pretrained(folder)
    return folder


def test_forms_are_what_their_names_say(mixtral, tmp_path):
    before = tensors_of(mixtral)
    gate, up, down = (
        torch.stack([before[f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(3)])
        for w in ("w1", "w3", "w2")
    )
    for layout in ("fused", "mergekit", "transposed", "interleaved", "per-expert"):
        convert(mixtral, tmp_path / layout, layout)
    name = "model.layers.1.mlp.experts"
    fused = torch.cat([gate, up], dim=1)
    assert torch.equal(tensors_of(tmp_path / "fused")[f"{name}.gate_up_proj"], fused)
    assert torch.equal(tensors_of(tmp_path / "mergekit")[f"{name}.gate_up_proj"], fused)
    assert torch.equal(tensors_of(tmp_path / "transposed")[f"{name}.gate_up_proj"], fused.mT)
    assert torch.equal(tensors_of(tmp_path / "transposed")[f"{name}.down_proj"], down.mT)
    interleaved = tensors_of(tmp_path / "interleaved")[f"{name}.gate_up_proj"]
    assert torch.equal(interleaved[..., 0::2].mT, gate)
    assert torch.equal(interleaved[..., 1::2].mT, up)
    assert torch.equal(tensors_of(tmp_path / "per-expert")[f"{name}.2.up_proj.weight"], up[2])
    assert "model.layers.1.mlp.gate.weight" in tensors_of(tmp_path / "fused")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_every_bit_of_every_dtype_survives(dtype, mixtral, tmp_path):
    shutil.copytree(mixtral, tmp_path / "model")
    tensors = {}
    for name, tensor in load_file(mixtral / "model.safetensors").items():
        size = torch.empty(0, dtype=dtype).itemsize
        bits = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] * size), dtype=torch.uint8)
        tensors[name] = bits.view(dtype)  # NaNs with payloads among them
    save_file(tensors, tmp_path / "model/model.safetensors")
    convert(tmp_path / "model", tmp_path / "middle", "interleaved")
    convert(tmp_path / "middle", tmp_path / "back", "transformers")
    after = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(tensors[name].view(torch.uint8), after[name].view(torch.uint8)) for name in tensors)


def test_small_files_travel_along_and_the_layout_is_marked(mixtral, tmp_path):
    shutil.copytree(mixtral, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    (tmp_path / "model/code.py").write_text("raise SystemExit")
    done = convert(tmp_path / "model", tmp_path / "out", "transposed")
    assert done.opens == "moestro"
    assert json.loads((tmp_path / "out/config.json").read_text())["moestro_layout"] == "transposed"
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert not (tmp_path / "out/code.py").exists()


def test_further_prediction_layers_are_taken_along(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | extra, tmp_path / "model/model.safetensors")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    convert(tmp_path / "model", tmp_path / "fused", "fused")
    assert "model.layers.2.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "back", "transformers")
    assert_same_tensors(tmp_path / "model", tmp_path / "back")


def test_banks_are_found_by_layer(mixtral):
    with StockFolder(mixtral) as folder:
        layout, banks = find_banks(folder, find_family("mixtral", {}))
    assert layout == "transformers"
    assert [(bank.layer, bank.num_experts) for bank in banks] == [("model.layers.0.", 3), ("model.layers.1.", 3)]
    assert banks[0].shapes == {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
