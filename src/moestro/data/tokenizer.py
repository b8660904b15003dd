"""Text to token ids and back, by plain bytes or byte-level BPE; stock transformers opens what is saved."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.data.documents import Document, utf8

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""The token that ends every document of a BPE tokenizer trained here."""


class Tokenizer(ABC):
    """Turns text into ids and back without loss.

    Attributes:
        name: "byte", or "bpe:" and the number of ids.
        vocab_size: number of ids.
        eos_id: the id that ends a document, or None.
        pieces: the bytes that each id stands for; special tokens stand for none.
    """

    name: str
    vocab_size: int
    eos_id: int | None
    pieces: list[bytes]

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; raises ValueError if the tokenizer cannot express it."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The ids of whole documents, each ended by `eos_id` if there is one."""

    @abstractmethod
    def backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer as the `tokenizers` library knows it."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes that ids stand for."""
        pieces = self.pieces
        ids = [int(i) for i in ids]
        bad = next((i for i in ids if not 0 <= i < len(pieces)), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside this tokenizer; expected 0 <= id < {len(pieces)}")
        return b"".join([pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    @property
    def piece_bytes(self) -> np.ndarray:
        """How many bytes each id stands for, [vocab] int32."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int32)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer` opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        backend = self.backend()
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if self.eos_id is not None:
            config["eos_token"] = backend.id_to_token(self.eos_id)
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """One id per byte: the id is the byte's value, and every byte string is a text."""

    name, vocab_size, eos_id = "byte", 256, None

    def __init__(self) -> None:
        self.pieces = [bytes([value]) for value in range(256)]

    def encode(self, text: str | bytes) -> list[int]:
        return list(utf8(text) if isinstance(text, str) else text)

    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        return [np.frombuffer(document.data, dtype=np.uint8) for document in documents]

    def backend(self) -> tokenizers.Tokenizer:
        """Byte-level BPE without merges, whose vocabulary is in the order of the bytes."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocab = {char: value for value, char in enumerate(byte_characters())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return backend


class BPETokenizer(Tokenizer):
    """Byte-level BPE (Radford et al. 2019, section 2.2) by the `tokenizers` library.

    Args:
        backend: a tokenizer with a ByteLevel decoder.
        eos: its token that ends a document, if any.
        where: what error messages call it.

    Raises:
        ValueError: a tokenizer that is not byte-level, or has no token `eos`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos: str | None = None, where: str = "the tokenizer"):
        self._backend = backend
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True  # "<|endoftext|>" written in a text is text
        self.pieces = _pieces(backend, where)
        self.vocab_size = len(self.pieces)
        self.name = f"bpe:{self.vocab_size}"
        self.eos_id = None if eos is None else backend.token_to_id(eos)
        if eos is not None and self.eos_id is None:
            raise ValueError(f"{where} has no token {eos!r}, the eos_token of its tokenizer_config.json")

    def encode(self, text: str | bytes) -> list[int]:
        return self._backend.encode(_text(text, "the text"), add_special_tokens=False).ids

    def encode_documents(self, documents: Sequence[Document]) -> list[np.ndarray]:
        texts = [_text(document.text, document.where) for document in documents]
        end = [] if self.eos_id is None else [self.eos_id]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids + end, dtype=np.uint32) for encoding in encodings]

    def backend(self) -> tokenizers.Tokenizer:
        return self._backend


def train_bpe(documents: Iterable[Document | str | bytes], vocab_size: int) -> BPETokenizer:
    """Learn a byte-level BPE; the same documents always give the same tokenizer.

    Args:
        documents: the texts to learn from, which must be UTF-8.
        vocab_size: number of ids wanted, at least 257: the 256 bytes and the end of a document. A small
            corpus gives fewer.

    Raises:
        ValueError: vocab_size too small, or bytes that are not UTF-8.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}, but 256 bytes and {END_OF_TEXT} need 257; pass at least 257")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    items = (item if isinstance(item, Document) else Document(item, "the text") for item in documents)
    backend.train_from_iterator((_text(item.text, item.where) for item in items), trainer)
    return BPETokenizer(backend, END_OF_TEXT)


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer named "byte", or the one in a tokenizer.json or in the folder that holds it.

    Raises:
        ValueError: no such tokenizer, or one that is not byte-level.
    """
    if str(spec) == "byte":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        expected = "expected byte, bpe:N (for a corpus), a tokenizer.json or a folder that holds one"
        raise ValueError(f"unknown tokenizer {str(spec)!r}; {expected}")
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    tokenizer = BPETokenizer(backend, _eos(path.with_name("tokenizer_config.json")), str(path))
    byte = ByteTokenizer()
    return byte if tokenizer.pieces == byte.pieces else tokenizer


def byte_characters() -> list[str]:
    """The visible character by which byte-level BPE writes each byte, in the order of the bytes.

    Visible Latin-1 characters stand for themselves, the others are U+0100 onwards (Radford et al. 2019).
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(value if value in visible else next(hidden)) for value in range(256)]


def _eos(config: Path) -> str | None:
    if not config.is_file():
        return None
    eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    return eos["content"] if isinstance(eos, dict) else eos


def _pieces(backend: tokenizers.Tokenizer, where: str) -> list[bytes]:
    """The bytes of every id; ids that are not used stand for none."""
    if "ByteLevel" not in json.dumps(json.loads(backend.to_str())["decoder"]):
        raise ValueError(f"{where} is not byte-level; use byte, or a tokenizer with a ByteLevel decoder")
    value = {char: byte for byte, char in enumerate(byte_characters())}
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, index in vocab.items():
        if index not in added:
            pieces[index] = bytes([value[char] for char in token])
        elif not added[index].special:
            pieces[index] = token.encode()
    return pieces


def _text(text: str | bytes, where: str) -> str:
    if isinstance(text, str):
        utf8(text, where)  # refuses lone surrogates, which the library answers with a TypeError
        return text
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 at byte {error.start} (0x{text[error.start]:02x}), which BPE needs; "
            "convert the file, or use the byte tokenizer"
        ) from None
