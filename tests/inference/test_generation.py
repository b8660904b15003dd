"""Generation: the cache changes the speed, never the text."""

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, tiny_model, tokens_for
from torch.testing import assert_close

import moestro
from moestro.inference import check_generation, generate
from moestro.models import build_language_model

DROPLESS = [name for name in (None, *CAUSAL_METHODS) if name is None or tiny_model(name).batch_independent]


@pytest.mark.parametrize("method", DROPLESS)
def test_greedy_text_is_the_same_with_and_without_cache(method):
    model = tiny_model(method)
    prompt = tokens_for(model)[0]
    cached, plain = (list(generate(model, prompt, 40, cache=cache, domain=1)) for cache in (True, False))
    assert cached == plain
    assert len(cached) == 40


def test_greedy_text_is_the_argmax_one_token_at_a_time():
    model = tiny_model("deepseek-v3")
    tokens = tokens_for(model, batch=1, length=5)
    for token in generate(model, tokens[0].tolist(), 10):
        assert token == int(model(tokens)[0, -1].argmax())
        tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_sampled_text_is_the_same_with_and_without_cache_and_follows_the_seed():
    model = tiny_model()
    settings = {"temperature": 1.0, "top_p": 0.9}
    texts = [
        list(generate(model, [1, 2], 30, seed=seed, cache=cache, **settings))
        for seed, cache in ((3, True), (3, False), (4, True))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_stream_and_the_mode_comes_back():
    model = tiny_model().train()
    stream = generate(model, [1, 2, 3], 10)
    first = next(stream)
    assert not model.training
    stream.close()
    assert model.training
    assert first == next(generate(model, [1, 2, 3], 1))


def test_stop_tokens_end_the_text_and_are_not_returned():
    model = tiny_model()
    text = list(generate(model, [1, 2, 3], 10))
    stop = text[4]
    assert list(generate(model, [1, 2, 3], 10, stop=[stop])) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 5, "the prompt is empty"),
        ([1, 64], 5, "token 64 but the model knows ids 0 to 63"),
        ([1, 2], 127, "exceed max_length=128"),
        ([1], -1, "pass 0 or more"),
    ],
)
def test_impossible_requests_are_refused_at_once(prompt, count, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), prompt, count)


@pytest.mark.parametrize("table", ["bigram", "previous"])
def test_routers_that_look_back_generate_without_the_cache(table: str) -> None:
    options = {"table": table, "vocab_size": 32}
    model = build_language_model(
        vocab_size=32,
        width=16,
        num_layers=2,
        num_heads=2,
        method="hash-layers",
        options=options,
        max_length=64,
        seed=0,
    )
    assert not model.cacheable
    prompt = torch.arange(8)
    cached = list(generate(model, prompt, max_new_tokens=20, cache=True))
    assert cached == list(generate(model, prompt, max_new_tokens=20, cache=False))


# methods that look at later tokens in training only, and have a causal rule of their own for evaluation
EVALUATED_CAUSALLY = [
    ("base-layers", {}),
    ("s-base-sinkhorn", {}),
    ("mixture-of-depths", {}),
    ("expert-choice", {"predict": 0.1}),
]


@pytest.mark.parametrize(("method", "options"), EVALUATED_CAUSALLY)
def test_methods_with_a_causal_rule_generate_by_it(method, options):
    model = tiny_model(method, options=options)
    tokens = tokens_for(model, batch=1)
    with torch.no_grad():
        whole, start = model(tokens), model(tokens[:, :9])
        other = tokens.clone()
        other[:, 9:] = (other[:, 9:] + 1) % model.vocab_size
        assert_close(whole[:, :9], start, rtol=1e-5, atol=1e-5)
        assert_close(model(other)[:, :9], start, rtol=1e-5, atol=1e-5)
        model.train()
        assert not torch.allclose(model(tokens)[:, :9], model(other)[:, :9]), "training looks at later tokens"
    cached, plain = (list(generate(model, tokens[0, :6], 30, cache=cache)) for cache in (True, False))
    assert cached == plain


def with_layer(method, **options):
    """A model whose second layer is of another method, put in by hand."""
    model = tiny_model("mixtral")
    sizes = {"width": 32, "hidden": 24, "num_experts": 8}
    model.layers[1].moe = moestro.build(method, **sizes, **options)
    return model


@pytest.mark.parametrize("method", ["soft-moe", "expert-choice", "expert-choice-capped", "smear", "pmoe-patch"])
def test_methods_without_one_are_refused(method):
    with pytest.raises(ValueError, match=rf"layers.1.moe \({method}\) looks at later tokens"):
        generate(with_layer(method), [1, 2, 3], 2)


def test_sequences_that_would_change_one_another_are_not_generated_together():
    check_generation(with_layer("switch"))
    check_generation(with_layer("deepseek-v3", top_k=2), sequences=3)
    with pytest.raises(ValueError, match=r"layers.1.moe \(switch\) routes 3 sequences together"):
        check_generation(with_layer("switch"), sequences=3)
