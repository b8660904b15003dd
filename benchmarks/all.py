"""Run every benchmark and keep the figures in `benchmarks/results/<date>-<machine>.json`, with a Markdown table.

    python benchmarks/all.py [layer router ...] [--threads 2] [--repeat 9]

A benchmark that fails is named at the end, and the command then fails too; the others' figures are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine, markdown

HERE = Path(__file__).parent
SCRIPTS = ("layer", "router", "memory", "model", "hf_models", "hf_record")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[name for name in SCRIPTS if (HERE / f"{name}.py").exists()])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, help="rounds per case; by default each benchmark's own")
    arguments = parser.parse_args()
    documents, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.scripts:
            file = Path(folder, f"{name}.json")
            if run(name, file, arguments) == 0:
                documents.append(json.loads(file.read_text()))
            else:
                failed.append(name)
    if documents:
        keep(documents)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, file: Path, arguments: argparse.Namespace) -> int:
    print(f"\n== {name}", flush=True)
    options = ["--threads", str(arguments.threads), "--json", str(file)]
    if arguments.repeat is not None:
        options += ["--repeat", str(arguments.repeat)]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, str(HERE / f"{name}.py"), *options]
    return subprocess.run(command, check=False, env=os.environ | threads).returncode


def keep(documents: list[dict[str, Any]]) -> None:
    """Write the JSON and the Markdown file; benchmarks that did not run this time keep their earlier figures."""
    facts = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['processor']} {facts['cores']} cores".lower()).strip("-")
    path = HERE / "results" / f"{documents[0]['date']}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    merged = {document["benchmark"]: document for document in [*earlier, *documents]}
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    title = f"# {facts['processor']}, {facts['cores']} cores, torch {facts['torch']}\n\n"
    path.with_suffix(".md").write_text(title + "\n".join(markdown(document) for document in merged.values()))
    print(f"\nwrote {path} and its table {path.with_suffix('.md').name}")


if __name__ == "__main__":
    sys.exit(main())
