"""`llama-jax train`: where arguments may stand, the help of settings, shipped configurations."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from llama_jax.cli import main
from llama_jax.console.parser import UsageError
from llama_jax.train import command
from llama_jax.train.config.help import describe, meanings, overview
from llama_jax.train.config.read import load_config
from llama_jax.train.config.run import AdapterConfig, ModelConfig, RunConfig
from llama_jax.train.metrics import run_log

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(RunConfig)])
def test_every_setting_has_a_meaning(section):
    for name, meaning in meanings(get_type_hints(RunConfig)[section]).items():
        assert len(meaning) > 8, f"{section}.{name} is not explained: {meaning!r}"
        assert not meaning.startswith("as in"), f"{section}.{name}: {meaning}"
        assert f"--{section}.{name}" in describe(section, 80)
    assert f"[{section}]" in overview(80)


def test_help_of_one_setting_and_of_all():
    assert describe("train.steps", 80).startswith("  --train.steps 1000\n      total number of")
    assert describe("--model.head_dim", 80) == "  --model.head_dim\n      H, even. None means D / N."
    assert describe("all", 80) == "\n\n".join(describe(name, 80) for name in get_type_hints(RunConfig))
    assert max(map(len, describe("all", 60).splitlines())) <= 66
    with pytest.raises(UsageError, match=r"'trian'; did you mean train\?"):
        describe("trian", 80)
    with pytest.raises(UsageError, match=r"did you mean train\.steps\?"):
        describe("train.stps", 80)


@pytest.mark.parametrize("arguments", [["--help", "log"], ["x.toml", "--help", "log"], ["-h", "log.every"]])
def test_help_on_the_command_line(arguments, capsys):
    assert main(["train", *arguments]) == 0
    assert "--log.every 10" in capsys.readouterr().out


def test_help_names_every_section_and_flag(capsys):
    assert main(["train", "run.toml", "--help"]) == 0
    shown = capsys.readouterr().out
    for part in ("--show-batch", "--list-configs", "[optimizer]", "warmup_steps", "examples:"):
        assert part in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.toml", "--train.steps", "-3", "--show-batch", "--mesh.fsdp=2"],
        ["--train.steps", "-3", "a.toml", "--mesh.fsdp=2", "--show-batch"],
        ["--show-batch", "--train.steps", "-3", "--mesh.fsdp=2", "a.toml"],
    ],
)
def test_the_configuration_may_stand_anywhere(arguments):
    settings, others = command.split_settings(arguments)
    assert settings == ["--train.steps", "-3", "--mesh.fsdp=2"]
    assert sorted(others) == ["--show-batch", "a.toml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_have_names(path, tmp_path, monkeypatch):
    """As after an installation, where there is no folder `configs`."""
    monkeypatch.chdir(tmp_path)
    for name in (path.stem, path.name, f"configs/{path.name}"):
        found = command.find_config(name)
        assert found.read_bytes() == path.read_bytes()
    load_config(found)


def test_a_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_cpu.toml").write_text("")
    (tmp_path / "tiny_cpu").mkdir()  # a folder is no configuration
    assert command.find_config("tiny_cpu.toml") == Path("tiny_cpu.toml")
    assert command.find_config("tiny_cpu").name == "tiny_cpu.toml"


def test_list_of_configurations(capsys):
    assert main(["train", "--list-configs"]) == 0
    shown = capsys.readouterr().out
    for path in SHIPPED:
        assert f"{path.stem}\n  " in shown


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"type": "lora", "alpha": 4.5, "dora": True}, "lora, rank 8, alpha 4.5, target_modules *, dora"),
        (
            {"type": "bottleneck", "target_modules": ("attention", "feed_forward")},
            "bottleneck, size 64, target_modules attention feed_forward, activation silu",
        ),
        ({"type": "prefix"}, "prefix, length 16"),
    ],
)
def test_an_adapter_is_logged_in_words(settings, shown):
    run = RunConfig(model=ModelConfig(init_from="m"), adapter=AdapterConfig(**settings))
    assert run_log._adapter_settings(run) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_cp"], "tiny_cp: no such file; did you mean tiny_cpu?"),
        (["runs/x.toml"], "runs/x.toml: no such file; give a TOML file, or one of distill_smollm2, "),
        (["."], ".: is a folder; give a TOML file"),
        (["--train.steps", "3"], "missing CONFIG: a TOML file, or distill_smollm2, "),
        (["tiny_cpu", "more"], "unexpected argument 'more'"),
        (["tiny_cpu", "--verbose", "--train.steps", "3"], "unknown setting --verbose"),
        (["--learning_rate", "1e-4", "tiny_cpu"], "did you mean optimizer.learning_rate?"),
        (["tiny_cpu", "--show-bach"], "unknown setting --show-bach; did you mean --show-batch?"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_train_py_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "llama_jax", "train", "--help", "log"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--log.every 10" in done.stdout
