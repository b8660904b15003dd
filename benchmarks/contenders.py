"""One language model of random weights in moestro, transformers or llama.cpp, in a process of its own.

    python benchmarks/contenders.py moestro|moestro-torch|transformers|llama BITS THREADS PROMPT NEW FOLDER

builds it, prints a line `ready`, and then, for every line on its input, prefills a prompt, generates greedily and
prints a line of JSON with tokens per second. All three hold the same weights, in as many bits: 16 (bfloat16), 8
(one scale per output; llama.cpp Q8_0) or 4 (4.5 bits with the scales; llama.cpp Q4_0). Norms and routers stay in
float. llama.cpp reads a file that is written to FOLDER once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB, WIDTH, LAYERS, HEADS, EXPERTS, TOP_K, HIDDEN = 8192, 1024, 12, 16, 64, 8, 512
HEAD_DIM, THETA, EPS = WIDTH // HEADS, 10000.0, 1e-6
Run = Callable[[list[int], int], dict[str, float]]


class Weights:
    """Random weights by name, the same in every process: slices of one table, so that 1.3e9 come in a second."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn((1 << 21) + 1, generator=generator).bfloat16()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """normal(0, 1/in) for matrices `[..., out, in]`, ones for norms; bfloat16."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        out, piece = torch.empty(shape, dtype=torch.bfloat16).flatten(), 1 << 20
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for start in range(0, len(out), piece):
            part, place = out[start : start + piece], int(torch.randint(0, piece, (1,), generator=draw))
            torch.mul(self.table[place : place + len(part)], shape[-1] ** -0.5, out=part)
        return out.view(shape)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Matrices of one layer, `[..., out, in]`."""
        sizes: dict[str, tuple[int, ...]] = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH, WIDTH),
            "attn_v": (WIDTH, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate_inp": (EXPERTS, WIDTH),
            "ffn_gate_exps": (EXPERTS, HIDDEN, WIDTH),
            "ffn_up_exps": (EXPERTS, HIDDEN, WIDTH),
            "ffn_down_exps": (EXPERTS, WIDTH, HIDDEN),
        }
        return {name: self(f"{index}.{name}", *size) for name, size in sizes.items()}

    def embedding(self) -> Tensor:
        return self("token_embd", VOCAB, WIDTH)

    def head(self) -> Tensor:
        return self("output", VOCAB, WIDTH)


def moestro(bits: int, length: int, folder: Path, steps: str = "compiled") -> Run:
    from moestro.inference import CachedReader, lay_out_for_decoding, quantise_model

    model = our_model(length)
    lay_out_for_decoding(model, steps)
    if bits < 16:
        for error in quantise_model(model, bits):
            print(error, file=sys.stderr)

    def run(prompt: list[int], count: int) -> dict[str, float]:
        reader = CachedReader(model, length, steps=steps)
        return timed(lambda tokens: reader(tokens.flatten()).argmax().view(1, 1), prompt, count)

    return run


def moestro_torch(bits: int, length: int, folder: Path) -> Run:
    """Without numba: steps of torch's operators."""
    return moestro(bits, length, folder, steps="torch")


