"""Transports over slow links: namespaces as nodes, a pair of virtual cards between them, tbf as their limit.

    python benchmarks/links.py [--rate 40] [--repeat 7] [--json links.json]

Two nodes of two ranks. Every regime runs `linear` and the other transports in turns; `gain` is the time of `linear`
over theirs, `predicted_gain` is what `links_model.py` says from bytes, messages, rate, latency and the order in
which every rank does things, fitted to nothing; `off` is the difference in per cent. Experts sleep as long as their
rows would take, so that overlap is what is measured, and not the arithmetic of four processes on few cores. Latency
is a pause of a rank's sender before each message to another node, one after another, while the rank computes on.

1. `overlap`: experts take as long as the exchanges. Chunks hide one behind the other; two levels gain nothing, for
   they send the same bytes over the same link; `deduplicated` sends fewer.
2. `bytes`: exchanges only. There is nothing to hide behind: chunks gain nothing.
3. `latency`: few bytes, 50 ms for each message. Two levels send half as many; chunks send more.

Linux only: needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), `ip`, `tc`, `nsenter`, `unshare` and the kernel's veth and
tbf; where one is missing, a line says which step was refused, and nothing is measured. The namespaces have no names
and live as long as the processes in them, which end with this one, however it ends.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Report, parse
from links_model import Action, Ask, Compute, Replay, Start, Wait
from links_nodes import CARD, Refused, nodes
from links_rank import Case, Sizes

FRAME = 1448 / 1514  # what TCP with time stamps leaves of an Ethernet frame, which is what tbf counts


def cases(rate: int) -> list[Case]:
    """The regimes; tokens and sleeps go with the rate, so that an exchange takes a third of a second."""
    tokens = round(192 * rate / 40)
    exchanges = (
        2 * tokens * Sizes.top_k * Sizes.width * 4 / bytes_per_second(rate)
    )  # half of each of two ranks' rows
    every = ("linear", "two-level", "leader", "deduplicated", "pairwise")
    return [
        Case("overlap", tokens, round(exchanges, 3), 0.0, (*every, "chunked 2", "chunked 4")),
        Case("bytes", tokens, 0.0, 0.0, (*every, "chunked 4")),
        Case("latency", tokens // 16, round(exchanges / 16, 3), 0.05, (*every, "chunked 2")),
    ]


def bytes_per_second(rate: int) -> float:
    return rate * 1e6 / 8 * FRAME


def run_ranks(case: Case, sizes: Sizes, pids: list[int], rounds: int, tape: bool = False) -> list[dict[str, Any]]:
    """What each rank answers: seconds of each round, or what it does; in namespaces, or, without any, as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"case": asdict(case), "sizes": asdict(sizes), "tape": tape, "repeat": rounds, "warm_up": 2 - tape}
        (folder / "job.json").write_text(json.dumps(job))
        card = CARD if pids else "lo"
        environment = os.environ | {"GLOO_SOCKET_IFNAME": card, "OMP_NUM_THREADS": "1"}
        ranks = []
        try:
            for rank in range(sizes.ranks):
                inside = ["nsenter", f"--target={pids[rank // sizes.per_node]}", "--net"] if pids else []
                command = [*inside, sys.executable, str(Path(__file__).with_name("links_rank.py")), str(rank), name]
                ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
            if any(rank.wait(300) for rank in ranks):
                raise RuntimeError(f"a rank failed in the regime {case.name}")
            return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(sizes.ranks)]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def predicted(case: Case, sizes: Sizes, rate: int) -> dict[str, float]:
    """Seconds of each transport on paper."""
    answers = run_ranks(case, sizes, [], rounds=0, tape=True)
    speed = bytes_per_second(rate)
    return {
        words: Replay(
            [[_action(each) for each in answer[words]] for answer in answers], sizes.per_node, speed, case.latency
        ).seconds()
        for words in case.transports
    }


def _action(each: dict[str, Any]) -> Action:
    if "ask" in each:
        return Ask(tuple(each["group"]), tuple(each["ask"]))
    if "group" in each:
        return Start(tuple(each["group"]), tuple(each["send"]), tuple(each["receive"]), each["asked"])
    return Wait(each["wait"]) if "wait" in each else Compute(each["seconds"])


def measured(case: Case, sizes: Sizes, pids: list[int], rounds: int) -> dict[str, float]:
    """Median seconds of each transport, of the slowest rank of every round."""
    answers = run_ranks(case, sizes, pids, rounds)
    return {words: statistics.median(map(max, *(answer[words] for answer in answers))) for words in case.transports}


def compare(report: Report, pids: list[int], rate: int, regimes: list[str]) -> None:
    sizes = Sizes()
    for case in cases(rate):
        if case.name not in regimes:
            continue
        paper, clock = predicted(case, sizes, rate), measured(case, sizes, pids, report.repeat)
        for words in case.transports:
            gain, expected = clock["linear"] / clock[words], paper["linear"] / paper[words]
            report.add(
                case=f"{case.name}, {words}",
                predicted_s=paper[words],
                measured_s=clock[words],
                predicted_gain=expected,
                gain=gain,
                off=f"{100 * (gain / expected - 1):+.1f} %",
            )


def main() -> None:
    arguments = parse(__doc__, repeat=7, rate=40, regimes="overlap,bytes,latency")
    try:
        with nodes(2, arguments.rate) as pids:
            report = Report("links", arguments)
            compare(report, pids, arguments.rate, arguments.regimes.split(","))
            report.finish()
    except Refused as reason:
        print(f"links: left out, this machine refused {reason}", flush=True)


if __name__ == "__main__":
    main()
