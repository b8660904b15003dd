"""Recorded routing comes back on other back ends, dtypes and micro-batches, with live router gradients."""

import json
from functools import partial

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close
from transformers import OlmoeConfig, OlmoeForCausalLM

import moestro
from moestro.hf import find_layers, load_trace, use_experts


def recorded(model, batch, folder=None):
    log = moestro.watch(model)
    with log.record(folder) as trace, torch.no_grad():
        model(**batch)
    log.close()
    return trace


def gradients(model, batches, trace=None):
    """Summed router gradients, and the chosen experts of every layer."""
    model.zero_grad()
    log = moestro.watch(model)
    chosen = {name: [] for name in log.layers}
    with moestro.replay(model, trace) if trace is not None else torch.enable_grad():
        for batch in batches:
            with log.recording():
                out = model(**batch)
            for name, (decision,) in log.decisions.items():
                index = decision.notes["choice"]
                chosen[name].append(index[decision.notes["valid"]] if "valid" in decision.notes else index)
            (out.loss * batch["labels"].ge(0).sum()).backward()
    log.close()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return grads, {name: torch.cat(each).sort(-1).values for name, each in chosen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_on_the_same_model_changes_nothing(family):
    model = tiny_model(family)
    batch = tiny_batch(model, padding=2)
    trace = recorded(model, batch)
    plain, chosen = gradients(model, [batch])
    again, rechosen = gradients(model, [batch], trace)
    for name, grad in plain.items():
        assert_close(again[name], grad, rtol=1e-5, atol=1e-7)
    for name, layer in find_layers(model).items():
        assert torch.equal(rechosen[name], chosen[name])
        router = next(p for n, p in model.named_parameters() if n.startswith(name) and p is first(layer.router))
        assert router.grad.any()


def first(router):
    return next(p for p in router.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "switch_transformers"])
