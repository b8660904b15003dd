"""`moestro generate`: continue a text with a trained model."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import App

from moestro.cli.flags import Whole
from moestro.cli.folders import model_folder

if TYPE_CHECKING:
    from moestro.data import Tokenizer
    from moestro.models import DecoderLM

app = App(
    name="generate",
    help_epilogue="""\
Examples:
  moestro generate runs/first-seed0 "def main("
  moestro generate runs/first-seed0/model "The" --temperature 0.8 --top-p 0.9 --seed 3""",
)


@app.default
def generate(
    model: Path,
    prompt: str,
    /,
    *,
    max_new_tokens: Whole = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: Whole = 0,
    steps: Literal["auto", "torch", "compiled"] = "auto",
) -> None:
    """Continue a text with a trained model.

    Args:
        model: a model folder, or the folder of a run.
        prompt: the text to continue.
        max_new_tokens: tokens to generate at most.
        temperature: 0 takes the likeliest token; higher values draw more freely.
        top_p: draw from the likeliest tokens that hold this share of the probability.
        seed: of the draws.
        steps: what decodes a token: torch's operators or, faster, steps compiled by numba; auto takes the latter
            where moestro[fast] is installed. A line on stderr says which.
    """
    from moestro import inference
    from moestro.data import open_tokenizer
    from moestro.models import load_model

    folder = model_folder(model)
    tokenizer = open_tokenizer(folder)
    loaded = load_model(folder)
    print(f"decoding by {plan(loaded, steps)}", file=sys.stderr)
    inference.lay_out_for_decoding(loaded, steps)
    tokens = inference.generate(
        loaded,
        tokenizer.encode(prompt),
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
        steps=steps,
    )
    print(prompt, end="", flush=True)
    for text in decode_stream(tokenizer, tokens):
        print(text, end="", flush=True)
    print()


def plan(model: DecoderLM, steps: str) -> str:
    """`plan_decoding`, and the time that compiling took if anyone could notice it."""
    from moestro import inference

    words = inference.plan_decoding(model, steps)
    if not words.startswith("compiled"):
        return words
    seconds = inference.compile_steps()
    return words if seconds < 2 else f"{words}; compiled them in {seconds:.0f} s, once for this machine"


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as tokens come; the bytes of one character wait for each other, broken ones become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)
