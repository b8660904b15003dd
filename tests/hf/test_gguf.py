"""GGUF: llama.cpp computes what transformers computes, files come back exactly, and broken ones are refused."""

import json
import resource
import struct

import numpy as np
import pytest
import torch
from hf.tiny import tiny_model
from safetensors.torch import load_file

from moestro.cli import main
from moestro.data import train_bpe
from moestro.data.tokenizer import ByteTokenizer
from moestro.hf.convert import convert
from moestro.hf.gguf_header import read_gguf_header

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe with yarn": {"rope_parameters": YARN},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "deepseek_v2": {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 4.0},
    "deepseek_v2 with yarn": {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3 with yarn": {
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "dots1": {"routed_scaling_factor": 2.5, "num_key_value_heads": 4},
    "glm4_moe": {"n_group": 1, "topk_group": 1, "use_qk_norm": True, "attention_bias": True},
    "minimax_m2": {"rotary_dim": 4},
    "deepseek_v3 in groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2},
}


def save(name, folder, dtype=torch.float32, **more):
    model = tiny_model(
        name.split()[0],
        width=32,
        hidden=32,
        num_experts=8,
        vocab_size=256,
        max_position_embeddings=128,
        **MODELS.get(name, {}),
        **more,
    )
    model.to(dtype).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    model = save(request.param, folder / "model")
    convert(folder / "model", folder / "model.gguf", "gguf")
    return model, folder


def test_files_come_back_bit_for_bit(pair, tmp_path):
    _, folder = pair
    done = convert(folder / "model.gguf", tmp_path / "back", "transformers", max_shard_size=40_000)
    assert (done.source, done.opens) == ("gguf", "transformers")
    before = load_file(folder / "model/model.safetensors")
    after = {n: t for p in (tmp_path / "back").glob("*.safetensors") for n, t in load_file(p).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/tokenizer.json").is_file()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in pair[0].parameters())


def test_llama_cpp_computes_the_same(pair):
    xllamacpp = pytest.importorskip("xllamacpp")
    model, folder = pair
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits[0, -1].log_softmax(-1)
    found = llama_cpp_log_probabilities(xllamacpp, folder / "model.gguf", tokens[0].tolist())
    assert list(found)[:5] == expected.topk(5).indices.tolist()
    assert len(found) == 256
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < 2e-3


def llama_cpp(xllamacpp, path):
    """A server of one file, with keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 128, 1
    params.warmup = params.fit_params = params.ui = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def llama_cpp_log_probabilities(xllamacpp, path, tokens):
    """Of every next token, the likeliest first."""
    return log_probabilities(llama_cpp(xllamacpp, path), tokens)


def log_probabilities(server, prompt):
    # the letter A is drawn: what half a character would be is not reported; reported are the model's own logits
    request = {"prompt": prompt, "max_tokens": 1, "n_probs": 256, "temperature": 0.0, "logit_bias": [[65, 1e3]]}
    answer = server.handle_completions(request | {"cache_prompt": False})
    (step,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}


def test_the_package_reads_what_we_read(pair):
    _, folder = pair
    header, reader = read_gguf_header(folder / "model.gguf"), gguf.GGUFReader(folder / "model.gguf")
    theirs = {
        t.name: (int(t.tensor_type), tuple(int(n) for n in t.shape[::-1]), t.data_offset) for t in reader.tensors
    }
    assert {name: (t.kind, t.shape, t.start) for name, t in header.tensors.items()} == theirs
    fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.settings == fields


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_stay_narrow_and_exact(dtype, tmp_path):
    save("qwen3_moe", tmp_path / "model", dtype)
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back", "transformers")
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert all(after[name].dtype == dtype and torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "worst"),
    [("Q8_0", 0.01), ("Q5_1", 0.06), ("Q5_0", 0.07), ("Q4_1", 0.1), ("Q4_0", 0.13), ("BF16", 0.004)],
)
def test_rounded_types_are_as_exact_as_they_promise(kind, worst, tmp_path):
    save("olmoe", tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "model.gguf", "gguf", dtype=kind.lower())
    assert done.layout == f"gguf {kind}"
    convert(tmp_path / "model.gguf", tmp_path / "back", "transformers")
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name in before:
        if "norm" in name or "gate.weight" in name:
            assert torch.equal(before[name], after[name]), name
        else:
            error = float((before[name] - after[name]).norm() / before[name].norm())
            assert 0 < error < worst, name


def test_a_file_from_elsewhere_is_put_together_from_its_settings(pair, tmp_path):
    """Without our own notes, as llama.cpp's converter writes it."""
    model, folder = pair
    reader = gguf.GGUFReader(folder / "model.gguf")
    name = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(tmp_path / "foreign.gguf", name)
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "moestro.", "general.architecture")) or name == "tokenizer.huggingface.json":
            continue
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "foreign.gguf", tmp_path / "back", "transformers")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", experts_implementation="eager")
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


