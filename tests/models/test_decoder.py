"""The language model as a whole: causal, padded, cached, and clear about what it cannot take."""

import pytest
import torch
from oracles.tiny_models import CAUSAL_METHODS, facts, tiny_model, tokens_for
from torch.testing import assert_close

import moestro

ALL = [None, *CAUSAL_METHODS]
DROPLESS = [name for name in ALL if name is None or tiny_model(name).batch_independent]


@pytest.mark.parametrize("method", ALL)
def test_later_tokens_cannot_change_earlier_logits(method):
    model = tiny_model(method)
    tokens = tokens_for(model, batch=1)  # with a capacity, other sequences may take a token's place
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % model.vocab_size
    before, after = model(tokens, **facts(tokens)), model(changed, **facts(tokens))
    assert_close(after[:, :15], before[:, :15])
    assert (after[:, 15:] - before[:, 15:]).abs().max() > 1e-3


@pytest.mark.parametrize("method", DROPLESS)
def test_padding_changes_no_valid_logit(method):
    model = tiny_model(method)
    tokens = tokens_for(model, batch=3, length=10)
    padded, valid = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.bool)
    for row, start in enumerate((0, 6, 2)):  # behind, before, on both sides
        padded[row, start : start + 10], valid[row, start : start + 10] = tokens[row], True
    logits = model(padded, valid=valid, domain=facts(tokens)["domain"][:, :1].expand_as(padded))
    assert torch.isfinite(logits).all()
    alone = torch.stack([logits[row][valid[row]] for row in range(3)])
    assert_close(
        alone, model(tokens, **facts(tokens)), atol=1e-4, rtol=1e-4
    )  # rotation by another position is another rounding


@pytest.mark.parametrize("method", DROPLESS)
def test_a_cache_filled_in_pieces_gives_the_same_logits(method):
    model = tiny_model(method)
    tokens = tokens_for(model)
    cache = model.new_cache(2)
    domain = facts(tokens)["domain"]
    pieces = [
        model(piece, cache=cache, domain=domain[:, : piece.shape[1]]) for piece in tokens.split([9, 1, 14], dim=1)
    ]
    assert cache.length == 24
    assert_close(torch.cat(pieces, dim=1), model(tokens, domain=domain), atol=1e-5, rtol=1e-4)


def test_tied_embeddings_are_one_matrix():
    tied, untied = tiny_model(), tiny_model(tied_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_gradients_reach_every_parameter():
    model = tiny_model("deepseek-v3", q_lora_rank=8, first_dense=1, options={"top_k": 4}).train()
    model(tokens_for(model, batch=8)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_autocast_keeps_the_residual_stream_in_float32():
    model, seen = tiny_model(), []
    model.layers[1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens_for(model))
    assert (seen, logits.dtype) == ([torch.float32], torch.bfloat16)
    exact = model(tokens_for(model))
    close = (logits.float() - exact).norm() / exact.norm()  # a token near a tie may take another expert
    assert close < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m(t[0]), r"pass \[batch, length\]"),
        (lambda m, t: m(t.repeat(1, 10)), "max_length=128"),
        (lambda m, t: m(t, valid=t > 0, cache=m.new_cache(2)), "padding cannot be combined"),
        (lambda m, t: m(t, cache=m.new_cache(2, 8)), "room for 8 tokens but 24"),
    ],
)
def test_bad_calls_are_refused(call, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        call(model, tokens_for(model))


@torch.no_grad()
def test_routers_of_later_layers_see_what_the_mixture_before_them_decided():
    """MoE++ adds the previous logits; the first mixture has none, a dense layer between does not matter."""
    model = tiny_model("moe-plus-plus", every=2, num_layers=6).eval()
    log, tokens = moestro.RoutingLog(model), tokens_for(model)
    states: dict[str, torch.Tensor] = {}
    for name in log.layers:
        router = model.get_submodule(name).router
        router.register_forward_pre_hook(lambda _, inputs, name=name: states.update({name: inputs[0]}))
    with log.recording():
        model(tokens)
    before = None
    for name in log.layers:
        scorer, (decision,) = model.get_submodule(name).router.scorer, log.decisions[name]
        expected = states[name] @ scorer.scorer.weight.T
        if before is not None:
            assert float((before @ scorer.weight.T).abs().max()) > 1e-3
            expected = expected + before @ scorer.weight.T
        assert_close(decision.logits, expected)
        before = decision.logits
    assert len(log.layers) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_without_a_sequence_computes_nothing(dtype):
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "num_experts": 4, "expert_hidden": 16}
    model = moestro.build_language_model(vocab_size=32, method="mixtral", seed=0, **sizes)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert model(torch.zeros(0, 8, dtype=torch.long)).shape == (0, 8, 32)
