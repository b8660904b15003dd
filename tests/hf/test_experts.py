"""Our experts back end computes what transformers' eager path computes, in every family, layout and size."""

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close

import moestro.hf
from moestro.hf import find_layers, use_experts

transformers = pytest.importorskip("transformers")


def outputs_and_gradients(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def distance(ours, theirs):
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


EQUALS = [name for name in FAMILIES if name != "nllb_moe"]  # transformers computes that one wrongly


def too_far(ours, theirs, allowed):
    assert ours.keys() == theirs.keys()
    far = {name: distance(ours[name], theirs[name]) for name in theirs}
    return {name: d for name, d in far.items() if d > allowed(name)}


@pytest.mark.parametrize("family", EQUALS)
def test_logits_and_gradients_equal_the_eager_path(family):
    model = tiny_model(family, hidden=17)
    batch = tiny_batch(model, batch=1, length=7)
    theirs = outputs_and_gradients(model, batch)
    assert any("experts" in name and grad.any() for name, grad in theirs.items())
    ours = outputs_and_gradients(use_experts(model), batch)
    assert too_far(ours, theirs, lambda name: 1e-5) == {}
    again = outputs_and_gradients(use_experts(model, "eager"), batch)
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def as_routed(layer):
    """Put the definition in the place of NLLB's experts: every gate times what its expert answers."""

    def forward(x, first, gates):
        return sum(gates[:, e : e + 1] * layer.experts[f"expert_{e}"](x) for e in range(layer.num_experts))

    layer.experts.forward = forward


def test_nllb_equals_the_definition_since_transformers_runs_other_experts():
    """Logits and every gradient of the whole model; only experts 0 and 1 run in transformers' own."""
    model = tiny_model("nllb_moe", hidden=17)
    batch = tiny_batch(model, batch=1, length=7)
    wrong = outputs_and_gradients(model, batch)
    for layer in find_layers(model).values():
        as_routed(layer)
    theirs = outputs_and_gradients(model, batch)
    ours = outputs_and_gradients(use_experts(tiny_model("nllb_moe", hidden=17)), batch)
    chosen = {name: gradient for name, gradient in ours.items() if gradient.any() and name in theirs}
    chosen = {name: each for name, each in chosen.items() if not name.endswith("k_proj.bias")}  # 0 but for rounding
    assert too_far(chosen, {name: theirs[name] for name in chosen}, lambda name: 1e-5) == {}
    assert any(f".expert_{e}." in name for name in chosen for e in range(2, 6))
    assert distance(wrong["logits"], theirs["logits"]) > 1e-3


def in_bfloat16(family, seed):
    """Logits and gradients of our path and of eager's in bfloat16, and eager's in float32 with the same weights."""
    model = tiny_model(family, hidden=17, seed=seed).to(torch.bfloat16)
    batch = tiny_batch(model, batch=1, length=7)
    theirs = outputs_and_gradients(model, batch)
    ours = outputs_and_gradients(use_experts(model), batch)
    return ours, theirs, outputs_and_gradients(use_experts(model, "eager").float(), batch)


@pytest.mark.parametrize("family", EQUALS)
def test_bfloat16_differs_from_the_eager_path_less_than_that_from_float32(family):
    ours, theirs, exact = in_bfloat16(family, seed=0)
    assert distance(ours["logits"], theirs["logits"]) < 2e-2
    # through two layers of attention both round more: eager itself is 0.02 to 0.1 away from float32 there

    def allowed(name):
        own = distance(theirs[name], exact[name])
        return max(2e-2 if ".experts." in name else 5e-2, 1.5 * own)

    assert too_far(ours, theirs, allowed) == {}


@pytest.mark.nightly
@pytest.mark.parametrize("family", EQUALS)
def test_distances_from_float32_of_both_paths(family, capsys):
    """Prints a row of the table in docs/transformers.md: means over 8 draws of weights."""
    draws = [in_bfloat16(family, seed) for seed in range(8)]

    def mean(path, keep):
        far = [distance(draw[path][name], draw[2][name]) for draw in draws for name in draw[2] if keep(name)]
        return sum(far) / len(far)

    parts = {
        "logits": lambda name: name == "logits",
        "experts": lambda name: "experts" in name and "shared" not in name,
        "others": lambda name: name != "logits" and "experts" not in name,
    }
    figures = {part: (mean(1, keep), mean(0, keep)) for part, keep in parts.items()}
    with capsys.disabled():
        print(f"\n| {family} | " + " | ".join(f"{a:.4f} / {b:.4f}" for a, b in figures.values()) + " |")
    assert all(ours < 1.25 * eager for eager, ours in figures.values())


def test_bfloat16_is_as_near_to_float32_as_the_eager_path_over_many_draws():
    # flex_olmo, because there the two paths differ most (gate_up_proj 0.027, seed 0). One draw is luck: ours is
    # 0.3 to 1.6 times as far from float32 as eager; over 16 draws 0.86 times, in the experts alone 0.94 times.
    draws = [in_bfloat16("flex_olmo", seed) for seed in range(8)]
    for part in ("", ".experts."):
        ours, theirs = (
            sum(distance(draw[i][name], draw[2][name]) for draw in draws for name in draw[2] if part in name)
            for i in (0, 1)
        )
        assert theirs > 0.1
        assert ours < 1.2 * theirs


@pytest.mark.parametrize("family", ["flex_olmo", "qwen3_moe"])
def test_one_bank_in_bfloat16_rounds_no_more_than_the_eager_path(family):
    """Averaged over draws with the choices given, so that neither luck nor a changed choice hides a rounding."""
    bank = next(iter(find_layers(tiny_model(family, hidden=17)).values())).experts.to(torch.bfloat16)
    eager = type(bank).forward
    errors = []
    for _ in range(12):
        for p in bank.parameters():
            p.data.normal_(0.0, 0.2)
        x, probe = torch.randn(2, 40, 24).to(torch.bfloat16)
        drawn = x, probe, torch.rand(40, 6).topk(2).indices, torch.rand(40, 2).to(torch.bfloat16)
        exact = bank_gradients(bank, eager, drawn, torch.float64)
        errors.append(
            [
                [
                    distance(y, z)
                    for y, z in zip(bank_gradients(bank, forward, drawn, torch.bfloat16), exact, strict=True)
                ]
                for forward in (moestro.hf.experts_forward, eager)
            ]
        )
    ours, theirs = torch.tensor(errors).mean(0)
    assert (theirs > 1e-3).all()
    assert (ours < 1.2 * theirs).all(), (ours, theirs)


def bank_gradients(bank, forward, drawn, dtype):
    """The output, and the gradients of rows, weights and parameters, in a dtype."""
    x, probe, index, weight = drawn
    bank, inputs = bank.to(dtype), [each.to(dtype).requires_grad_() for each in (x, weight)]
    y = forward(bank, inputs[0], index, inputs[1])
    return [y, *torch.autograd.grad((y * probe.to(dtype)).sum(), [*inputs, *bank.parameters()])]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_function_really_runs(family, monkeypatch):
    calls = []
    real = moestro.hf.experts.SparseRouting.from_choice.__func__
    spy = classmethod(lambda cls, *a, **k: calls.append(1) or real(cls, *a, **k))
    monkeypatch.setattr(moestro.hf.experts.SparseRouting, "from_choice", spy)
    model = use_experts(tiny_model(family))
    model(**tiny_batch(model))
    assert len(calls) == len(find_layers(model))


def test_transformers_alone_can_set_the_backend():
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("moestro")
    assert model.config._experts_implementation == "moestro"


def test_the_default_experts_crash_on_odd_sizes_where_ours_work():
    model = tiny_model("olmoe", experts="grouped_mm", hidden=77)
    batch = tiny_batch(model)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        model(**batch)
    ours = use_experts(model)(**batch).logits
    assert_close(ours, use_experts(model, "eager")(**batch).logits, rtol=1e-5, atol=1e-5)


class Bank(nn.Module):
    """A bank in the manner of transformers, in any layout, with its own loop over experts as the oracle."""

    def __init__(self, width, hidden, gated, bias, transposed, norm, num_experts=5, dtype=torch.float64):
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = num_experts, gated, bias
        self.is_transposed, self.has_post_expert_norm, self._is_expert_parallel = transposed, norm, False
        shapes = {"gate_up_proj" if gated else "up_proj": (width, hidden * (2 if gated else 1))}
        shapes["down_proj"] = (hidden, width)
        for name, (rows, columns) in shapes.items():
            shape = (rows, columns) if transposed else (columns, rows)
            setattr(self, name, nn.Parameter(torch.randn(num_experts, *shape, dtype=dtype) / 4))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(num_experts, columns, dtype=dtype)))
        self.post_expert_norm = nn.LayerNorm(width, dtype=dtype) if norm else None
        self.act_fn = nn.functional.silu

    def _apply_gate(self, gate_up):  # interleaved and clamped
        gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
        return self.act_fn(gate) * (up + 1)

    def slow(self, x, index, weight):
        y = []
        for t in range(len(x)):
            total = torch.zeros_like(x[t])
            for e, w in zip(index[t].tolist(), weight[t], strict=True):
                if e < self.num_experts:
                    total = total + w * self.one(x[t], e)
            y.append(total)
        return torch.stack(y)

    def one(self, x, e):
        def linear(x, name):
            matrix = getattr(self, name)[e]
            y = x @ (matrix if self.is_transposed else matrix.t())
            return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

        h = linear(x, "gate_up_proj" if self.has_gate else "up_proj")
        y = linear(self._apply_gate(h) if self.has_gate else self.act_fn(h), "down_proj")
        return self.post_expert_norm(y) if self.has_post_expert_norm else y


