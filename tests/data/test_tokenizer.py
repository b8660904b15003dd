import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.data import BPETokenizer, ByteTokenizer, Document, open_tokenizer, train_bpe

PROSE = ["the cat sat on the mat, and the hat was on the cat\n" * 9, "def cat(hat):\n    return hat\n" * 9]
HARD = "héllo\n  World\t\x00\x07 日本 🙂 'll don't   x=1\r\n  <|endoftext|> end  "
BPE = train_bpe(PROSE, 300)
KINDS = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])


@given(st.text())
def test_any_text_survives(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
        assert tokenizer.encode(text.encode()) == ids


@given(st.binary())
def test_any_bytes_survive_the_byte_tokenizer(data):
    ids = ByteTokenizer().encode(data)
    assert ids == list(data)
    assert ByteTokenizer().decode_bytes(ids) == data


@given(st.lists(st.integers(0, 255)))
def test_the_saved_byte_tokenizer_decodes_any_bytes_alike(ids):
    tokenizer = ByteTokenizer()
    assert tokenizer.backend().decode(ids) == tokenizer.decode(ids)


@KINDS
@pytest.mark.parametrize("model_type", [None, "mixtral", "deepseek_v3", "qwen3_moe", "olmoe"])
def test_stock_transformers_opens_what_is_saved(tokenizer, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    if model_type:  # beside a model, whose type must not change the tokenizer
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(HARD)
    assert stock(HARD, split_special_tokens=True)["input_ids"] == ids
    assert stock.decode(ids) == HARD
    assert (len(stock), stock.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    mess = list(range(256))
    assert stock.decode(mess) == tokenizer.backend().decode(mess, skip_special_tokens=False)


@KINDS
def test_a_saved_tokenizer_opens_as_it_was(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        opened = open_tokenizer(spec)
        assert type(opened) is type(tokenizer)
        assert (opened.name, opened.eos_id, opened.pieces) == (
            tokenizer.name,
            tokenizer.eos_id,
            tokenizer.pieces,
        )
        assert opened.encode(HARD) == tokenizer.encode(HARD)


def test_the_id_of_a_byte_is_its_value():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(bytes(range(256))) == list(range(256))
    assert tokenizer.pieces == [bytes([value]) for value in range(256)]
    assert tokenizer.backend().encode("Aé\n").ids == list("Aé\n".encode())
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.name) == (256, None, "byte")


def test_bpe_learns_merges_and_ends_documents():
    assert BPE.vocab_size <= 300
    assert b" the" in BPE.pieces
    assert len(BPE.encode("the cat sat")) < len("the cat sat")
    assert BPE.pieces[BPE.eos_id] == b""
    (ids,) = BPE.encode_documents([Document("cat", "x")])
    assert ids.tolist() == [*BPE.encode("cat"), BPE.eos_id]


def test_the_end_of_text_written_in_a_text_is_text():
    ids = BPE.encode("a<|endoftext|>b")
    assert BPE.eos_id not in ids
    assert BPE.decode(ids) == "a<|endoftext|>b"


def test_bpe_training_repeats_in_another_process():
    code = (
        "import sys, json; from moestro.data import train_bpe;"
        "print(train_bpe(json.loads(sys.argv[1]), 300).backend().to_str())"
    )
    command = [sys.executable, "-c", code, json.dumps(PROSE)]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == BPE.backend().to_str()
    )


def test_importing_the_room_imports_no_torch():
    code = "import sys, moestro.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bpe_names_the_document_and_the_byte_that_is_not_utf8():
    with pytest.raises(ValueError, match=r"old.txt is not UTF-8 at byte 3 \(0xe9\).*byte tokenizer"):
        BPE.encode_documents([Document(b"caf\xe9", "old", source="old.txt")])
    with pytest.raises(ValueError, match="at byte 0"):
        BPE.encode(b"\xff")


@KINDS
def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


@KINDS
def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.decode([1, bad])


@pytest.mark.parametrize("spec", ["bites", "bpe:300", "no/such/tokenizer.json"])
def test_an_unknown_tokenizer_is_refused(spec):
    with pytest.raises(ValueError, match=f"unknown tokenizer '{spec}'; expected byte"):
        open_tokenizer(spec)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer.json"):
        open_tokenizer(path)


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="not byte-level"):
        BPETokenizer(words)


def test_too_few_ids_are_refused():
    with pytest.raises(ValueError, match="pass at least 257"):
        train_bpe(PROSE, 256)


def test_numpy_ids_decode():
    assert ByteTokenizer().decode(np.array([72, 105], dtype=np.uint8)) == "Hi"
