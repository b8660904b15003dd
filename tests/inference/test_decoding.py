"""The decoder computes what the model computes, one token at a time."""

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, tiny_model, tokens_for
from torch.testing import assert_close

from moestro.inference import generate, lay_out_for_decoding, plan_decoding, quantise_model
from moestro.inference.attention_step import CachedAttention
from moestro.inference.compiled_step import CompiledAttention, CompiledDense, CompiledMixture
from moestro.inference.decoding import Decoder, suits_decoder
from moestro.inference.feed_forward_step import MixtureStep
from moestro.kernels.compiled import why_not
from moestro.models import DecoderLM

CACHED = [name for name in (None, *CAUSAL_METHODS) if name is None or tiny_model(name).batch_independent]
PROMPT, LENGTH = 9, 24


needs_compiled = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
each_kind = pytest.mark.parametrize("steps", ["torch", pytest.param("compiled", marks=needs_compiled)])


def both(model: DecoderLM, tokens: torch.Tensor, steps: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at every position behind the prompt, by the decoder and by the model on the whole text at once."""
    domain = torch.ones_like(tokens)
    with torch.inference_mode():
        whole = model(tokens, domain=domain)[0, PROMPT:]
        cache = model.new_cache(1, LENGTH)
        model(tokens[:, :PROMPT], cache=cache, domain=domain[:, :PROMPT])
    decoder = Decoder(model, cache, domain=1, steps=steps)
    return torch.stack([decoder(token) for token in tokens[0, PROMPT:].tolist()]), whole


@each_kind
@pytest.mark.parametrize("method", CACHED)
def test_equals_the_model_for_every_method(method, steps):
    model = tiny_model(method)
    if not model.cacheable:
        pytest.skip("looks at earlier tokens, so nothing is cached")
    assert_close(*both(model, tokens_for(model, batch=1, length=LENGTH), steps), rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_equals_the_model_for_every_attention(num_kv_heads, qk_norm, steps):
    model = tiny_model("qwen3", num_kv_heads=num_kv_heads, qk_norm=qk_norm, options={"top_k": 3})
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide which weight goes where
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    kind = CachedAttention if steps == "torch" else CompiledAttention
    assert isinstance(Decoder(model, model.new_cache(1, 4), steps=steps).steps[0], kind)
    assert_close(*both(model, tokens_for(model, batch=1, length=LENGTH), steps), rtol=1e-4, atol=1e-4)


@each_kind
@pytest.mark.parametrize("windows", [None, (3, None, 1), (PROMPT + 4, 30, 2)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_equals_the_model_with_windows_and_sinks(num_kv_heads, sinks, windows, steps):
    model = tiny_model("mixtral", num_kv_heads=num_kv_heads, windows=windows, sinks=sinks)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2)
    kind = CachedAttention if steps == "torch" else CompiledAttention
    decoder = Decoder(model, model.new_cache(1, 4), steps=steps)
    assert all(isinstance(step, kind) for step in decoder.steps[::2])
    assert_close(*both(model, tokens_for(model, batch=1, length=LENGTH), steps), rtol=1e-4, atol=1e-4)


@needs_compiled
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("method", ["qwen-moe", "deepseekmoe"])
def test_compiles_shared_experts_dense_layers_and_biases(method, bits):
    biases = {"attention_bias": "all", "head_bias": True, "expert_bias": method == "qwen-moe"}
    model = tiny_model(method, num_kv_heads=2, first_dense=1, tied_embeddings=False, **biases)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = model if bits == 32 else model.bfloat16()
    if bits < 16:
        quantise_model(model, bits, group=32)
    lay_out_for_decoding(model, "compiled")
    kinds = [type(step) for step in Decoder(model, model.new_cache(1, 4), steps="compiled").steps]
    assert kinds == [CompiledAttention, CompiledDense, *[CompiledAttention, CompiledMixture] * 2]
    assert plan_decoding(model) == "compiled steps for 6 of 6 half layers"
    decoded, whole = both(model, tokens_for(model, batch=1, length=LENGTH), "compiled")
    assert float((decoded.float() - whole.float()).norm() / whole.float().norm()) < (1e-5 if bits == 32 else 0.04)


@each_kind
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_bfloat16_and_codes_stay_within_their_rounding(activation, steps):
    for bits, far in ((16, 0.03), (8, 0.04), (4, 0.04)):
        model = tiny_model("olmoe", activation=activation).bfloat16()
        if bits < 16:
            quantise_model(model, bits, group=32)
        kind = MixtureStep if steps == "torch" else CompiledMixture
        assert isinstance(Decoder(model, model.new_cache(1, 4), steps=steps).steps[1], kind)
        decoded, whole = both(model, tokens_for(model, batch=1, length=LENGTH), steps)
        assert float((decoded.float() - whole.float()).norm() / whole.float().norm()) < far, bits


def test_whoever_watches_a_module_sees_it_run():
    model, seen = tiny_model(), []
    assert suits_decoder(model)
    handle = model.layers[1].moe.router.register_forward_hook(lambda *_: seen.append(1))
    assert not suits_decoder(model)
    list(generate(model, [1, 2, 3], 5))
    assert len(seen) == 5
    handle.remove()
    assert suits_decoder(model)
    assert not suits_decoder(tiny_model().double())


def test_generation_goes_through_it(monkeypatch):
    calls = []
    monkeypatch.setattr(Decoder, "__call__", lambda self, token: calls.append(token) or torch.zeros(64))
    assert list(generate(tiny_model(), [1, 2, 3], 4))[1:] == [0, 0, 0]
    assert len(calls) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_laid_out_for_decoding_are_the_same_matrices(threads):
    model = tiny_model("olmoe", tied_embeddings=False).bfloat16()
    tokens = tokens_for(model, batch=1, length=LENGTH)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, _ = both(model, tokens)
    lay_out_for_decoding(model, "torch")
    assert model.head.weight.t().is_contiguous()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        laid_out, _ = both(model, tokens)
    finally:
        torch.set_num_threads(before)
    assert float((laid_out.float() - plain.float()).norm() / plain.float().norm()) < 0.02


def test_a_matrix_shared_with_the_embedding_stays_by_rows():
    model = tiny_model("olmoe").bfloat16()
    lay_out_for_decoding(model, "torch")
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.is_contiguous()
    assert model.layers[0].attention.qkv.weight.t().is_contiguous()


@needs_compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_compiled_steps_say_the_same_with_any_threads(bits, threads):
    model = tiny_model("qwen3", num_kv_heads=2, qk_norm="head", options={"top_k": 3})
    model = model if bits == 32 else model.bfloat16()
    if bits < 16:
        quantise_model(model, bits, group=32)
    lay_out_for_decoding(model, "compiled")
    tokens = tokens_for(model, batch=1, length=LENGTH)
    alone, _ = both(model, tokens, "compiled")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together, _ = both(model, tokens, "compiled")
    finally:
        torch.set_num_threads(before)
    # the prompt is read by the model, whose bfloat16 products depend on threads
    assert float((together - alone).norm() / alone.norm()) < (1e-5 if bits == 32 else 0.02)


@needs_compiled
def test_logits_of_a_token_outlive_the_next():
    model = tiny_model("olmoe", tied_embeddings=False)
    decoder = Decoder(model, model.new_cache(1, 4), steps="compiled")
    first = decoder(1)
    copy = first.clone()
    decoder(2)
    assert torch.equal(first, copy)


def test_the_plan_says_what_will_decode():
    model = tiny_model("olmoe")
    assert plan_decoding(model, "torch") == "torch's operators"
    assert plan_decoding(tiny_model().double()) == "the model's own forward pass"
    if why_not() is None:
        both_halves = 2 * len(model.blocks)
        assert plan_decoding(model) == f"compiled steps for {both_halves} of {both_halves} half layers"
        latent = tiny_model(attention="latent", kv_lora_rank=8, rope_dim=4)
        assert plan_decoding(latent) == "compiled steps for 3 of 6 half layers, torch's operators for the others"


def test_the_plan_names_what_is_missing(monkeypatch):
    from moestro.inference import decoding

    reason = "numba is not installed; pip install 'moestro[fast]'"
    monkeypatch.setattr(decoding, "why_not", lambda: reason)
    monkeypatch.setattr(decoding, "choose_steps", lambda name: "torch")
    assert plan_decoding(tiny_model("olmoe")) == f"torch's operators ({reason})"
