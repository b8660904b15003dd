import pytest

from moestro.inspect.classes import CLASSES, printable, token_class


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a", "lowercase letter"),
        (b"Q", "uppercase letter"),
        (b"7", "digit"),
        (b" ", "space"),
        (b"\n", "newline or indent"),
        (b"\t", "newline or indent"),
        (b"    ", "newline or indent"),
        (b"{", "bracket"),
        (b"=", "operator"),
        (b'"', "quote"),
        (b"_", "underscore"),
        (b",", "other punctuation"),
        (b"\xe2", "non-ASCII"),
        (b"\x00", "control"),
        (b"", "control"),
        (b" the", "lowercase letter"),
        (b" The", "uppercase letter"),
        (b"__init__", "underscore"),
        (b"self._x", "lowercase letter"),
        (b'("', "bracket"),
        ("é".encode(), "non-ASCII"),
        (b"2019", "digit"),
    ],
)
def test_class_follows_from_the_content(content, expected):
    assert token_class(content) == expected


def test_every_byte_has_a_class_and_control_means_no_ascii_text():
    classes = {byte: token_class(bytes([byte])) for byte in range(256)}
    assert set(classes.values()) == set(CLASSES)
    assert [byte for byte in range(32, 127) if classes[byte] == "control"] == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b" the", "␣the"),
        (b"\n\t", "↵⇥"),
        (b"\xe2", "\\xe2"),
        ("é".encode(), "é"),
        (b"\x00", "\\x00"),
        (b"<b>", "<b>"),
    ],
)
def test_printable_shows_what_cannot_be_seen(content, text):
    assert printable(content) == text
