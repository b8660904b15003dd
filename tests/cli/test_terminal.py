"""How results are printed."""

import io
import json

import pytest

from moestro.cli.terminal import console, duration, print_json, print_table, show, size


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1 234 567"),
        (1.23456, "1.235"),
        (12345.6, "12 346"),
        (True, "yes"),
        (None, "-"),
        ("x", "x"),
    ],
)
def test_values_as_people_read_them(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4.0 TiB")]
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_pipe_gets_plain_unwrapped_lines(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table([{"name": "a" * 200, "count": 3}, {"name": "b", "count": 1234}], ("name", "count"))
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "count"]
    assert first.endswith("    3")  # numbers stand at the right
    assert second.endswith("1 234")


def test_a_narrow_terminal_cuts_the_last_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    print_table([{"name": "a" * 10, "summary": "word " * 9}], ("name", "summary"), one_line=True)
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("a" * 10 + "  word")
    assert line.endswith("…")


@pytest.mark.parametrize("setting", ["NO_COLOR", None])
def test_a_terminal_gets_colours_unless_told_not_to(setting, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if setting:
        monkeypatch.setenv(setting, "1")
    stream = Terminal()
    console(stream).print("x", style="cyan")
    assert ("\x1b[36m" in stream.getvalue()) is (setting is None)


def test_json_is_exact(capsys):
    print_json({"loss": 0.1 + 0.2, "text": "ä[bold]"})
    assert json.loads(capsys.readouterr().out) == {"loss": 0.1 + 0.2, "text": "ä[bold]"}
