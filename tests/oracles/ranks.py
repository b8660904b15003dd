"""Run a function in several gloo processes at once, within a bounded time; what they return comes back.

    echo '{"work": "oracles.some_module:function", "ranks": 4, "argument": ...}' | python -m oracles.ranks

One process imports what is needed and is then forked into the ranks, which is much cheaper than so many imports.
They meet in a file and listen on the loopback device only.
"""

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any


def run_ranks(work: str, ranks: int, argument: Any = None, seconds: int = 120) -> list[Any]:
    """What `work(rank, argument)` returns on every rank; RuntimeError if one fails or the time is over.

    Args:
        work: "module:function"; a function `prepare` beside it, if any, is called with the argument before the
            fork, and its answer takes the argument's place.
        ranks: processes.
        argument: for JSON.
        seconds: after which a hang is a failure, with the stack of every rank.
    """
    job = {"work": work, "ranks": ranks, "argument": argument, "seconds": seconds}
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "oracles.ranks"]
    how = {"env": env, "capture_output": True, "text": True, "timeout": seconds + 120, "check": False}
    done = subprocess.run(command, input=json.dumps(job), **how)
    if done.returncode:
        raise RuntimeError(f"ranks failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-8000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _rank(rank: int, job: dict[str, Any], folder: str, function: Any, argument: Any) -> None:
    import torch.distributed as dist

    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=job["ranks"],
        timeout=timedelta(seconds=job["seconds"]),
    )
    answer = function(rank, argument)
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


def _main(job: dict[str, Any]) -> int:
    import torch
    import torch._dynamo  # or every rank imports it for itself

    torch.set_num_threads(1)
    module, name = job["work"].split(":")
    module = import_module(module)
    argument = module.prepare(job["argument"]) if hasattr(module, "prepare") else job["argument"]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    _rank(rank, job, folder, getattr(module, name), argument)
                    status = 0
                except BaseException:
                    print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
                    sys.stderr.flush()
                os._exit(status)
            children.append(child)
        failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(failed):
            return 1
        print(json.dumps([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(job["ranks"])]))
    return 0


if __name__ == "__main__":
    sys.exit(_main(json.load(sys.stdin)))
