"""Kinds of bytes and tokens (letters, digits, indentation, brackets ...) and how to print one token."""

from __future__ import annotations

from collections import Counter

CLASSES = (
    "lowercase letter",
    "uppercase letter",
    "digit",
    "space",
    "newline or indent",
    "bracket",
    "quote",
    "operator",
    "underscore",
    "other punctuation",
    "non-ASCII",
    "control",
)

_KINDS = {"_": "underscore", " ": "space"}
_KINDS |= dict.fromkeys("\n\r\t", "newline or indent")
_KINDS |= dict.fromkeys("()[]{}", "bracket")
_KINDS |= dict.fromkeys("'\"`", "quote")
_KINDS |= dict.fromkeys("+-*/%=<>&|^~@", "operator")
_KINDS |= dict.fromkeys(".,:;!?#$\\", "other punctuation")
_VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


def token_class(content: bytes) -> str:
    """The class of a token, one byte or many.

    A space before a word belongs to the word, as BPE has it. White space alone is "space" if it is one
    space and "newline or indent" otherwise. A word with a capital is "uppercase letter". Anything else has
    the class of most of its characters, the earlier one if two are as frequent.
    """
    text = content.decode("utf-8", errors="replace")
    if text and not text.strip(" \n\r\t"):
        return "space" if text == " " else "newline or indent"
    kinds = Counter(_kind(character) for character in text.strip(" \n\r\t"))
    if kinds and kinds.keys() <= {"lowercase letter", "uppercase letter"}:
        return "uppercase letter" if "uppercase letter" in kinds else "lowercase letter"
    return kinds.most_common(1)[0][0] if kinds else "control"


def _kind(character: str) -> str:
    """The class of one character; U+FFFD stands for bytes of an unfinished UTF-8 sequence."""
    if not character.isascii():
        return "non-ASCII"
    if character.isalpha():
        return "lowercase letter" if character.islower() else "uppercase letter"
    if character.isdigit():
        return "digit"
    return _KINDS.get(character, "control")


def printable(content: bytes) -> str:
    """A token as visible text: ␣ is a space, ↵ a newline, ⇥ a tab, \\xe2 a byte that is no character."""
    text = content.decode("utf-8", errors="backslashreplace")
    shown = (_VISIBLE.get(c, c) if c.isprintable() or c in _VISIBLE else ascii(c)[1:-1] for c in text)
    return "".join(shown)
