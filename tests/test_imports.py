"""The one-way import law, read off the source: a file imports its own floor and those below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("errors", "config", "sharding"),
    ("quantization", "rope", "cache", "layer_trees"),
    ("lora",),
    ("linear",),
    ("blockwise", "splash", "bottleneck"),
    ("attention",),
    ("layers",),
    ("model",),
    ("prefix",),
    ("adapters",),
    ("fused_loss", "loss", "rules", "sampling", "arguments"),
    ("decode",),
    ("generation", "beam", "drafts", "speculative", "session"),
    ("tokenizer", "weights", "known", "hub", "chat", "stop_strings"),
    ("text_model",),
    ("pretrained", "bench"),
    ("conversation", "convert", "verify"),
    ("cli",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted((ROOT / "llama_jax").rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; of a package, `from a.b import c` is a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room(module: str) -> str:
    """The first-floor name of a module of llama_jax: `llama_jax.weights.gguf` is in `weights`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rooms_imported_by(path: Path) -> set[str]:
    return {room(module) for module in imported_by(path) if module.split(".")[0] == "llama_jax"}


def home(path: Path) -> str:
    first = path.relative_to(ROOT / "llama_jax").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if home(path) == "__init__":
        return  # the public names, gathered from every floor
    assert home(path) in FLOOR_OF, f"{path} has no floor yet: give it one in FLOORS"
    for name in rooms_imported_by(path):
        assert name in FLOOR_OF, (
            f"{path} imports llama_jax.{name}, which is on no floor: import from its module"
        )
        assert FLOOR_OF[name] <= FLOOR_OF[home(path)], (
            f"{path} imports llama_jax.{name} from a floor above it"
        )


def test_no_two_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(home(path), set()).update(rooms_imported_by(path) - {home(path)})
    del graph["__init__"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")


def test_the_library_never_imports_the_trainer():
    importers = [path for path in FILES if any(name.split(".")[0] == "train" for name in imported_by(path))]
    assert importers == [ROOT / "llama_jax" / "cli" / "train.py"]  # which hands the command over


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"orbax_checkpoint": "orbax", "absl_py": "absl", "tensorboardx": "tensorboardX"}


def declared(requirements):
    names = (re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements)
    return {IMPORTED_AS.get(name.lower(), name) for name in names}


def third_party(files):
    names = {module.split(".")[0] for path in files for module in imported_by(path)}
    return names - sys.stdlib_module_names - {"llama_jax", "train"}


def test_core_dependencies_are_those_imported():
    assert third_party(FILES) == declared(PROJECT["dependencies"])


def test_training_dependencies_are_those_the_trainer_adds():
    extras = PROJECT["optional-dependencies"]
    optional = declared(extras["plot"]) | declared(extras["wandb"])
    added = third_party((ROOT / "train").rglob("*.py")) - declared(PROJECT["dependencies"]) - optional
    assert added == declared(extras["train"])


def test_help_needs_no_jax():
    code = (
        "import sys, llama_jax\n"
        "from llama_jax.cli import main\n"
        "main(['--help']); main(['generate']); main(['generte'])\n"
        "heavy = {'jax', 'numpy', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 2
