"""Code in a process of its own whose system calls the kernel kills or fails: strace attaches and injects."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path


def available() -> bool:
    """Whether strace is here and may attach."""
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


def traced(work: Callable[[], None], calls: tuple[str, ...], log: Path, inject: str = "") -> int:
    """Run `work` in a fork under strace; minus its signal, the number of its OSError, or 0.

    Args:
        work: what is traced, nothing before and after it.
        calls: the system calls to note in `log`.
        inject: what strace does to one of them, as its option `inject` says it.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reading, 1)
        try:
            work()
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:
            os._exit(254)
        os._exit(0)
    command = ["strace", "-p", str(pid), "-o", str(log), "-e", f"trace={','.join(calls)}"]
    command += ["-e", f"inject={inject}"] if inject else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        assert "attached" in said, said
        os.write(writing, b"!")
        _, status = os.waitpid(pid, 0)
        strace.communicate(timeout=60)
    os.close(reading)
    os.close(writing)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def noted(log: Path) -> list[str]:
    """The names of the calls in a log, in order."""
    return [line.partition("(")[0] for line in log.read_text().splitlines() if "(" in line and line[0].isalpha()]
