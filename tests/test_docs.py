"""Everything that the documents mention exists: settings and defaults, commands, options, files, fields."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import re
import tomllib
from pathlib import Path
from typing import get_type_hints

import pytest

from llama_jax import cli
from llama_jax.train.config.read import keys, load_config
from llama_jax.train.config.run import RunConfig
from llama_jax.train.data import SourceConfig
from llama_jax.train.loop import Loop

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "docs" / "training.md"
SCRIPTS = sorted((ROOT / "docs").glob("*/*.*"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *SCRIPTS]
SETTINGS = {f"{section}.{key}" for section, entries in keys().items() for key, _ in entries}
SETTINGS |= {f"data.mixture.{field.name}" for field in dataclasses.fields(SourceConfig)}
# File names that look like settings.
FILES = {"tokenizer.model", "tokenizer.json", "tokenizer.bin", "model.safetensors"}

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str = "[a-z]*") -> list[str]:
    """The fenced code blocks of a language, with continued lines joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands(text: str, suffix: str) -> list[str]:
    """Lines of code: in blocks and between backticks; all lines of a script."""
    if suffix != ".md":
        return text.splitlines()
    code = [line for block in blocks(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s#\s.*", "", line) for line in code] + re.findall(r"`([^`\n]+)`", prose)


@every_document
def test_settings_exist(path):
    text = path.read_text()
    given = set(re.findall(r"--((?!section\.)[a-z]+\.[a-z_0-9]+)", text))
    sections = "|".join(keys())
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9]+)`", text)) - FILES
    assert given | named <= SETTINGS, f"{path}: no such settings: {sorted((given | named) - SETTINGS)}"


@every_document
def test_toml_can_be_read(path, tmp_path):
    for i, block in enumerate(blocks(path.read_text(), "toml")):
        file = tmp_path / f"{i}.toml"
        file.write_text(block)
        load_config(file)


@every_document
def test_commands_exist(path):
    for line in commands(path.read_text(), path.suffix):
        for module in re.findall(r"python3? -m ((?!uv\b|venv\b|pip\b)[\w.]+)", line):
            assert importlib.util.find_spec(module), f"{path}: no module {module}: {line}"
        for target in re.findall(r"^make ([a-z]+)", line):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{path}: no `make {target}`"
        for extras in re.findall(r"'(?:\.|llama-jax)\[([a-z,]+)\]'", line):
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert set(extras.split(",")) <= set(known), f"{path}: no such extra: {line}"
        if used := re.search(r"(?:^|bin/|exec )llama-jax ((?:tokenizer |data )?[a-z]+)(.*)", line):
            verb, rest = used[1].split(), used[2]
            if verb[0] == "data":
                rest = re.sub(r"(--runner \S+).*", r"\1", rest)  # Beam's own options follow
            assert verb[0] in cli.SUBCOMMANDS, f"{path}: no command {used[1]!r}: {line}"
            options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![\w.-])", rest))
            if options:
                with contextlib.redirect_stdout(io.StringIO()) as documented:
                    assert cli.main([*verb, "--help"]) == 0
                missing = options - {"--help", *re.findall(r"--[a-z-]+", documented.getvalue())}
                assert not missing, f"{path}: {used[1]} has no {sorted(missing)}: {line}"


@every_document
def test_files_exist(path):
    text = path.read_text()
    named = re.findall(r"(?<![\w./<-])((?:configs|docs|benchmarks|tests|train|llama_jax)/[\w./-]+\w)", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    for name, file in [(n, ROOT / n) for n in named] + [(n, path.parent / n) for n in linked]:
        assert file.exists(), f"{path}: {name} does not exist"


def test_the_table_has_every_setting_and_default():
    defaults = {
        f"{section}.{field.name}": field.default
        for section, kind in get_type_hints(RunConfig).items()
        for field in dataclasses.fields(kind)
    }
    documented = {}
    for row in re.findall(r"^\| (`\w+\.\w+`.*?) \| (.*?) ?\| ", TRAINING.read_text(), re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", row[0])
        values = row[1].split(",") if row[1] else [""] * len(names)
        assert len(names) == len(values), row
        documented.update(zip(names, map(str.strip, values), strict=True))
    assert sorted(documented) == sorted(defaults)
    for name, default in defaults.items():
        if default in (None, "", ()):
            assert documented[name] == "", f"{name} has no default; the table has {documented[name]}"
        elif isinstance(default, (int, float)) and not isinstance(default, bool):
            assert float(documented[name]) == default, (
                f"{name} is {default}; the table has {documented[name]}"
            )
        else:
            expected = ",".join(default) if isinstance(default, tuple) else str(default)
            expected = expected if isinstance(default, str | tuple) else expected.lower()
            assert documented[name] == expected, f"{name} is {default}; the table has {documented[name]}"


def test_metrics_fields_are_documented():
    written = set(re.findall(r'^ +"(\w+)":', inspect.getsource(Loop._log_metrics), re.MULTILINE))
    table = TRAINING.read_text().partition("| field | unit |")[2].partition("\n\n")[0]
    fields = set(re.findall(r"`(\w+)`", table.replace("|---|---|", "")))
    assert fields == written | {"router_aux_loss", "router_z_loss"}  # of a mixture of experts alone
