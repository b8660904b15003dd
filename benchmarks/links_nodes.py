"""Namespaces as nodes: a pair of virtual cards between them, with a limit of what leaves each."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CARD = "card0"
# No window that shrinks between rounds: what is left of TCP is its headers. The queue is longer than all windows.
SETTINGS = {"tcp_slow_start_after_idle": "0", "tcp_congestion_control": "reno"}


class Refused(Exception):
    """This machine does not allow a step."""


@contextmanager
def nodes(number: int, rate: int) -> Iterator[list[int]]:
    """Namespaces joined by limited cards; yields a process in each. They end when their standard input does."""
    held: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(number):
            held.append(_holder())
        pids = [holder.pid for holder in held]
        _ask(f"ip link add {CARD} netns {pids[0]} type veth peer name {CARD} netns {pids[1]}")
        for node, pid in enumerate(pids):
            inside = f"nsenter --target {pid} --net"
            _ask(f"{inside} ip link set lo up")
            _ask(f"{inside} ip address add 10.77.0.{node + 1}/24 dev {CARD}")
            _ask(f"{inside} ip link set {CARD} up")
            _ask(f"{inside} tc qdisc add dev {CARD} root tbf rate {rate}mbit burst 16kb limit 64mb")
            for name, value in SETTINGS.items():
                _ask(f"{inside} sysctl -q -w net.ipv4.{name}={value}")
        yield pids
    finally:
        for holder in held:
            holder.kill()
            holder.wait()


def _holder() -> subprocess.Popen[bytes]:
    command = ["unshare", "--net", "sh", "-c", "echo here; exec cat > /dev/null"]
    try:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise Refused("unshare is not installed") from error
    assert holder.stdout is not None
    assert holder.stderr is not None
    if holder.stdout.readline() != b"here\n":
        raise Refused(f"`{' '.join(command[:2])}`: {holder.stderr.read().decode().strip()}")
    return holder


def _ask(command: str) -> None:
    try:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused(f"{command.split()[0]} is not installed") from error
    if done.returncode:
        raise Refused(f"`{command}`: {done.stderr.strip() or done.stdout.strip()}")