@pytest.mark.parametrize("sizes", [(17, 77), (77, 17), (16, 32)])
@pytest.mark.parametrize(
    ("gated", "bias", "transposed", "norm", "parallel"),
    [
        (True, False, False, False, False),
        (True, True, True, False, True),
        (False, True, False, False, False),
        (False, False, True, True, True),
    ],
)
def test_every_layout_equals_a_loop_over_tokens(sizes, gated, bias, transposed, norm, parallel):
    bank = Bank(*sizes, gated, bias, transposed, norm)
    bank._is_expert_parallel = parallel
    x = torch.randn(9, sizes[0], dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(bank.num_experts - 1)[:2] for _ in x])  # the last expert starves
    if parallel:
        index[::3, 1] = bank.num_experts  # sentinel: another rank's expert
    weight = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    inputs = [x, weight, *bank.parameters()]
    probe = torch.randn(9, sizes[0], dtype=torch.float64)
    ours, theirs = moestro.hf.experts_forward(bank, x, index, weight), bank.slow(x, index, weight)
    assert_close(ours, theirs)
    grads = [torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True) for y in (ours, theirs)]
    for mine, slow in zip(*grads, strict=True):
        assert_close(mine, slow)


def test_no_token_and_all_tokens_to_one_expert():
    bank = Bank(17, 77, True, True, False, False, dtype=torch.float32)
    empty = torch.zeros(0, 2, dtype=torch.long)
    y = moestro.hf.experts_forward(bank, torch.zeros(0, 17), empty, torch.zeros(0, 2))
    assert y.shape == (0, 17)
    x, index, weight = torch.randn(6, 17), torch.full((6, 1), 3), torch.rand(6, 1)
    assert_close(moestro.hf.experts_forward(bank, x, index, weight), bank.slow(x, index, weight))


