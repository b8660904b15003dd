"""One line for every error: what was wrong, what was expected, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

EXPECTED = {int: ("a whole number", "100"), float: ("a number", "0.1")}


def exit_code(error: Exception) -> int:
    """2 for what the user asked (wrong words, `ValueError` in this library), 1 for what failed."""
    return 2 if isinstance(error, CycloptsError | ValueError) else 1


def describe_error(error: Exception) -> str:
    """The error as one line, without the name of its class unless nothing else is known.

    Args:
        error: what a command raised.
    """
    if isinstance(error, CycloptsError):
        return _one_line(_describe_usage(error))
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return _one_line(f"{name}{error.strerror}")
    if isinstance(error, ValueError | RuntimeError | ArithmeticError | ImportError) and str(error):
        return _one_line(str(error))
    return _one_line(f"{type(error).__name__}: {error}; add --debug to see where")


def closest(word: str, names: Iterable[str]) -> str | None:
    """The name that a misspelt word is most like, or None."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=0.6)), None)


def _describe_usage(error: CycloptsError) -> str:
    error.verbose = False
    if isinstance(error, UnknownCommandError):
        return _unknown_command(error)
    if isinstance(error, UnknownOptionError):
        return _unknown_option(error)
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected {' '.join(map(repr, error.unused_tokens))}; see `{_command(error)} --help`"
    if isinstance(error, CoercionError) and error.token is not None and error.target_type in EXPECTED:
        return _wrong_number(error)
    hint = f"see `{_command(error)} --help`" if isinstance(error, MissingArgumentError | CoercionError) else ""
    sentence = str(error).strip().rstrip(".")
    return f"{sentence[:1].lower()}{sentence[1:]}{'; ' * bool(hint)}{hint}"


def _unknown_command(error: UnknownCommandError) -> str:
    word = (error.unused_tokens or [""])[0]
    names = [name for name in (error.app or ()) if not name.startswith("-")]
    guess = closest(word, names)
    hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(names)}"
    return f"unknown command {word!r}; {hint}"


def _unknown_option(error: UnknownOptionError) -> str:
    """Also finds `--model.width` for `--width`: people remember the last word."""
    word = error.token.keyword or error.token.value
    names = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
    last_words = {f"--{name.lstrip('-').rsplit('.', 1)[-1]}": name for name in reversed(names)}
    guess = closest(word, [*names, *last_words])
    guess = last_words.get(guess or "", guess)
    hint = f"did you mean {guess}?" if guess else f"see `{_command(error)} --help`"
    return f"unknown option {word}; {hint}"


def _wrong_number(error: CoercionError) -> str:
    """What a number option takes, with its default as the example."""
    assert error.token is not None
    kind, example = EXPECTED[error.target_type]  # type: ignore[index]
    name = error.token.keyword or (error.argument.name if error.argument else "")
    example = _default(error) or example
    return (
        f"{name} takes {kind}, not {error.token.value!r}; for example {name} {example} "
        f"(see `{_command(error)} --help`)"
    )


def _default(error: CoercionError) -> str | None:
    """The default that the help of a recipe option ends with."""
    words = (error.argument.parameter.help or "") if error.argument else ""
    return words.rsplit("[default: ", 1)[1].rstrip("]") if "[default: " in words else None


def _command(error: CycloptsError) -> str:
    return " ".join(["moestro", *(word for word in error.command_chain or () if word != "moestro")])


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