def test_a_trained_vocabulary_is_written_with_its_merges(tmp_path):
    tokenizer = train_bpe(["the cat and the hat, the cat and the hat " * 9], 262)
    model = tiny_model("qwen3_moe", width=32, hidden=32, vocab_size=264, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "bpe")
    tokenizer.save(tmp_path / "bpe")
    convert(tmp_path / "bpe", tmp_path / "bpe.gguf", "gguf")
    settings = read_gguf_header(tmp_path / "bpe.gguf").settings
    tokens = settings["tokenizer.ggml.tokens"]
    assert len(tokens) == 264
    assert settings["tokenizer.ggml.pre"] == "gpt-2"
    assert settings["tokenizer.ggml.token_type"][tokens.index("<|endoftext|>")] == 3
    assert settings["tokenizer.ggml.token_type"][-1] == 5
    assert all("".join(merge.split(" ")) in tokens for merge in settings["tokenizer.ggml.merges"])


def sentencepiece_like(folder, size=340):
    """A tokenizer.json as transformers makes it from a SentencePiece model, trained on a small text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(
        ["the cat and the hat, the cat sat and the bat that sat"] * 4,
        trainers.BpeTrainer(vocab_size=size - 256, special_tokens=special, max_token_length=5, show_progress=False),
    )
    grown = json.loads(trained.to_str())["model"]["vocab"]
    made = sorted((token for token in grown if token not in special), key=grown.get)
    tokens = [*special, *(f"<0x{value:02X}>" for value in range(256)), *made]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted((t for t in made if len(t) > 1), key=vocab.get)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_llama_cpp_cuts_text_as_a_sentencepiece_like_tokenizer(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    model = tiny_model("mixtral", width=32, hidden=32, vocab_size=352, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer = sentencepiece_like(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")
    server = llama_cpp(xllamacpp, tmp_path / "model.gguf")  # other ids would give other probabilities
    for text in ("the cat sat", "that hat and the bat", " two  spaces", "naïve ☃ zebra\n", "sat,sat the", "t"):
        ids = tokenizer.encode(text).ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = log_probabilities(server, text)
        assert max(abs(value - float(expected[token])) for token, value in found.items()) < 2e-3, (text, ids)
    convert(tmp_path / "model.gguf", tmp_path / "back", "transformers")
    assert json.loads((tmp_path / "back/tokenizer.json").read_text())["model"]["byte_fallback"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["merges"].pop(0), "does not merge"),
        (lambda c: c["model"]["merges"].append(c["model"]["merges"][0]), "at two ranks"),
        (lambda c: c["model"]["vocab"].pop("<0x41>"), "lacks the token <0x41> to fall back to"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "prepares text in a way"),
        (lambda c: c.update(post_processor={"type": "BertProcessing"}), "finishes texts by BertProcessing"),
    ],
)
def test_pieces_that_llama_cpp_would_cut_otherwise_are_refused(change, message, tmp_path):
    tiny_model("mixtral", width=32, hidden=32, vocab_size=352).save_pretrained(tmp_path / "model")
    sentencepiece_like(tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "yarn has beta_fast=32, but config.json says 16"),
        (
            {"family": "deepseek_v3", "rope_parameters": YARN},
            "mscale equal to mscale_all_dim, but",
        ),
        ({"family": "granitemoe"}, "no granitemoe as GGUF; it knows mixtral"),
        (
            {"family": "olmoe"},
            "each of the 4 heads of olmoe keys of its own, but config.json says num_key_value_heads=2",
        ),
        ({"norm_topk_prob": False}, "norm_topk_prob=True, but config.json says False"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "no linear rotary scaling",
        ),
        ({"tokenizer": False}, "no tokenizer.json"),
        ({"family": "deepseek_v3", "q_lora_rank": None}, "without query latents only with 26 or 27 layers, not 2"),
        ({"dtype": "Q3_K"}, "unknown GGUF type 'Q3_K'"),
        ({"dtype": "Q4_0", "hidden": 10}, r"ffn_down_exps.weight has rows of 10 numbers, but Q4_0"),
        ({"weights": torch.float64}, "has dtype F64|unknown GGUF type 'F64'"),
    ],
)
def test_what_gguf_cannot_say_is_refused(settings, message, tmp_path):
    settings = dict(settings)
    family, dtype = settings.pop("family", "qwen3_moe"), settings.pop("dtype", None)
    tokenizer, weights = settings.pop("tokenizer", True), settings.pop("weights", torch.float32)
    tiny_model(family, **{"width": 32, "vocab_size": 256, **settings}).to(weights).save_pretrained(
        tmp_path / "model"
    )
    if tokenizer:
        ByteTokenizer().save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "model.gguf", "gguf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name, shape, kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


def counts(tensors, keys):
    return struct.pack("<QQ", tensors, keys)


HOSTILE = {
    "nothing": (b"", "ends within its magic number"),
    "another format": (b"PK\x03\x04" + bytes(40), "no GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(16), "GGUF version 1"),
    "2^33 strings": (
        HEAD + counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 8, 2**33)),
        "claims 8589934592 strings in a",
    ),
    "2^33 bytes": (HEAD + counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 0, 2**33)), "claims 8589934592 elements"),
    "2^62 keys": (HEAD + counts(0, 2**62), "claims 4611686018427387904 keys"),
    "2^62 tensors": (HEAD + counts(2**62, 0), "claims 4611686018427387904 tensors"),
    "a long name": (HEAD + counts(0, 1) + struct.pack("<Q", 2**40) + bytes(9), "claims 1099511627776 bytes"),
    "an array of arrays": (
        HEAD + counts(0, 1) + key(b"a", 9, struct.pack("<IQ", 9, 1)) + bytes(9),
        "array of type 9",
    ),
    "a type that is none": (HEAD + counts(0, 1) + key(b"a", 77, b"") + bytes(9), "has type 77"),
    "a key twice": (HEAD + counts(0, 2) + 2 * key(b"a", 0, b"\1"), "names the key 'a' twice"),
    "a tensor twice": (HEAD + counts(2, 0) + 2 * tensor(b"a", [8]) + bytes(99), "names the tensor 'a' twice"),
    "2^33 numbers": (HEAD + counts(1, 0) + tensor(b"a", [2**33]) + bytes(99), "it was cut"),
    "2^63 x 2^63 numbers": (HEAD + counts(1, 0) + tensor(b"a", [2**63, 2**63]) + bytes(99), "it was cut"),
    "9 dimensions": (HEAD + counts(1, 0) + tensor(b"a", [1] * 9) + bytes(99), "has 9 dimensions"),
    "an unknown quantisation": (HEAD + counts(1, 0) + tensor(b"a", [32], 999) + bytes(99), "has type 999"),
    "half a block": (HEAD + counts(1, 0) + tensor(b"a", [20], 8) + bytes(99), "not a multiple of 32"),
    "a tensor outside": (HEAD + counts(1, 0) + tensor(b"a", [8], 0, 2**62) + bytes(99), "it was cut"),
    "overlap": (
        HEAD + counts(2, 0) + tensor(b"a", [16]) + tensor(b"b", [16], 0, 32) + bytes(399),
        "b overlaps another tensor",
    ),
    "alignment 3": (HEAD + counts(0, 1) + key(b"general.alignment", 4, struct.pack("<I", 3)), "alignment 3"),
    "no text": (HEAD + counts(0, 1) + key(b"a", 8, text(b"\xff\xfe")), "a is not UTF-8"),
    "no architecture": (HEAD + counts(0, 0), "holds a None model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad.gguf", tmp_path / "out", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save("mixtral", folder / "model")
    convert(folder / "model", folder / "model.gguf", "gguf")
    return folder / "model.gguf"


def test_every_cut_is_refused(whole, tmp_path):
    data = whole.read_bytes()
    cuts = [len(data) - 1, len(data) - 32, *np.random.default_rng(0).integers(0, len(data), 60).tolist()]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"fetch it again|bytes are left"):
            convert(tmp_path / "cut.gguf", tmp_path / "out", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_mutations_never_crash(whole, tmp_path):
    data, random = bytearray(whole.read_bytes()), np.random.default_rng(0)
    head = min(tensor.start for tensor in read_gguf_header(whole).tensors.values())
    for _ in range(300):
        changed = bytearray(data)
        for place in random.integers(0, head, 3):
            changed[place] = int(random.integers(256))
        (tmp_path / "m.gguf").write_bytes(changed)
        try:
            read_gguf_header(tmp_path / "m.gguf")
        except ValueError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017 - either outcome is right, a crash is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xx_exps.weight"),
            "lacks blk.1.ffn_up_exps.weight",
        ),
        (lambda d: d.replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"), "holds blk.1.attn_w.weight, which"),
        (
            lambda d: d.replace(b'num_local_experts": 8', b'num_local_experts": 9'),
            r"has shape \[8, 32, 32\] but the settings",
        ),
        (
            lambda d: d.replace(b"moestro.config", b"moestra.config").replace(b"expert_used_c", b"expert_xxxx_c"),
            "lacks the setting llama.expert_used_count",
        ),
    ],
)
def test_files_that_do_not_hold_together_are_refused(change, message, whole, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(change(whole.read_bytes()))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "bad.gguf", tmp_path / "out", "transformers")
    with pytest.raises(ValueError, match="becomes a folder of transformers, not fused"):
        convert(whole, tmp_path / "out", "fused")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_absurd_counts_take_no_memory(tmp_path):
    """The package itself fills all memory on such a file."""
    data, _ = HOSTILE["2^33 bytes"]
    (tmp_path / "bad.gguf").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="claims 8589934592 elements"):
        read_gguf_header(tmp_path / "bad.gguf")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 65_536  # KiB


def test_the_command_writes_gguf(whole, tmp_path, capsys):
    folder = whole.parent / "model"
    assert main(["convert", str(folder), str(tmp_path / "q8.gguf"), "--to", "gguf", "--dtype", "Q8_0"]) == 0
    assert "to gguf Q8_0" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "q8.gguf"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    assert "transformers opens it" in capsys.readouterr().out