def our_model(length: int) -> Any:
    """The model as moestro builds it, with the weights of this benchmark."""
    from moestro.models import build_language_model
    from moestro.models.rotary import Rotary

    with torch.device("meta"):
        model = build_language_model(
            vocab_size=VOCAB,
            width=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            method="qwen3",
            options={"top_k": TOP_K},
            num_experts=EXPERTS,
            expert_hidden=HIDDEN,
            qk_norm=True,
            tied_embeddings=False,
            norm_eps=EPS,
            rope_theta=THETA,
            max_length=length,
        )
    weights, state = Weights(), {}
    for index in range(LAYERS):
        tensors, prefix = weights.layer(index), f"layers.{index}."
        qkv = [tensors[f"attn_{name}"] for name in "qkv"]
        state[f"{prefix}attention.qkv.weight"] = torch.cat(qkv)
        state[f"{prefix}attention.output.weight"] = tensors["attn_output"]
        state[f"{prefix}moe.router.scorer.weight"] = tensors["ffn_gate_inp"]
        for name in ("gate", "up", "down"):
            state[f"{prefix}moe.experts.{name}"] = tensors[f"ffn_{name}_exps"].transpose(1, 2).contiguous()
    state |= {"embedding.weight": weights.embedding(), "head.weight": weights.head()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            state[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)
    model.rotary = Rotary(HEAD_DIM, length, THETA)  # its tables are no parameters and were left on the meta device
    return model.eval()


def transformers(bits: int, length: int, folder: Path) -> Run:
    import transformers as hf

    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=HIDDEN,
        norm_topk_prob=True,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        max_position_embeddings=length,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = hf.Qwen3MoeForCausalLM(config)
    weights, state = Weights(), {}
    for index in range(LAYERS):
        tensors, prefix = weights.layer(index), f"model.layers.{index}."
        for name, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output")):
            state[f"{prefix}self_attn.{name}.weight"] = tensors[f"attn_{letter}"]
        state[f"{prefix}mlp.gate.weight"] = tensors["ffn_gate_inp"]
        gate_up = [tensors["ffn_gate_exps"], tensors["ffn_up_exps"]]
        state[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat(gate_up, dim=1)
        state[f"{prefix}mlp.experts.down_proj"] = tensors["ffn_down_exps"]
    state |= {"model.embed_tokens.weight": weights.embedding(), "lm_head.weight": weights.head()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            state[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()

    @torch.inference_mode()
    def run(prompt: list[int], count: int) -> dict[str, float]:
        cache = hf.StaticCache(config=config, max_cache_len=length)

        def step(tokens: Tensor) -> Tensor:
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[0, -1].argmax().view(1, 1)

        return timed(step, prompt, count)

    return run


def timed(step: Callable[[Tensor], Tensor], prompt: list[int], count: int) -> dict[str, float]:
    start = time.perf_counter()
    token = step(torch.tensor([prompt]))
    middle = time.perf_counter()
    tokens = [token]
    for _ in range(count - 1):
        tokens.append(step(tokens[-1]))
    end = time.perf_counter()
    first = int(torch.cat(tokens).flatten()[0])
    return {"prefill": len(prompt) / (middle - start), "decode": (count - 1) / (end - middle), "first": first}


def llama(bits: int, length: int, folder: Path) -> Run:
    import xllamacpp

    path = folder / f"decode-benchmark-{bits}.gguf"
    if not path.exists():
        write_gguf(path, bits)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = length, 512, 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_prompt, params.cache_ram_mib, params.fit_params = False, 0, False
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def run(prompt: list[int], count: int) -> dict[str, float]:
        greedy = {"n_predict": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions({"prompt": prompt, "return_tokens": True, **greedy})
        timings = answer["timings"]
        first = answer.get("tokens") or [None]
        return {
            "prefill": timings["prompt_per_second"],
            "decode": timings["predicted_per_second"],
            "first": first[0],
        }

    return run


def write_gguf(path: Path, bits: int) -> None:
    """The same weights as a GGUF file of architecture qwen3moe, whole or not at all."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    kind = {16: kinds.BF16, 8: kinds.Q8_0, 4: kinds.Q4_0}[bits]
    staging = path.with_suffix(".part")
    writer = gguf.GGUFWriter(staging, "qwen3moe")
    writer.add_context_length(32768)
    writer.add_vocab_size(VOCAB)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_expert_feed_forward_length(HIDDEN)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPS)
    _add_vocabulary(writer)

    def add(name: str, tensor: Tensor, as_float: bool = False) -> None:
        values = tensor.float().numpy()
        if as_float:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    weights, norm = Weights(), torch.ones(WIDTH)
    add("token_embd", weights.embedding())
    add("output", weights.head())
    add("output_norm", norm, as_float=True)
    for index in range(LAYERS):
        for name, tensor in weights.layer(index).items():
            add(f"blk.{index}.{name}", tensor, as_float=name == "ffn_gate_inp")
        for name, size in (("attn_norm", WIDTH), ("ffn_norm", WIDTH), ("attn_q_norm", HEAD_DIM)):
            add(f"blk.{index}.{name}", torch.ones(size), as_float=True)
        add(f"blk.{index}.attn_k_norm", torch.ones(HEAD_DIM), as_float=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, path)


def _add_vocabulary(writer: Any) -> None:
    """Tokens that no text needs: prompts are token ids."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"token{index}" for index in range(len(tokens), VOCAB)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))  # unknown, control, byte, normal
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


CONTENDERS = {"moestro": moestro, "moestro-torch": moestro_torch, "transformers": transformers, "llama": llama}


def main() -> None:
    name, bits, threads, length, count, folder = sys.argv[1:7]
    torch.set_num_threads(int(threads))
    prompt = torch.randint(259, VOCAB, (int(length),), generator=torch.Generator().manual_seed(1)).tolist()
    run = CONTENDERS[name](int(bits), int(length) + int(count) + 8, Path(folder))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(run(prompt, int(count))), flush=True)


if __name__ == "__main__":
    main()