def test_autocast_computes_in_bfloat16_and_answers_in_the_input_dtype():
    bank = Bank(16, 32, True, False, False, False, dtype=torch.float32)
    x, index, weight = torch.randn(6, 16), torch.randint(0, 5, (6, 1)), torch.rand(6, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = moestro.hf.experts_forward(bank, x, index, weight)
    assert y.dtype == torch.float32
    assert 0 < distance(y, bank.slow(x, index, weight)) < 2e-2


def test_nllb_runs_the_experts_that_its_router_chose():
    """transformers reads the one-hot mask as expert numbers, so only experts 0 and 1 run; ours does not."""
    model = tiny_model("nllb_moe", num_experts=5)
    layer = next(iter(find_layers(model).values()))
    x = torch.randn(1, 8, 24)
    first, gates, _ = layer.router(x.flatten(0, 1))
    assert (gates > 0).sum(0)[2:].any()  # experts past the first two are chosen
    expected = sum(gates[:, e : e + 1] * layer.experts[f"expert_{e}"](x[0]) for e in range(5))
    theirs = layer.experts(x[0], first, gates)
    use_experts(model)
    assert_close(layer.experts(x[0], first, gates), expected)
    assert distance(theirs, expected) > 0.1


def test_a_dense_model_is_refused_by_name():
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"no mixture layer.*mixtral"):
        use_experts(transformers.LlamaForCausalLM(config))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="quick"):
        use_experts(tiny_model("mixtral"), "quick")


def test_most_families_run_as_one_fused_operator(monkeypatch):
    calls = []
    real = moestro.hf.experts.run_fused
    monkeypatch.setattr(moestro.hf.experts, "run_fused", lambda *a: calls.append(1) or real(*a))
    for family, expected in (("qwen3_moe", 2), ("deepseek_v3", 1), ("gpt_oss", 0)):  # gpt_oss has another gate
        model = use_experts(tiny_model(family))
        calls.clear()
        model(**tiny_batch(model))
        assert len(calls) == expected
