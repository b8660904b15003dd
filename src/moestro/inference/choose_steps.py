"""Which steps decode: torch's operators, or machine code where this process can make it."""

from __future__ import annotations

import time

from moestro.kernels.compiled import why_not

NAMES = ("torch", "compiled")


def choose_steps(name: str = "auto") -> str:
    """The kind of steps that a name stands for here: "auto" is "compiled" where that can be had, else "torch".

    Raises:
        ValueError: an unknown name, or compiled steps where there are none, with the reason.
    """
    if name not in (*NAMES, "auto"):
        raise ValueError(f"steps={name!r}; choose one of auto, {', '.join(NAMES)}")
    reason = None if name == "torch" else why_not()
    if name == "compiled" and reason is not None:
        raise ValueError(f"no compiled steps here: {reason}")
    return "torch" if name == "torch" or reason is not None else "compiled"


def compile_steps() -> float:
    """Have the compiled steps ready; the seconds that it took: many the first time, for what is kept is read again.

    Raises:
        ValueError: where there are none, with the reason.
    """
    choose_steps("compiled")
    start = time.perf_counter()
    from moestro.kernels.compiled.attention import attention_step
    from moestro.kernels.compiled.bank import bank_step
    from moestro.kernels.compiled.linear import linear_step
    from moestro.kernels.compiled.unpack import unpack_step

    for step in (attention_step, bank_step, linear_step, unpack_step):
        step()
    return time.perf_counter() - start
