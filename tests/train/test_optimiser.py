"""Which parameters decay."""

import pytest
import torch
from torch import nn

import moestro
from moestro.train.optimiser import (
    build_optimiser,
    clipped_step,
    gradient_norm,
    parameter_groups,
    set_learning_rate,
)


def names(group):
    return {name for name, _ in group["params"]}


def language_model(**options):
    sizes = {"num_experts": 4, "expert_hidden": 8, "width": 8, "num_layers": 2, "num_heads": 2, "seed": 0}
    return moestro.build_language_model(vocab_size=16, **sizes, **options)


def test_matrices_decay_and_norms_and_embeddings_do_not():
    model = language_model(method="mixtral", qk_norm=True)
    decay, rest = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert names(decay) | names(rest) == {name for name, _ in model.named_parameters()}
    assert not names(decay) & names(rest)
    assert all("norm" in name or name == "embedding.weight" for name in names(rest))
    assert {"layers.0.moe.router.scorer.weight", "layers.1.moe.experts.down"} <= names(decay)


def test_an_untied_head_decays_and_the_embedding_still_does_not():
    decay, rest = parameter_groups(language_model(tied_embeddings=False), 0.1)
    assert "head.weight" in names(decay)
    assert "embedding.weight" in names(rest)


def test_stacked_biases_of_experts_do_not_decay():
    moe = moestro.build("mixtral", width=4, hidden=8, num_experts=2, bias=True)
    decay, rest = parameter_groups(moe, 0.1)
    assert {"experts.gate_bias", "experts.up_bias", "experts.down_bias"} <= names(rest)
    assert not any(name.endswith("bias") for name in names(decay))


def test_a_step_without_gradient_shrinks_matrices_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimiser = build_optimiser(model, learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    assert optimiser.defaults["fused"]
    set_learning_rate(optimiser, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0  # 1 - learning rate * decay
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def with_gradients(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.0, 1e25])
def test_the_norm_is_that_of_all_gradients_together(dtype: torch.dtype, factor: float) -> None:
    model = with_gradients(dtype)
    torch._foreach_mul_([p.grad for p in model.parameters()], factor)
    together = torch.cat([each.double().flatten() for each in gradients(model)]).norm()
    expected = together if dtype == torch.float64 or factor < 1e20 else torch.tensor(torch.inf)  # as torch has it
    torch.testing.assert_close(gradient_norm(model.parameters()).double(), expected.double(), rtol=4e-3, atol=0)


def test_a_norm_whose_square_overflows_is_found() -> None:
    one = nn.Parameter(torch.zeros(1))
    one.grad = torch.full((1,), 3e19)
    assert gradient_norm([one]) == 3e19
    assert gradient_norm([nn.Parameter(torch.zeros(2))]) == 0


def test_a_norm_with_a_number_that_is_none_is_not_finite() -> None:
    model = with_gradients()
    model[0].weight.grad[3, 7] = torch.nan
    assert gradient_norm(model.parameters()).isnan()


def optimiser_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1)
    return build_optimiser(
        model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95), kept=lambda p: kind == "all" or p.ndim > 1
    )


@pytest.mark.parametrize("kind", ["all", "some", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clipped_step_is_clipping_and_a_step(dtype: torch.dtype, kind: str) -> None:
    model, other = with_gradients(dtype), with_gradients(dtype)
    other.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    ours, theirs = optimiser_of(model, kind), optimiser_of(other, kind)
    for most in (1.0, 0.3):
        clipped_step(ours, model.parameters(), float(gradient_norm(model.parameters())), most)
        torch.nn.utils.clip_grad_norm_(other.parameters(), most)
        theirs.step()
        assert not hasattr(ours, "grad_scale")
        torch.testing.assert_close(gradients(model), gradients(other))
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("most", [0.0, 1e3])
def test_gradients_that_are_small_enough_stay_bit_for_bit(most: float) -> None:
    model, other = with_gradients(), with_gradients()
    other.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    clipped_step(optimiser_of(model, "all"), model.parameters(), float(gradient_norm(model.parameters())), most)
    optimiser_of(other, "all").step()
    assert all(map(torch.equal, gradients(model), gradients(other)))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
