"""Windows, sinks, scaled rotary positions and places of norms, each against a slow one."""

import math

import pytest
import torch
from torch.testing import assert_close

from moestro.models import build_language_model
from moestro.models.attention import GroupedQueryAttention
from moestro.models.rope_scaling import rotary_frequencies, yarn_temperature
from moestro.models.rotary import Rotary
from moestro.models.sinks import attend_with_sinks, within_window

SIZES = {"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "num_experts": 4, "max_length": 16}


def slow_attention(query, key, value, allowed, sinks, scale):
    """One query of one head at a time; `[length, heads, dim]`, key-value heads repeated."""
    length, heads, _ = query.shape
    rows = []
    for i in range(length):
        for h in range(heads):
            scores = [math.exp(scale * float(query[i, h] @ key[j, h])) for j in range(len(key)) if allowed(i, j)]
            seen = [j for j in range(len(key)) if allowed(i, j)]
            total = sum(scores) + math.exp(float(sinks[h]))
            rows.append(sum(s / total * value[j, h] for s, j in zip(scores, seen, strict=True)))
    return torch.stack(rows).view(length, -1)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_sinks_and_windows_are_those_of_a_loop(window):
    torch.manual_seed(0)
    query = torch.randn(1, 6, 4, 3, dtype=torch.float64)
    key, value = torch.randn(2, 1, 6, 2, 3, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64)
    mask = None if window is None else within_window(None, 6, 6, window, query.device)
    y = attend_with_sinks(query, key, value, mask, sinks, 0.7)[0]
    repeated = [each[0].repeat_interleave(2, dim=1) for each in (key, value)]

    def allowed(i, j):
        return j <= i and (window is None or j > i - window)

    assert_close(y, slow_attention(query[0], *repeated, allowed, sinks, 0.7))


def test_sinks_learn():
    query, key, value = torch.randn(3, 1, 5, 2, 4, dtype=torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: attend_with_sinks(query, key, value, None, s), sinks)


def test_a_window_of_later_queries_and_padding():
    mask = within_window(None, 2, 5, 2, torch.device("cpu"))
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    seen = torch.tensor([True, True, True, False, True]).expand(1, 1, 2, 5)
    assert within_window(seen, 2, 5, 2, mask.device)[0, 0].int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


def test_what_lies_before_the_window_changes_nothing():
    torch.manual_seed(0)
    attention, rotary = GroupedQueryAttention(8, 2, 1, 4, window=3, bias="all"), Rotary(4, 9)
    x = torch.randn(1, 9, 8)
    other = x.clone()
    other[:, :4] += 1
    first, second = attention(x, rotary(0, 9)), attention(other, rotary(0, 9))
    assert_close(first[:, 6:], second[:, 6:])
    assert not torch.allclose(first[:, 5], second[:, 5])


def test_features_behind_the_rotated_ones_stay():
    attention = GroupedQueryAttention(8, 1, 1, 8, rotary_dim=2)
    with torch.no_grad():
        attention.qkv.weight[:, :] = 0
        attention.qkv.weight[2:8] = attention.qkv.weight[10:16] = torch.eye(8)[2:]  # scores of unrotated features
        attention.qkv.weight[16:] = attention.output.weight[:] = torch.eye(8)
    x = torch.randn(1, 5, 8)
    near, far = (attention(x, Rotary(2, 40)(start, 5)) for start in (0, 30))
    assert torch.equal(near, far)


def test_fast_turns_are_kept_and_slow_ones_stretched():
    scalings = [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 4096,
        },
    ]
    plain, _ = rotary_frequencies(64, 1e6, None)
    for scaling in scalings:
        scaled, _ = rotary_frequencies(64, 1e6, scaling)
        assert scaled[0] == plain[0]
        assert_close(scaled[-1], plain[-1] / 4)
        assert (scaled.diff() < 0).all()
    assert_close(rotary_frequencies(64, 1e6, {"rope_type": "linear", "factor": 2.0})[0], plain / 2)


def test_yarn_heats_as_the_papers_say():
    scaling = {"rope_type": "yarn", "factor": math.e, "original_max_position_embeddings": 64}
    assert rotary_frequencies(8, 1e4, scaling)[1] == pytest.approx(1.1)  # Peng et al. 2023, eq. 22: 0.1 ln s + 1
    assert yarn_temperature(scaling) == 1
    assert yarn_temperature({**scaling, "mscale_all_dim": 0.5}) == pytest.approx(1.05**2)
    both = {**scaling, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert rotary_frequencies(8, 1e4, both)[1] == 1


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic"}, "scaled by linear, llama3, yarn, or not at all"),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn scaling of rotary positions needs original_max_position"),
    ],
)
def test_other_scalings_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        rotary_frequencies(8, 1e4, scaling)


def test_each_norm_has_its_place():
    torch.manual_seed(0)
    for place, names in (
        ("before", {"attention_norm", "ffn_norm"}),
        ("after", {"attention_after", "ffn_after"}),
        ("both", {"attention_norm", "ffn_norm", "attention_after", "ffn_after"}),
    ):
        model = build_language_model(**SIZES, norm_place=place, norm="layer")
        found = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("layers.0")}
        assert {name for name in found if "norm" in name or "after" in name} == names
        assert all(f"layers.0.{name}.bias" in model.state_dict() for name in names)
        assert model.parameter_counts().total == sum(p.numel() for p in model.parameters())


def test_constants_scale_what_they_say():
    tokens = torch.arange(6).unsqueeze(0)
    plain = build_language_model(**SIZES, seed=0)
    divided = build_language_model(**SIZES, seed=0, logit_divisor=4.0)
    assert_close(divided(tokens), plain(tokens) / 4)
    larger = build_language_model(**SIZES, seed=0, embedding_scale=3.0, tied_embeddings=False)
    assert_close(
        larger.layers[0].attention_norm(larger.embedding_scale(larger.embedding(tokens))),
        larger.layers[0].attention_norm(3 * larger.embedding(tokens)),
    )
    with torch.no_grad():
        for model in (still := build_language_model(**SIZES, seed=0, residual_scale=1e-9), plain):
            for name, parameter in model.named_parameters():
                if name.endswith(("output.weight", "down")):
                    parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        assert_close(still.hidden_states(tokens), still.norm(still.embedding(tokens)), atol=1e-6, rtol=0)
        assert not torch.allclose(plain.hidden_states(tokens), plain.norm(plain.embedding(tokens)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "norm='batch'; pass rms or layer"),
        ({"norm_place": "after", "residual_scale": 0.5}, "has no effect under norms that come after"),
        ({"windows": [4]}, "a number of positions or None for each of the 2 layers"),
        ({"windows": [4, 0]}, "a number of positions or None for each of the 2 layers"),
        ({"rope_dim": 6}, "rope_dim=6 but a head has 4 features"),
        ({"attention": "latent", "sinks": True}, "sinks=True is for grouped-query attention"),
        ({"activation": "clamped_swiglu", "kernel": "tiled"}, "fused operators have no clamped_swiglu"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_language_model(**SIZES, **settings)
