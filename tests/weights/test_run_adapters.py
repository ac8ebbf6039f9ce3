"""Adapters in the checkpoints of training runs: any step is the model that its adapter exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.errors import CheckpointError, InputError
from llama_jax.eval.verify import compare
from llama_jax.hub import huggingface
from llama_jax.text.convert import convert
from llama_jax.text.pretrained import open_model
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights.adapters import base_of_adapter, load_adapter
from llama_jax.weights.derived import Head
from llama_jax.weights.run_adapters import portable_path, step_fields
from llama_jax.weights.write.adapters import save_adapter
from tests import tiny
from tests.train.small_runs import State
from tests.train.test_checkpoint import flip, largest_file

LABELS = ("good", "bad", "ugly")
SETTINGS: dict[str, adapters.Settings] = {
    "lora": Lora(rank=4, alpha=6),
    "dora": Lora(rank=2, target_modules=("wq", "w_down"), dora=True),
    "rslora with a head": Lora(rank=4, rslora=True),
    "bottleneck": Bottleneck(size=4, target_modules=("attention",)),
    "prefix": Prefix(length=3),
    "prefix with a head": Prefix(length=2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("base"))


def random_adapter(settings: adapters.Settings, seed: int) -> Any:
    """An adapter whose every leaf is random."""
    rng = np.random.default_rng(seed)

    def shapes() -> Any:
        params = lj.init(tiny.CONFIG, jax.random.key(0))
        return adapters.init(settings, tiny.CONFIG, params, jax.random.key(1))

    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(shapes))


def head_of(name: str, seed: int) -> Head | None:
    weight = np.random.default_rng(seed).normal(size=(len(LABELS), tiny.CONFIG.hidden_size))
    return Head(weight.astype(np.float32), LABELS) if "head" in name else None


def save_steps(run: Path, name: str, base_model: str, *steps: int) -> Path:
    """A run with a step for each seed, as the trainer writes them."""
    settings = SETTINGS[name]
    config = tiny.CONFIG.replace(labels=LABELS) if "head" in name else tiny.CONFIG
    fields = step_fields(settings, base_model, run)
    with Checkpoints(run, CheckpointConfig(keep=9), model=config, run=fields) as checkpoints:
        for step in steps:
            params = dict(random_adapter(settings, step))
            if (head := head_of(name, step)) is not None:
                params["score"] = {"kernel": head.weight.T}
            state = State(
                params=jax.tree.map(jnp.asarray, params),
                opt_state=(),
                step=jnp.int32(step),
                key=jax.random.key(0),
            )
            checkpoints.save(step, state, {}, {"eval_loss": float(step)})
    return run


def export(folder: Path, name: str, seed: int, **more: Any) -> Path:
    head, adapter = head_of(name, seed), random_adapter(SETTINGS[name], seed)
    return save_adapter(folder, SETTINGS[name], adapter, tiny.CONFIG, head=head, **more)


def assert_equal(found: Any, expected: Any) -> None:
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_the_model_that_its_adapter_exports(name, base, tmp_path):
    run = save_steps(tmp_path / "run", name, str(base), 1, 2)
    expected = [lj.load(base, adapter=export(tmp_path / f"exported{step}", name, step)) for step in (1, 2)]
    first, newest = lj.load(run / "checkpoints" / "1"), lj.load(run)  # of an interrupted run the newest
    assert_equal(first, expected[0])
    assert_equal(newest, expected[1])
    assert first.tokenizer.vocab_size == tiny.CONFIG.vocab_size
    settings, _ = load_adapter(run / "checkpoints" / "1")
    assert settings == SETTINGS[name]
    assert_equal(lj.load(base, adapter=run / "checkpoints" / "1"), expected[0])
    step, out = run / "checkpoints" / "1", tmp_path / "out"
    if name.startswith("prefix") or name == "bottleneck":
        with pytest.raises(InputError, match="cannot be merged into weights"):
            convert(step, out)
    else:
        jax.tree.map(np.testing.assert_array_equal, lj.load(convert(step, out)).params, expected[0].params)
        assert compare(step, out, outputs=False).same


def test_a_step_newer_than_the_exported_adapter_is_preferred(base, tmp_path):
    run = save_steps(tmp_path / "run", "lora", str(base), 1, 2)
    expected = lj.load(base, adapter=run / "checkpoints" / "2")
    for step, is_newest in ((2, True), (1, False), (None, True)):  # None: by an earlier version
        origin = None if step is None else {"step": step, "base_model": None}
        export(run / "adapter", "lora", 7, base_model=str(base), replace=True, origin=origin)
        found = load_adapter(run)[1]["layers"]["attention"]["wq"]["a"]
        seed = 7 if is_newest else 2
        np.testing.assert_array_equal(
            found, random_adapter(SETTINGS["lora"], seed)["layers"]["attention"]["wq"]["a"]
        )
    export(run / "adapter", "lora", 7, base_model=str(base), replace=True, origin={"step": 1})
    assert_equal(lj.load(run), expected)


def test_a_damaged_step_is_passed_over(base, tmp_path):
    run = save_steps(tmp_path / "run", "lora", str(base), 1, 2)
    flip(largest_file(run / "checkpoints" / "2" / "params"))
    assert_equal(lj.load(run), lj.load(base, adapter=run / "checkpoints" / "1"))
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        lj.load(run / "checkpoints" / "2")


@pytest.mark.parametrize("settings", [{"type": "lora", "rank": -1}, {"type": "?"}, {"rank": 2}, 7])
def test_settings_that_are_none_are_an_error(settings, base, tmp_path):
    run = save_steps(tmp_path / "run", "lora", str(base), 1)
    with Checkpoints(
        run,
        CheckpointConfig(keep=9),
        model=tiny.CONFIG,
        run={"adapter": settings, "base_model": [str(base), None]},
    ) as checkpoints:
        params = jax.tree.map(jnp.asarray, dict(random_adapter(SETTINGS["lora"], 3)))
        state = State(params=params, opt_state=(), step=jnp.int32(3), key=jax.random.key(0))
        checkpoints.save(3, state, {})
    with pytest.raises(CheckpointError, match="not the settings of an adapter"):
        lj.load(run)


@pytest.fixture
def no_hub(monkeypatch) -> None:
    monkeypatch.setattr(huggingface, "fetch", lambda name: pytest.fail(f"asks the Hub for {name}"))


@pytest.mark.usefixtures("no_hub")
def test_the_base_is_found_from_anywhere_and_beside_a_moved_run(base, tmp_path, monkeypatch):
    """A relative path such as runs/base is no repository of the Hub."""
    project = tmp_path / "project"
    shutil.copytree(base.parent, project / "runs" / "base")
    monkeypatch.chdir(project)
    run = save_steps(Path("runs/lora"), "lora", "runs/base", 1).absolute()
    monkeypatch.chdir("/")
    assert base_of_adapter(run) == str(project / "runs" / "base")
    moved = project.rename(tmp_path / "elsewhere") / "runs" / "lora"
    in_place = open_model(moved).source.path
    assert in_place.resolve().parent == tmp_path / "elsewhere" / "runs" / "base"
    # Exported, by this version and by an earlier one.
    path, relative = "/nowhere/base", "../base"
    export(moved / "adapter", "lora", 1, base_model=path, origin={"step": 1, "base_model": relative})
    assert open_model(moved).source.path.resolve() == in_place.resolve()
    export(moved / "adapter", "lora", 1, base_model="runs/base", replace=True)
    assert open_model(moved).source.path.resolve() == in_place.resolve()
    shutil.rmtree(moved.parent / "base")
    export(moved / "adapter", "lora", 1, base_model=path, replace=True)
    for place in (moved, moved / "checkpoints" / "1"):
        with pytest.raises(CheckpointError, match=r"its adapter was trained on is not there: /.*--adapter"):
            lj.load(place)
        lj.load(base, adapter=place)  # the way out


def test_names_stay_names_and_paths_become_absolute(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert portable_path("tiny.bin", base.parent / "run") == (str(base), "../tiny.bin")
    for name in ("smollm2-135m", "owner/name", "owner/name@main:file.gguf", "x" * 5000):
        assert portable_path(name, tmp_path) == (name, None)


def test_what_a_step_says_is_json(base, tmp_path):
    for settings in SETTINGS.values():
        fields = step_fields(settings, str(base), tmp_path)
        assert json.loads(json.dumps(fields))["base_model"][0] == str(base)
