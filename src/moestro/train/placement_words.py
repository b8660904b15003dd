"""What a recipe may say of the placement of experts; imports no torch before a policy is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from moestro.train.recipe_errors import did_you_mean
from moestro.train.yaml_source import RecipeError

NO_POLICY = ("none", "null")


class _Section(Protocol):
    @property
    def policy(self) -> str | None: ...
    @property
    def predictor(self) -> str: ...
    @property
    def slots(self) -> int | None: ...
    @property
    def every(self) -> int: ...
    @property
    def history(self) -> int: ...
    @property
    def speeds(self) -> Mapping[str, float]: ...


def check_placement(section: _Section, place: Callable[[str], str]) -> None:
    """Raise RecipeError unless policy and predictor exist and can act.

    Args:
        section: the recipe's.
        place: where the value of a key came from.
    """
    if section.policy is None:
        return
    from moestro.parallel import POLICIES, PREDICTORS
    from moestro.parallel.policies import REPLICATING, WEIGHING
    from moestro.parallel.predict import LEAST_STEPS

    movers = [name for name in POLICIES if name != "contiguous"]  # which never moves anything
    for key, word, known in (("policy", section.policy, movers), ("predictor", section.predictor, [*PREDICTORS])):
        if word not in known:
            hint = did_you_mean(word, known) or f"; there are {', '.join(known)}"
            raise RecipeError(f"{place(key)}: unknown {key} {word!r}{hint}")
    if section.slots is not None and section.policy not in REPLICATING:
        raise RecipeError(
            f"{place('slots')}: {section.policy} holds every expert once; leave slots out, or choose one of "
            f"{', '.join(sorted(REPLICATING))}"
        )
    for key in section.speeds if section.policy not in WEIGHING else ():
        raise RecipeError(
            f"{place(key)}: {section.policy} compares loads only, {key} has no effect; leave it out, or choose one "
            f"of {', '.join(sorted(WEIGHING))}"
        )
    least = LEAST_STEPS.get(section.predictor, 1)
    for key, steps in (("every", section.every), ("history", section.history)):
        if steps < least:
            raise RecipeError(
                f"{place(key)}: {section.predictor} needs {least} steps; pass {key} of at least as many"
            )


def without_idle_placement(values: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file's values; where the caller takes the placement policy away, the rest of its section goes too.

    Args:
        values: of the file.
        given: what replaces them.
    """
    policy: Any = given
    for key in ("parallel", "placement", "policy"):
        if not isinstance(policy, Mapping) or key not in policy:
            return values
        policy = policy[key]
    if str(policy).lower() not in NO_POLICY or not isinstance(values.get("parallel"), Mapping):
        return values
    return {**values, "parallel": {key: value for key, value in values["parallel"].items() if key != "placement"}}
