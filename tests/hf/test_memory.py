"""A conversion holds one expert at a time: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moestro.hf.layouts.writer import NewTensor, ShardWriter

MEASURE = """
import sys
import moestro.hf.loading, moestro.hf.gguf_write, gguf.quants
from moestro.hf.convert import convert

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew: loading libraries took more than they hold
before = peak()
convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(peak() - before)
"""
MIB = 2**20


def write_mixtral(folder: Path, *, layers: int, experts: int, width: int, hidden: int) -> tuple[float, float]:
    """A random Mixtral in bfloat16, piece by piece; its size and that of a layer in MiB."""
    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = [NewTensor(name, "BF16", (256, width)) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    tensors.append(NewTensor("model.norm.weight", "BF16", (width,)))
    for layer in range(layers):
        name = f"model.layers.{layer}."
        tensors += [NewTensor(f"{name}self_attn.{x}_proj.weight", "BF16", (width, width)) for x in "qkvo"]
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors += [NewTensor(f"{name}{norm}.weight", "BF16", (width,)) for norm in norms]
        tensors.append(NewTensor(f"{name}block_sparse_moe.gate.weight", "BF16", (experts, width)))
        for expert in range(experts):
            for matrix, shape in {"w1": (hidden, width), "w3": (hidden, width), "w2": (width, hidden)}.items():
                tensors.append(NewTensor(f"{name}block_sparse_moe.experts.{expert}.{matrix}.weight", "BF16", shape))
    random = np.random.default_rng(0)
    with ShardWriter(folder, tensors, 400_000_000) as writer:
        for tensor in tensors:
            numbers = random.standard_normal(tensor.nbytes // 2, dtype=np.float32).view(np.uint32) >> 16
            writer.write(tensor.name, numbers.astype(np.uint16).data)
    return sum(t.nbytes for t in tensors) / MIB, sum(t.nbytes for t in tensors if ".layers.0." in t.name) / MIB


def peak(source: Path, target: Path, to: str) -> float:
    """MiB that converting added to the peak of a process that has all libraries loaded."""
    words = [sys.executable, "-c", MEASURE, str(source), str(target), to]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of a process")
def test_a_small_model_takes_a_fraction_of_a_layer(tmp_path):
    _, layer = write_mixtral(tmp_path / "model", layers=2, experts=24, width=256, hidden=1280)
    assert layer > 40
    taken = peak(tmp_path / "model", tmp_path / "fused", "fused")
    assert 0 < taken < layer / 2


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("to", "back"), [("fused", True), ("interleaved", True), ("gguf", True), ("moestro", True)]
)
def test_two_gigabytes_take_less_than_a_layer_and_200_mib(to, back, tmp_path):
    size, layer = write_mixtral(tmp_path / "model", layers=8, experts=16, width=1024, hidden=2560)
    assert size > 1900
    if to == "gguf":
        from moestro.data.tokenizer import ByteTokenizer

        ByteTokenizer().save(tmp_path / "model")
    there = peak(tmp_path / "model", tmp_path / "out", to)
    again = peak(tmp_path / "out", tmp_path / "back", "transformers")
    print(f"{size:.0f} MiB in layers of {layer:.0f} MiB: {there:.0f} MiB to {to}, {again:.0f} MiB back")
    assert max(there, again) < layer + 200
