"""The table of methods: every file of this folder, and what other packages register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moestro.balance.idle import idle_reason
from moestro.experts import Experts, make_experts
from moestro.layers import MoE

ENTRY_POINTS = "moestro.methods"

Recipe = Callable[..., MoE]


@dataclass(frozen=True)
class Option:
    """One option of a method: a keyword-only argument of its recipe."""

    name: str
    type: Any
    default: Any
    required: bool

    def parse(self, value: Any) -> Any:
        """The value as this option's type, or ValueError saying what was expected."""
        try:
            return TypeAdapter(self.type).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
            raise ValueError(f"option {self.name}={value!r}: {reason}; expected {self.type_name}") from None

    @property
    def type_name(self) -> str:
        """The type as a reader writes it."""
        return self.type.__name__ if isinstance(self.type, type) else str(self.type).replace("typing.", "")

    def __str__(self) -> str:
        return f"{self.name}: {self.type_name}" + ("" if self.required else f" = {self.default!r}")


@dataclass(frozen=True)
class Method:
    """A published method: where it comes from, what it takes, how it is built.

    Attributes:
        name: what `build` and recipes call it.
        catalogue: its id in the literature catalogue.
        title: title of the paper.
        paper: authors and year as cited in a sentence.
        year: of the paper.
        arxiv: identifier without prefix; empty if there is none.
        family: what kind of routing it is.
        causal: with default options, later tokens cannot change earlier outputs.
        batch_independent: with default options, a sequence's output does not depend on its neighbours.
    """

    name: str
    catalogue: str
    title: str
    paper: str
    year: int
    arxiv: str
    family: str
    causal: bool
    batch_independent: bool
    recipe: Recipe

    @property
    def summary(self) -> str:
        """First sentence of the recipe's docstring."""
        return (inspect.getdoc(self.recipe) or "").split("\n")[0]

    @property
    def file(self) -> str:
        """Where the recipe is written."""
        return inspect.getsourcefile(self.recipe) or ""

    @property
    def options(self) -> dict[str, Option]:
        """What the method takes, by name."""
        hints = typing.get_type_hints(self.recipe)
        return {
            name: Option(name, hints.get(name, Any), parameter.default, parameter.default is parameter.empty)
            for name, parameter in inspect.signature(self.recipe).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    def build(self, experts: Experts, **options: Any) -> MoE:
        """The layer around the given experts.

        Raises:
            ValueError: an unknown or missing option, a value that does not fit, or a balance that cannot act.
        """
        known = self.options
        for name in options:
            if name not in known:
                raise ValueError(f"{self.name} has no option {name!r}{suggestion(name, known)}; {self._takes()}")
        for name, option in known.items():
            if option.required and name not in options:
                raise ValueError(f"{self.name} needs the option {name!r}; {self._takes()}")
        values = {name: known[name].parse(value) for name, value in options.items()}
        moe = self.recipe(experts, **values)
        self._refuse_idle(moe, values)
        moe.method = self.name
        moe.options = {name: values.get(name, option.default) for name, option in known.items()}
        return moe

    def _refuse_idle(self, moe: MoE, values: dict[str, Any]) -> None:
        """A balance that someone asked for, other than by the method's default, must be able to act.

        Defaults pass: a layer is rebuilt from its saved options, which name them all.
        """
        asked = {name for name, value in values.items() if value != self.options[name].default}
        reasons = {
            name: idle_reason(loss, moe.router) for name, (coefficient, loss) in moe.losses.items() if coefficient
        }
        reasons |= {controller.option: controller.idle_reason(moe) for controller in moe.controllers}
        for name, reason in reasons.items():
            if reason and name in asked and values[name]:
                raise ValueError(f"{self.name}: option {name}={values[name]!r} cannot act: {reason}; leave it out")

    def bibtex(self) -> str:
        """A BibTeX entry."""
        authors = self.paper.rsplit(" ", 1)[0].replace(" et al.", " and others")
        where = f"  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n" if self.arxiv else ""
        key = self.name.replace("-", "")
        return (
            f"@misc{{{key}{self.year},\n  title = {{{self.title}}},\n  author = {{{authors}}},\n"
            f"  year = {{{self.year}}},\n{where}}}"
        )

    def _takes(self) -> str:
        return f"it takes {', '.join(map(str, self.options.values())) or 'no options'}"


_METHODS: dict[str, Method] = {}


def method(
    *,
    title: str,
    paper: str,
    family: str,
    arxiv: str = "",
    causal: bool = True,
    batch_independent: bool = True,
    name: str | None = None,
    catalogue: str | None = None,
) -> Callable[[Recipe], Recipe]:
    """Register a recipe: a function of experts and keyword-only options that answers an MoE layer.

    Args:
        title: title of the paper.
        paper: authors and year, e.g. "Fedus et al. 2021".
        family: e.g. "token-choice".
        arxiv: identifier, e.g. "2101.03961".
        causal: with default options, later tokens cannot change earlier outputs.
        batch_independent: with default options, a sequence's output does not depend on its neighbours.
        name: default: the function's name with hyphens.
        catalogue: default: the name.

    Raises:
        ValueError: a name that another file has taken, or a paper that does not end with a year.
    """
    year = paper.rsplit(" ", 1)[-1]
    if not (year.isdigit() and len(year) == 4):
        raise ValueError(f"paper {paper!r} must end with its year, as in 'Fedus et al. 2021'")

    def register(recipe: Recipe) -> Recipe:
        key = name or recipe.__name__.replace("_", "-")
        entry = Method(
            key, catalogue or key, title, paper, int(year), arxiv, family, causal, batch_independent, recipe
        )
        taken = _METHODS.get(key)
        if taken is not None and taken.file != entry.file:
            raise ValueError(f"method {key!r} is already defined in {taken.file}; give the new one another name")
        _METHODS[key] = entry
        return recipe

    return register


@cache
def _discover() -> None:
    package = importlib.import_module("moestro.methods")
    for module in pkgutil.iter_modules(package.__path__, "moestro.methods."):
        importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def all_methods() -> dict[str, Method]:
    """Every registered method by name, alphabetically: this package's and those of installed plug-ins."""
    _discover()
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> Method:
    """The method of that name, or ValueError with the nearest one."""
    methods = all_methods()
    if name not in methods:
        raise ValueError(f"unknown method {name!r}{suggestion(name, methods)}; there are {', '.join(methods)}")
    return methods[name]


def build(
    name: str,
    *,
    width: int,
    hidden: int,
    num_experts: int,
    activation: str = "swiglu",
    bias: bool = False,
    kernel: str = "auto",
    **options: Any,
) -> MoE:
    """Build an MoE layer by the name of its method.

        moe = moestro.build("switch", width=64, hidden=128, num_experts=8)
        y = moe(x)                                                         # x [batch, length, 64]

    Args:
        name: see `all_methods()`.
        width: model width.
        hidden: hidden size of one expert.
        num_experts: routed experts.
        activation: `swiglu`, `geglu`, `relu`, `gelu`, `silu` or `squared_relu`.
        bias: whether the experts' maps add one.
        kernel: back end of the experts, see `moestro.kernels`.
        options: of the method; `find_method(name).options` lists them.

    Raises:
        ValueError: an unknown method or option (with the nearest one), or sizes that do not fit.
    """
    chosen = find_method(name)
    return chosen.build(make_experts(num_experts, width, hidden, activation, bias, kernel), **options)


def suggestion(name: str, known: typing.Iterable[str]) -> str:
    """`, did you mean '...'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
