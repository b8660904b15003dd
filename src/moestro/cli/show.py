"""`moestro show`: the parts that a method is assembled from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.text import Text
from rich.tree import Tree

from moestro.cli.flags import Whole, parse_options
from moestro.cli.methods import method_facts
from moestro.cli.parts import describe_part, describe_parts
from moestro.cli.terminal import console, print_json
from moestro.cli.terminal import show as spell

if TYPE_CHECKING:
    from moestro.layers import MoE

app = App(
    name="show",
    help_epilogue="""\
Examples:
  moestro show switch
  moestro show deepseek-v3 --options.top-k 4 --num-experts 32
  moestro show mixtral --json""",
)
VOCAB_SIZE = 256  # for methods that need one: bytes


@app.default
def show(
    method: str,
    /,
    *,
    width: Whole = 64,
    hidden: Whole = 128,
    num_experts: Whole = 16,
    options: dict[str, str] | None = None,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Show the parts that a method is assembled from.

    Args:
        method: its name, see `moestro methods`.
        width: model width of the layer that is shown.
        hidden: hidden size of its experts.
        num_experts: how many it has.
        options: options of the method, for example --options.top-k 4.
        json: print the tree for machines.
    """
    facts = describe_method(
        method, width=width, hidden=hidden, num_experts=num_experts, **parse_options(options or {})
    )
    print_json(facts) if json else console().print(_tree(facts))


def describe_method(name: str, **arguments: Any) -> dict[str, Any]:
    """A method and the layer that it builds, as plain values.

    Args:
        name: of the method.
        arguments: those of `moestro.build`: width, hidden, num_experts and the options of the method.
    """
    from moestro.methods import build, find_method

    facts = method_facts(find_method(name))
    if "vocab_size" in facts["options"]:
        arguments.setdefault("vocab_size", VOCAB_SIZE)
    moe = build(name, **arguments)
    for option, value in moe.options.items():
        facts["options"][option]["value"] = value
    return {
        **facts,
        "parts": [dataclasses.asdict(part) for part in describe_parts(moe)],
        "causal": moe.causal,
        "batch_independent": moe.batch_independent,
        "losses": _losses(moe),
        "controllers": [dataclasses.asdict(describe_part("", each)) for each in moe.controllers],
        "parameters": dataclasses.asdict(moe.parameter_counts()),
    }


def _losses(moe: MoE) -> dict[str, dict[str, Any]]:
    return {
        name: {"coefficient": coefficient, **dataclasses.asdict(describe_part(name, loss))}
        for name, (coefficient, loss) in moe.losses.items()
    }


def _tree(facts: dict[str, Any]) -> Tree:
    paper = f"{facts['paper']}, arXiv:{facts['arxiv']}" if facts["arxiv"] else facts["paper"]
    tree = Tree(Text.assemble((facts["name"], "bold"), f"  {paper}  ", (facts["file"], "dim")))
    tree.add(Text(facts["summary"]))
    tree.add(Text(f"{facts['family']} · {_nature(facts)}"))
    for part in facts["parts"]:
        _add_part(tree, part)
    _add_losses(tree, facts)
    options = tree.add(Text("options", "bold"))
    for name, option in facts["options"].items():
        options.add(Text(f"{name}: {option['type']}{_values(option)}"))
    tree.add(Text(_counts(facts["parameters"])))
    return tree


def _nature(facts: dict[str, Any]) -> str:
    """Whom a token's output depends on."""
    causal = "causal" if facts["causal"] else "not causal: later tokens change earlier outputs"
    alone = "batch-independent" if facts["batch_independent"] else "depends on the other sequences of the batch"
    return f"{causal} · {alone}"


def _add_part(tree: Tree, part: dict[str, Any]) -> None:
    branch = tree.add(_line(part))
    for name, shape in part["parameters"].items():
        branch.add(Text(f"{name} {shape}", "dim"))
    for child in part["parts"]:
        _add_part(branch, child)


def _add_losses(tree: Tree, facts: dict[str, Any]) -> None:
    losses = tree.add(Text("losses" if facts["losses"] else "losses: none", "bold"))
    for name, loss in facts["losses"].items():
        losses.add(_line({**loss, "slot": f"{name} = {loss['coefficient']} *"}, colon=""))
    controllers = tree.add(Text("controllers" if facts["controllers"] else "controllers: none", "bold"))
    for controller in facts["controllers"]:
        controllers.add(_line(controller, colon=""))


def _line(part: dict[str, Any], colon: str = ":") -> Text:
    settings = f"({part['settings']})" if part["settings"] else ""
    slot = f"{part['slot']}{colon} " if part["slot"] else ""
    return Text.assemble((slot, "bold"), (part["name"], "cyan"), f"{settings}  ", (part["file"], "dim"))


def _values(option: dict[str, Any]) -> str:
    """The default, and the value in the layer that is shown where it is another."""
    default = "" if option["required"] else f" = {option['default']!r}"
    same = not option["required"] and option["value"] == option["default"]
    return default if same else f"{default}  (here {option['value']!r})"


def _counts(counts: dict[str, int]) -> str:
    return f"parameters: {spell(counts['total'])} in all, {spell(counts['active'])} active for a token"
