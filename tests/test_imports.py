"""The rooms of the house import one way, and the package is light until something is used."""

import ast
import subprocess
import sys
from pathlib import Path

import moestro

SOURCE = Path(moestro.__file__).parent
# every room and the rooms that it may import
ALLOWED: dict[str, set[str]] = {
    "routing": set(),
    "kernels": set(),
    "parallel": set(),
    "routers": {"routing"},
    "experts": {"routing", "kernels", "parallel"},
    "layers": {"routing", "routers", "experts", "parallel"},
    "balance": {"routing", "routers", "experts", "layers", "parallel"},
    "methods": {"routing", "routers", "experts", "layers", "balance"},
    "data": set(),
    "mixtures": {"routing", "routers", "experts", "layers", "balance"},
}
ALLOWED["models"] = ALLOWED["methods"] | {"methods"}
ALLOWED["export"] = {"routing", "routers", "experts", "layers", "models"}
ALLOWED["hf"] = ALLOWED["models"] | {"models", "data", "kernels"}
ALLOWED["inspect"] = ALLOWED["methods"] | {"methods", "parallel"}
ALLOWED["inference"] = ALLOWED["models"] | {"models", "inspect", "data", "kernels"}
ALLOWED["train"] = ALLOWED["inference"] | {"inference", "parallel", "kernels"}
ALLOWED["study"] = ALLOWED["train"] | {"train"}
ALLOWED["cli"] = ALLOWED["study"] | {"study", "hf", "parallel"}


def imports_of(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("moestro.")}
    return rooms


def test_arrows_never_turn_round() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0]
        if room in ("__init__.py", "__main__.py"):
            continue
        assert room in ALLOWED, f"say in this test what {room} may import"
        wrong += [
            f"{file.relative_to(SOURCE)} imports {other}" for other in imports_of(file) - ALLOWED[room] - {room}
        ]
    assert not wrong


def test_no_pickle_anywhere() -> None:
    banned = ("import pickle", "torch.load(", "torch.save(", "trust_remote_code=True", "yaml.load(")
    found = [f"{file}: {word}" for file in SOURCE.rglob("*.py") for word in banned if word in file.read_text()]
    assert not found


def test_importing_moestro_imports_no_torch() -> None:
    code = "import sys, moestro; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    for name in moestro.__all__:
        assert getattr(moestro, name) is not None
