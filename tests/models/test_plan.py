"""What a run will need, against what autograd really keeps."""

import pytest
import torch
import torch.nn.functional as F
from oracles.tiny_models import tiny_model

from moestro.models import build_language_model, plan
from moestro.models.memory import Activations

MODELS = {
    "mixtral": {"num_kv_heads": 2},
    "switch": {"method": "switch"},
    "deepseek-v3": {"method": "deepseek-v3", "first_dense": 1},
    "query latent": {"method": "deepseek-v3", "q_lora_rank": 24},
    "dense, normed": {"method": None, "qk_norm": True},
    "relu": {"activation": "relu", "every": 2, "tied_embeddings": False},
}


def bytes_kept(model, tokens, precision):
    """Bytes of distinct storages that autograd saves, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_planned_activations_are_those_that_autograd_keeps(name, precision):
    sizes = {"vocab_size": 256, "width": 96, "num_layers": 4, "num_heads": 4, "expert_hidden": 64, "num_experts": 8}
    model = build_language_model(**(sizes | MODELS[name]))
    memory = plan(model, batch_size=3, length=128, precision=precision).memory
    planned = memory["activations"] + memory["logits"] + memory["casts"]
    kept = bytes_kept(model, torch.randint(256, (3, 128)), precision)
    assert planned == pytest.approx(kept, rel=0.2)  # the plan adds gradients of logits, and no small index tensors


def test_weights_gradients_and_optimiser_are_four_times_the_weights():
    model = tiny_model()
    needs = plan(model, batch_size=2, length=16)
    weights = sum(p.nbytes for p in model.parameters())
    assert [needs.memory[name] for name in ("weights", "gradients", "optimiser", "casts")] == [
        weights,
        weights,
        2 * weights,
        0,
    ]
    assert needs.flops_per_token == model.flops_per_token(16)
    assert needs.peak_memory == sum(needs.memory.values())
    assert needs.fits(needs.peak_memory * 2)
    assert not needs.fits(needs.peak_memory)
    assert needs.seconds(1000, tokens_per_second=250.0) == 4.0


def test_a_model_without_memory_has_the_same_plan():
    arguments = tiny_model().config
    with torch.device("meta"):
        model = build_language_model(**arguments)
    assert plan(model, batch_size=2, length=16, device="cpu") == plan(tiny_model(), batch_size=2, length=16)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_the_operator_of_a_gpu_keeps_what_that_of_a_cpu_does(activation, monkeypatch):
    monkeypatch.setattr("moestro.kernels.triton.is_installed", lambda: True)
    model = tiny_model(activation=activation)
    width, block, bank = 32, model.blocks[0], model.blocks[0].moe.experts
    on_cpu, on_gpu = (Activations(torch.bfloat16, 64, device) for device in ("cpu", "cuda"))
    assert on_gpu.feed_forward(block, width) == on_cpu.feed_forward(block, width)
    assert on_cpu.casts_by_expert(block.moe)
    assert not on_gpu.casts_by_expert(block.moe)  # autocast copies all weights of a bank at once there
    fused = on_gpu.feed_forward(block, width)
    bank.kernel = "native"
    assert on_gpu.feed_forward(block, width) > fused
    bank.kernel = "auto"
    wide = [Activations(torch.float32, 64, device).feed_forward(block, width) for device in ("cpu", "cuda")]
    assert wide[1] > wide[0]  # auto leaves float32 to torch's own products there
    bank.kernel = "triton"
    assert Activations(torch.float32, 64, "cuda").feed_forward(block, width) == wide[0]