def test_choices_of_another_model_are_carried_out_with_live_weights(family):
    teacher, model = tiny_model(family, seed=1), tiny_model(family)
    batch = tiny_batch(model)
    trace = recorded(teacher, batch)
    grads, chosen = gradients(model, [batch], trace)
    _, own = gradients(model, [batch])
    for name, layer in find_layers(model).items():
        there = trace.layers[name]
        kept = torch.ones_like(there.index, dtype=torch.bool) if there.keep is None else there.keep
        kept = kept.all(-1)
        assert torch.equal(chosen[name][kept], there.index.long().sort(-1).values[kept])
        assert not torch.equal(chosen[name], own[name])
        live = next(n for n, p in model.named_parameters() if p is first(layer.router))
        assert grads[live].any()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_eager_float32_replays_on_ours_in_bfloat16_in_other_micro_batches(reentrant):
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    batch = tiny_batch(model, batch=8, padding=3)
    trace = recorded(model, batch)
    model = use_experts(model).to(torch.bfloat16).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    pieces = [{n: v[rows] for n, v in batch.items()} for rows in (slice(0, 1), slice(1, 6), slice(6, 8))]
    pieces[0] = {n: v[:, :-3] for n, v in pieces[0].items()}  # without the padding that was there
    grads, chosen = gradients(model, pieces, trace)
    for name, layer in trace.layers.items():
        assert torch.equal(chosen[name], layer.index.long().sort(-1).values)
    assert all(grads[n].any() for n in grads if "gate.weight" in n)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_recomputation_meets_its_own_choices_whatever_the_order_of_backward(reentrant, order):
    teacher, model = tiny_model("mixtral", seed=1), tiny_model("mixtral").train()
    batch = tiny_batch(model, batch=4)
    trace = recorded(teacher, batch)
    halves = [{n: v[rows] for n, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    plain, _ = gradients(model, halves, trace)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.zero_grad()
    with moestro.replay(model, trace):
        losses = [model(**half).loss * half["labels"].numel() for half in halves]
        for index in order:
            losses[index].backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[name])


def test_a_streamed_trace_reads_back_as_the_one_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("moestro.hf.tracewriter.PART_BYTES", 200)
    model = tiny_model("switch_transformers")
    batch = tiny_batch(model, padding=2)
    kept = recorded(model, batch)
    log = moestro.watch(model)
    with log.record(tmp_path / "streamed") as trace, torch.no_grad():
        assert not (tmp_path / "streamed").exists()
        model(**batch)
    assert trace.folder == tmp_path / "streamed"
    assert len(list(trace.folder.glob("*.safetensors"))) > 1
    kept.save(tmp_path / "saved")
    for folder in ("streamed", "saved"):
        read = load_trace(tmp_path / folder)
        assert read.fingerprint == kept.fingerprint
        assert read.layers.keys() == kept.layers.keys()
        assert {side: ids.tolist() for side, ids in read.ids.items()} == {
            s: i.tolist() for s, i in kept.ids.items()
        }
        for name, layer in kept.layers.items():
            assert torch.equal(read.layers[name].index, layer.index)
            assert torch.equal(read.layers[name].keep, layer.keep)
            assert torch.equal(read.layers[name].weight.float(), layer.weight.float())
    assert kept.num_tokens == int(batch["attention_mask"].sum())
    gradients(model, [batch], tmp_path / "streamed")


@pytest.mark.nightly
def test_a_million_tokens_in_sixteen_layers_stay_under_300_megabytes(tmp_path):
    config = OlmoeConfig(
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=16,
        num_attention_heads=1,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=64,
        max_position_embeddings=128,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).eval()
    use_experts(model)
    log = moestro.watch(model)
    with log.record(tmp_path / "million") as trace, torch.no_grad():
        for _ in range(64):
            model.model(input_ids=torch.randint(64, (128, 128)))
    assert load_trace(trace.folder).num_tokens == 2**20
    size = sum(file.stat().st_size for file in trace.folder.iterdir())
    assert 2**20 * 16 * 8 < size < 300e6


def test_bad_traces_are_refused_by_name(tmp_path):
    model = tiny_model("mixtral")
    batch = tiny_batch(model)
    trace = recorded(model, batch)
    run = partial(gradients, model)
    with pytest.raises(ValueError, match="another model: its model_type is mixtral, this model's is olmoe"):
        gradients(tiny_model("olmoe"), [batch], trace)
    with pytest.raises(ValueError, match="num_experts"):
        gradients(tiny_model("mixtral", num_experts=7), [batch], trace)
    short = {n: v[:1] for n, v in batch.items()}
    with pytest.raises(ValueError, match=r"18 tokens .* but 9 were replayed"):
        run([short], trace)
    with pytest.raises(ValueError, match="brings 18 tokens but the trace has 0 of 18 left"):
        run([batch, batch], trace)
    with pytest.raises(ValueError, match="token 0 is not the one"):
        run([tiny_batch(model, seed=5)], trace)
    folder = trace.save(tmp_path / "trace")
    with pytest.raises(ValueError, match="exists already"):
        trace.save(folder)
    part = folder / "part-00000.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="it was cut"):
        load_trace(folder)
    part.unlink()
    with pytest.raises(ValueError, match="lacks its part"):
        load_trace(folder)
    (folder / "trace.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_trace(folder)
    (folder / "trace.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="version 1"):
        load_trace(folder)
    with pytest.raises(ValueError, match="no routing trace"):
        load_trace(tmp_path)


def test_an_interrupted_recording_leaves_nothing(tmp_path):
    model = tiny_model("mixtral")
    log = moestro.watch(model)

    def stopped():
        with log.record(tmp_path / "trace"):
            model(**tiny_batch(model))
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_a_model_after_replay_routes_as_before():
    model = tiny_model("deepseek_v3")
    batch = tiny_batch(model)
    before = model(**batch).logits
    with moestro.replay(model, recorded(tiny_model("deepseek_v3", seed=1), batch)):
        assert not torch.allclose(model(**batch).logits, before)
    assert torch.equal(model(**batch).logits, before)
