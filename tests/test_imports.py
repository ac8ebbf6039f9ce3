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

import llama_jax as lj

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llama_jax"


def rooms() -> list[str]:
    """The rooms of `llama_jax`, in the order of the README's tree, which is the order of imports."""
    tree = re.search(
        r"^```\nllama_jax/(.*?)^train/", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert tree, "README.md has no tree of llama_jax"
    return re.findall(r"^  (\w+)(?:\.py|/)", tree[1], re.MULTILINE)


ORDER = {name: place for place, name in enumerate(rooms())}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "train"))
TRAINER = sorted((ROOT / "train").rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; of a package, `from a.b import c` is a.b.c."""
    found = set()
    folder = path.parent
    package = [*(["llama_jax"] if ROOT / "train" in path.parents else []), *folder.relative_to(ROOT).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms that a file imports from: `llama_jax.weights.gguf` is in `weights`."""
    modules = (module.split(".") for module in imported_by(path))
    return {module[1] for module in modules if module[0] == "llama_jax" and len(module) > 1}


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_tree_names_every_room():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert set(ORDER) == there - {"__init__", "__main__", "__pycache__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if home(path) in ("__init__", "__main__"):
        return  # the public names, gathered from every room, and the command
    for name in rooms_imported_by(path) - {home(path)}:
        assert name in ORDER, f"{path} imports llama_jax.{name}: import from the module that defines it"
        assert ORDER[name] < ORDER[home(path)], f"{path} imports llama_jax.{name}, which comes after it"


def test_no_two_files_import_each_other():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    modules |= {
        f"llama_jax.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path for path in TRAINER
    }
    graph = {}
    for name, path in modules.items():
        prefixes = {".".join(m.split(".")[:n]) for m in imported_by(path) for n in (-1, len(m.split(".")))}
        graph[name] = {m for m in prefixes if m in modules} - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")


def test_the_library_reaches_the_trainer_from_three_verbs_alone():
    importers = [path for path in FILES if "train" in rooms_imported_by(path)]
    verbs = ("data", "plan", "plan_search", "train")
    assert importers == [PACKAGE / "cli" / f"{verb}.py" for verb in verbs]


def test_the_trainer_can_be_forked():
    """A copy of the folder under another name is a trainer too: it names itself by relative imports alone."""
    for path in TRAINER:
        assert not re.search(r"^\s*(from|import) (llama_jax\.)?train\b", path.read_text(), re.MULTILINE), path
        assert "cli" not in rooms_imported_by(path), f"{path} imports the command line"


def test_nothing_imports_the_trainer_by_its_folder():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        names = {module.split(".")[0] for module in imported_by(path)}
        assert "train" not in names, f"{path}: the trainer is llama_jax.train"


def test_no_file_is_long():
    for path in [*FILES, *TRAINER]:
        assert len(path.read_text().splitlines()) <= 400, f"{path} is over 400 lines: give a part a file"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"orbax_checkpoint": "orbax", "absl_py": "absl", "tensorboardx": "tensorboardX"}


def declared(requirements):
    names = (re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements)
    return {IMPORTED_AS.get(name.lower(), name) for name in names}


def third_party(files):
    names = {module.split(".")[0] for path in files for module in imported_by(path)}
    return names - sys.stdlib_module_names - {"llama_jax"}


def test_core_dependencies_are_those_imported():
    needed_by_jax = {"flatbuffers"}  # by `jax.export`
    extras = PROJECT["optional-dependencies"]
    # `llama-jax eval` and `serve`
    optional = declared(extras["eval"]) | declared(extras["plot"]) | declared(extras["serve"])
    assert third_party(FILES) - optional | needed_by_jax == declared(PROJECT["dependencies"])
    assert optional <= third_party(FILES)


def test_training_dependencies_are_those_the_trainer_adds():
    extras = PROJECT["optional-dependencies"]
    optional = declared(extras["plot"]) | declared(extras["wandb"]) | declared(extras["beam"])
    added = third_party(TRAINER) - declared(PROJECT["dependencies"]) - optional
    assert added == declared(extras["train"])


def test_dir_lists_the_rooms_and_the_public_names():
    assert {*lj.__all__, "adapters", "train", "weights", "__version__"} <= set(dir(lj))
    assert all(hasattr(lj, name) for name in dir(lj))


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
