"""The command as a whole: fast help, one line for every error, the right exit code."""

import subprocess
import sys

import pytest
from cyclopts import App

from moestro.cli import app as app_module
from moestro.cli import build_app, main
from moestro.cli.app import COMMANDS

HEAVY = ("torch", "numpy", "transformers", "plotly", "jinja2")


def run(words, capsys):
    """Exit code, stdout and stderr of a command in this process."""
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_and_wrong_words_import_nothing_heavy():
    """Measured on a quiet machine: help 0.13 s, a wrong option of train 0.25 s; torch alone takes over a second."""
    script = f"""
import contextlib, io, sys
from moestro.cli import main
for words in (["--help"], ["trian"], ["train", "--help"], ["train", "--steps", "abc"], ["plan", "--widht", "3"],
              ["generate", "--help"], ["show"], ["--version"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(words)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (words, heavy)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_alone_needs_no_recipe():
    script = """
import sys
from moestro.cli import main
main(["--help"])
assert "pydantic" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name, _, _ in COMMANDS)
    assert done.stdout.index("Examples:") > done.stdout.index("Commands:")


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["tokenise"], ["'tokenise'", "there are train, generate"]),
        (["train", "--steps", "abc"], ["--steps", "'abc'", "whole number", "--steps 400"]),
        (["train", "--steps", "3.5"], ["--steps", "'3.5'", "whole number"]),
        (["train", "--train.learning-rate", "x"], ["a number", "--train.learning-rate 0.0012"]),
        (["train", "--width", "64"], ["--width", "--model.width"]),
        (["train", "--widht", "64"], ["--widht", "--model.width"]),
        (["train", "--learning_rate", "64"], ["--train.learning-rate"]),
        (["train", "--steps", "0"], ["train.steps", "1"]),
        (["train", "--steps"], ["--steps", "requires an argument"]),
        (["train", "--steps", "1", "--train.steps", "2"], ["--train.steps", "multiple times"]),
        (["train", "a.yaml", "b.yaml"], ["'b.yaml'", "moestro train --help"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "first"]),
        (["train", "--method", "mixtrla"], ["mixtrla", "mixtral"]),
        (["train", "--model.options.topk", "3"], ["topk", "top_k"]),
        (["train", "--model.attention", "latnet"], ["latent"]),
        (["plan", "--model.options.zzz", "3", "--no-probe"], ["zzz", "it takes top_k"]),
        (["show", "swich"], ["'swich'", "'switch'"]),
        (["show", "switch", "--options.jiter", "1"], ["jiter", "jitter", "capacity_factor"]),
        (["show", "mixtral", "--options.top-k", "99"], ["top_k=99", "16 experts"]),
        (["cite", "bibtex"], ["'bibtex'", "deepseek-v3"]),
        (["methods", "--family", "none"], ["'none'", "token-choice"]),
        (["generate", "nowhere", "x"], ["nowhere", "model folder"]),
        (["eval", "nowhere"], ["--data"]),
        (["eval", "nowhere", "--data", "x.txt"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
    ],
)
def test_a_wrong_word_gets_one_line_with_a_suggestion(words, hints, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(words, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not [hint for hint in hints if hint not in err], err
    assert "pydantic" not in err
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_wrong_key_in_a_recipe_is_found_by_file_and_line(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 0\nmodel:\n  num_expert: 4\n")
    code, _, err = run(["train", str(recipe)], capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert f"{recipe}:3" in err
    assert "num_experts" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("this, because that;\n  do so"), 2, "error: this, because that; do so"),
        (RuntimeError("the loss is nan at step 3"), 1, "error: the loss is nan at step 3"),
        (ModuleNotFoundError("plotly is missing; pip install it"), 1, "error: plotly is missing; pip install it"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied"),
        (KeyError("k"), 1, "error: KeyError: 'k'; add --debug to see where"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_goes_wrong_inside_is_one_line_too(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(app_module, "build_app", lambda: failing(error))
    assert run([], capsys) == (code, "", line + "\n")


def test_a_stop_says_what_was_saved_and_which_signal_came(capsys, monkeypatch):
    from moestro.train import Stopped

    monkeypatch.setattr(app_module, "build_app", lambda: failing(Stopped("saved", 3, 15)))
    assert run([], capsys) == (143, "", "saved\n")


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_debug_lets_the_traceback_through(by, monkeypatch):
    monkeypatch.setattr(app_module, "build_app", lambda: failing(ValueError("inside")))
    monkeypatch.setenv("MOESTRO_DEBUG", "1" if by == "environment" else "0")
    with pytest.raises(ValueError, match="inside"):
        main(["--debug"] if by == "flag" else [])


def test_version(capsys):
    import moestro

    assert run(["--version"], capsys) == (0, f"{moestro.__version__}\n", "")


@pytest.mark.parametrize(("name", "summary"), [(name, summary) for name, _, summary in COMMANDS])
def test_every_command_has_help_with_examples_at_the_end(name, summary, capsys):
    code, out, _ = run([name, "--help"], capsys)
    command = build_app()[name]
    assert code == 0
    assert (command.default_command.__doc__ or "").startswith(summary)
    assert summary in out
    assert f"moestro {name}" in out.split("Examples:\n")[1]
    assert not set(out) & set("╭│╰\x1b")  # plain, for this is no terminal


def failing(error: BaseException) -> App:
    """A command line that raises."""
    app = App(suppress_keyboard_interrupt=False)

    @app.default
    def fail() -> None:
        raise error

    return app
