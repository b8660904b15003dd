"""Run every benchmark; keep the figures in `benchmarks/results/<date>-<machine>.json` and as `docs/benchmarks.md`.

    python benchmarks/all.py [layer-olmoe router ...] [--threads 2] [--repeat 9] [--folder DIR]

A part that fails is named at the end, and the command then fails too; the others' figures are kept. Parts that do
not run this time keep their figures of the same day. Parts whose peer is not installed, or that this machine does
not allow (`links` needs network namespaces), are left out with a line.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
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
DOCS = HERE.parent / "docs" / "benchmarks.md"
PARTS: dict[str, tuple[str, ...]] = {
    "layer-olmoe": ("layer", "--shapes", "OLMoE", "--dtypes", "bfloat16"),
    "layer-olmoe-float32": ("layer", "--shapes", "OLMoE", "--dtypes", "float32"),
    "layer-mixtral": ("layer", "--shapes", "Mixtral", "--dtypes", "bfloat16"),
    "layer-mixtral-float32": ("layer", "--shapes", "Mixtral", "--dtypes", "float32"),
    "layer-qwen3": ("layer", "--shapes", "Qwen3", "--dtypes", "bfloat16", "--paths", "grouped_mm",
                    "--tokens", "4096"),
    "layer-qwen3-512": ("layer", "--shapes", "Qwen3", "--dtypes", "bfloat16", "--paths", "grouped_mm",
                        "--tokens", "512"),
    "layer-tiny": ("layer", "--shapes", "tiny"),
    "layer-forward": ("layer", "--shapes", "OLMoE,Qwen3", "--tokens", "1,64,1024", "--passes", "forward",
                      "--dtypes", "bfloat16"),
    "scaling": ("scaling",),
    "router": ("router",),
    "memory": ("memory",),
    "training": ("training",),
    "model-16": ("model", "--bits", "16"),
    "model-8": ("model", "--bits", "8"),
    "model-4": ("model", "--bits", "4"),
    "guard": ("guard",),
    "links": ("links", "--repeat", "5"),
    "hf-models": ("hf_models",),
    "hf-record": ("hf_record",),
}  # fmt: skip
NEEDS = {"hf_models": "transformers", "hf_record": "transformers"}


def main() -> int:
    known = [part for part, (script, *_) in PARTS.items() if (HERE / f"{script}.py").exists()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=known, metavar="part", help=f"of {', '.join(known)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, help="rounds per case; by default each benchmark's own")
    parser.add_argument("--folder", help="where llama.cpp's files are kept for another time (4.4 GB)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(known):
        parser.error(f"there is no {min(unknown)}; choose of {', '.join(known)}")
    documents, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for part in filter(has_its_peer, arguments.parts):
            file = Path(folder, f"{part}.json")
            if run(part, file, arguments):
                failed.append(part)
            elif file.exists():  # else the benchmark said why it was left out
                documents.append({"part": part, **json.loads(file.read_text())})
    if documents:
        keep(documents)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def has_its_peer(part: str) -> bool:
    module = NEEDS.get(PARTS[part][0])
    if module is None or importlib.util.find_spec(module) is not None:
        return True
    print(f"{module} is not installed: {part} is left out", flush=True)
    return False


def run(part: str, file: Path, arguments: argparse.Namespace) -> int:
    print(f"\n== {part}", flush=True)
    script, *options = PARTS[part]
    options += ["--threads", str(arguments.threads), "--json", str(file)]
    if arguments.repeat is not None:
        options += ["--repeat", str(arguments.repeat)]
    if script == "model" and arguments.folder:
        options += ["--folder", arguments.folder]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, str(HERE / f"{script}.py"), *options]
    return subprocess.run(command, check=False, env=os.environ | threads).returncode


def keep(documents: list[dict[str, Any]]) -> None:
    """Write the JSON file and the page; parts that did not run this time keep their earlier figures."""
    facts = machine()
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{facts.get('gpu', '')} {facts['processor']} {facts['cores']} cores".lower()
    ).strip("-")
    path = HERE / "results" / f"{documents[0]['date']}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    merged = {document["part"]: document for document in [*earlier, *documents]}
    in_order = [merged[part] for part in PARTS if part in merged]
    path.write_text(json.dumps(in_order, indent=1) + "\n")
    DOCS.write_text(page(in_order, path.name))
    print(f"\nwrote {path} and {DOCS}")


def page(documents: list[dict[str, Any]], source: str) -> str:
    """All tables, each under what its benchmark says of itself."""
    facts = documents[0]["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, {documents[0]['date']}. "
        "Ratios compare steps that took turns on a quiet machine.",
        f"`make bench` runs everything and writes this page; the figures are in `benchmarks/results/{source}`.",
        "",
    ]
    told = set()
    for document in documents:
        script = document["benchmark"]
        title, command, *table = markdown(document).splitlines()[0:1] + markdown(document).splitlines()[2:]
        lines += [title.replace(script, document["part"]), ""]
        if script not in told:
            lines += [*about(script), ""]
            told.add(script)
        lines += [f"{command} at {document['commit']}", *table, ""]
    return "\n".join(lines)


def about(script: str) -> list[str]:
    """What the docstring of a benchmark says, without its usage."""
    text = ast.get_docstring(ast.parse((HERE / f"{script}.py").read_text())) or ""
    usage = text.find("\n    python ")
    return text[: usage if usage >= 0 else len(text)].strip().splitlines()


if __name__ == "__main__":
    sys.exit(main())
