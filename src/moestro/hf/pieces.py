"""What a stock tokenizer's ids stand for, byte by byte, whatever its kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moestro.data.tokenizer import byte_characters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class StockTokenizer:
    """The tokenizer in a transformers folder.

    Args:
        folder: of the model.

    Raises:
        ValueError: no tokenizer there that transformers can open.

    Attributes:
        start: ids that it puts in front of a text, such as a begin-of-text token.
    """

    def __init__(self, folder: Path):
        import transformers

        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (ValueError, OSError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{folder} holds no tokenizer that transformers opens: {reason}") from None
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._bytes = {char: value for value, char in enumerate(byte_characters())}
        self._byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
        self._special = set(self._tokenizer.all_special_ids)
        self.start = self._start()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; special tokens stand for none."""
        return b"".join(self._piece(int(i)) for i in ids)

    def _piece(self, index: int) -> bytes:
        piece = None if index in self._special else self._tokenizer.convert_ids_to_tokens(index)
        if piece is None:
            return b""
        if self._byte_level and all(char in self._bytes for char in piece):
            return bytes(self._bytes[char] for char in piece)
        match = _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else str(piece).replace("▁", " ").encode(errors="replace")

    def _start(self) -> list[int]:
        whole, plain = self._tokenizer("a")["input_ids"], self.encode("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:at])
