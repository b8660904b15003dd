"""The command line as a whole: its commands, imported only when used, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App

from moestro import __version__
from moestro.cli.errors import describe_error, exit_code
from moestro.cli.terminal import console

#: Command, module and summary; the modules are imported when their command is used, so help needs no torch.
COMMANDS = (
    ("train", "train", "Train a Mixture-of-Experts language model and its dense twin."),
    ("generate", "generate", "Continue a text with a trained model."),
    ("eval", "evaluate", "Measure a trained model in bits per byte of a text."),
    ("plan", "plan", "Say what a recipe costs before it is trained."),
    ("study", "study", "Train many methods under equal conditions and compare them."),
    ("leaderboard", "leaderboard", "Print the table of finished studies as a page of documentation."),
    ("convert", "convert", "Write a model in another layout."),
    ("quantise", "quantise", "Write a model whose weights are 8-bit or 4-bit codes."),
    ("checkpoints", "checkpoints", "List the checkpoints of a run, and verify them."),
    ("replay", "replay", "Run a step that met a bad number once more, alone."),
    ("report", "report", "Write the page that shows what the experts of a run did."),
    ("inspect", "inspect", "Run a model over a text and show what its experts do."),
    ("diff", "diff", "Say what changed between two models, or two traces."),
    ("placement", "placement", "Say what placing a run's experts by their load would gain."),
    ("doctor", "doctor", "Say which known defects training a transformers model would meet."),
    ("methods", "methods", "List the routing methods and the papers they follow."),
    ("losses", "losses", "List what keeps experts busy: losses, controllers, capacities."),
    ("show", "show", "Show the parts that a method is assembled from."),
    ("cite", "cite", "Print the BibTeX entry of a method's paper."),
)

EXAMPLES = """\
Examples:
  moestro train
  moestro train --method switch --steps 200 --seed 1
  moestro generate runs/first-seed0 "def main("
  moestro show mixtral

`moestro COMMAND --help` lists the options of a command.
`--debug` or MOESTRO_DEBUG=1 shows the traceback of an error.
NO_COLOR=1 turns colours off."""


def build_app() -> App:
    """The commands, and how they print: with colours and boxes on a terminal, plain lines elsewhere."""
    app = App(
        name="moestro",
        version=__version__,
        help="Every Mixture-of-Experts method as a composition of a few swappable parts.",
        help_epilogue=EXAMPLES,
        help_format="plaintext",
        console=console(),
        help_formatter=None if sys.stdout.isatty() else "plain",
        suppress_keyboard_interrupt=False,
        version_flags=["--version"],
    )
    for order, (name, module, summary) in enumerate(COMMANDS):
        app.command(f"moestro.cli.{module}:app", name=name, help=summary, sort_key=order)
    return app


def set_waiting() -> None:
    """Let threads that wait for work spin for a fifth of a millisecond and then sleep, unless the user decides.

    Beside two busy processes on two cores, threads that spin for long make a training step many times slower; those
    that sleep at once make every step 20 % slower on a machine of one's own. Read when torch is imported, later.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and answer with its exit code.

    0 it worked, 1 it failed, 2 it was asked the wrong way, 130 it was stopped by ctrl-C. An error is one line
    on stderr; `--debug` or MOESTRO_DEBUG=1 lets the traceback through.

    Args:
        arguments: the words after `moestro`; default: those of this process.
    """
    set_waiting()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("MOESTRO_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        result = build_app()(words, result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()  # a closed pipe is noticed here and not at exit
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt as stop:  # `train` raises one that says what it saved
        print(str(stop) or "stopped", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # `moestro methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return exit_code(error)
