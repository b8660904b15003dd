"""Which parameters decay."""

import torch
from torch import nn

import moestro
from moestro.train.optimiser import build_optimiser, parameter_groups, set_learning_rate


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
