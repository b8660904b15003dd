"""Generation by a whole mixture-of-experts model on a CPU, against llama.cpp and transformers; and its limit.

The model has 12 layers of width 1024 with 64 experts of 512, 8 per token, and 8192 token ids, of random weights.

1. `decode`: one token through the experts that it chose of a bank. `of_dense` is the bandwidth at which they are
   read, as a share of what one dense matrix-vector product of the same bytes reaches by the same library, in turn
   with it; every round takes other experts of another layer, and another of as many dense bytes as the experts of
   all layers have, so that no cache holds either. Both by compiled steps (numba), and by torch's operators.
2. `generate`: prefill of a prompt and greedy decoding, each contender in a process of its own, in turns, in 16, 8
   and 4 bits; transformers only in bfloat16. `moestro-torch` decodes without numba.

    python benchmarks/model.py [--threads 2] [--repeat 3] [--prompt 512] [--new 32] [--bits 16,8,4] [--folder DIR]

llama.cpp's files (4.4 GB) go to a temporary folder, or to DIR, where they are found again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from contenders import EXPERTS, HIDDEN, TOP_K, WIDTH
from harness import Report, interleaved, parse, peer

from moestro.experts import GLU, quantise, quantise_linear, run_chosen
from moestro.inference import lay_out_for_decoding
from moestro.inference.single_row import as_map

COPIES = 6  # banks in turn: together far larger than any cache
DENSE_COPIES = COPIES * EXPERTS // TOP_K  # of as many bytes: of 6 at 4 bits, a cache of 32 MB answers a third


def decode(report: Report, bits: int, steps: str) -> None:
    """Add the row of one bank at one token, by `torch`'s operators or by `compiled` steps."""
    with torch.no_grad():
        bank: Any = GLU(EXPERTS, WIDTH, HIDDEN).bfloat16().eval()
        linear: Any = torch.nn.Linear(WIDTH, 3 * HIDDEN * TOP_K, bias=False).bfloat16()
        if bits < 16:
            bank, linear = quantise(bank, bits)[0], quantise_linear(linear, bits)[0]
        experts, dense = [deepcopy(bank) for _ in range(COPIES)], [deepcopy(linear) for _ in range(DENSE_COPIES)]
    chosen = cycle([torch.rand(EXPERTS).topk(TOP_K).indices for _ in range(31)])
    row, weight = torch.randn(1, WIDTH), torch.rand(1, TOP_K)
    for module in (*experts, *dense):
        lay_out_for_decoding(module, steps)
    if steps == "compiled":
        from moestro.experts.compiled import CompiledBank
        from moestro.inference.compiled_step import CompiledMap

        banks, maps = cycle(list(map(CompiledBank, experts))), cycle(list(map(CompiledMap, dense)))
        competing = {
            "experts": lambda: next(banks)(row, next(chosen), weight, row),
            "dense": lambda: next(maps)(row),
        }
    else:
        turn, maps, short = (
            cycle(experts),
            cycle([as_map(module, torch.bfloat16) for module in dense]),
            row.bfloat16(),
        )
        competing = {
            "experts": lambda: run_chosen(next(turn), short, next(chosen).tolist(), weight),
            "dense": lambda: next(maps)(short),
        }
    with torch.inference_mode():
        seconds = interleaved(competing, 40 * report.repeat, warm_up=10)
    num_bytes = 3 * WIDTH * HIDDEN * TOP_K * bits / 8
    report.add(
        bits=bits,
        steps=steps,
        experts_us=1e6 * seconds["experts"],
        dense_us=1e6 * seconds["dense"],
        experts_GB_s=num_bytes / seconds["experts"] / 1e9,
        of_dense=seconds["dense"] / seconds["experts"],
    )


class Contender:
    """A process that runs one model whenever it is asked."""

    def __init__(self, name: str, bits: int, report: Report, folder: str) -> None:
        arguments = report.arguments
        script = Path(__file__).parent / "contenders.py"
        command = [sys.executable, str(script), name, str(bits)]
        command += [str(value) for value in (arguments.threads, arguments.prompt, arguments.new, folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        self.name, self.log = name, tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )
        self._expect("ready")

    def run(self) -> dict[str, float]:
        """Tokens per second of one prefill and one generation."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self._expect("{"))
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()

    def _expect(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        self.log.seek(0)
        raise RuntimeError(f"{self.name} ended before it answered:\n{self.log.read()[-2000:]}")


def generate(report: Report, bits: int, folder: str) -> None:
    """Add the row of the whole model in so many bits."""
    names = ["moestro", "moestro-torch"] if peer("numba", "compiled steps") else ["moestro-torch"]
    if peer("xllamacpp") and peer("gguf", "llama.cpp's rows"):
        names.append("llama")
    if bits == 16 and peer("transformers"):
        names.append("transformers")
    contenders = [Contender(name, bits, report, folder) for name in names]
    try:
        rounds = [{each.name: each.run() for each in contenders} for _ in range(report.repeat + 1)][1:]
    finally:
        for each in contenders:
            each.close()
    row: dict[str, object] = {"bits": bits}
    for what in ("decode", "prefill"):
        speed = {name: median(answers[name][what] for answers in rounds) for name in names}
        best = speed.get("moestro", speed["moestro-torch"])
        row[what] = best
        for name in ("moestro-torch", "llama", "transformers"):
            row[f"{name}_{what}"] = speed.get(name)
        row[f"{what}_vs_llama"] = best / speed["llama"] if "llama" in speed else None
    report.add(**row)


def read_speed() -> float:
    """Bytes per second of a long dense bfloat16 matrix-vector product: what decoding can reach at most."""
    matrix, x = torch.ones(1 << 15, 4096, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bfloat16)
    with torch.inference_mode():
        seconds = interleaved({"read": lambda: F.linear(x, matrix)}, 5)["read"]
    return matrix.nbytes / seconds


def main() -> None:
    arguments = parse(__doc__, repeat=3, prompt=512, new=32, bits="16,8,4", folder="", only="decode,generate")
    report = Report("model", arguments)
    widths = [int(bits) for bits in arguments.bits.split(",")]
    print(f"a long dense product reads {read_speed() / 1e9:.1f} GB/s")
    if "decode" in arguments.only:
        for bits in widths:
            for steps in ("compiled", "torch") if peer("numba", "compiled steps") else ("torch",):
                decode(report, bits, steps)
    if "generate" in arguments.only:
        with tempfile.TemporaryDirectory() as temporary:
            for bits in widths:
                generate(report, bits, arguments.folder or temporary)
    report.finish()


if __name__ == "__main__":
    main()
