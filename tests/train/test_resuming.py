"""What a run records of its start: what may change when it is resumed, and where its files are found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.train import provenance as provenance_module
from llama_jax.train.config.run import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from llama_jax.train.metrics.run_log import log_best_step
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.provenance import (
    check_agreement,
    check_data,
    check_model,
    check_settings,
    place_of,
    provenance,
    read_started,
    with_places,
)
from llama_jax.train.state import TrainState, with_ema
from llama_jax.train.trainable import TrainableSpec
from llama_jax.weights.runs import StepMetadata
from tests import tiny
from tests.train.small_runs import (
    MODEL,
    State,
    abstract_state,
    checkpoints_of,
    make_state,
    one_device,
    save_run,
)


def started_with(
    run: RunConfig, run_dir: Path, started: StepMetadata | None = None, **more: Any
) -> StepMetadata:
    """The record of a run, as a checkpoint stores it."""
    spec = TrainableSpec(adapter=run.adapter.settings)
    record = provenance(
        run,
        run_dir,
        started,
        **{"data": "d", "model": tiny.CONFIG, "base": "b"} | more,
        spec=spec,
        base_model=run.model.init_from,
    )
    record = json.loads(json.dumps(record))
    return StepMetadata(1, tiny.CONFIG, {}, {}, record, None)  # type: ignore[arg-type]


LORA = RunConfig(model=ModelConfig(init_from="base"), adapter=AdapterConfig(type="lora"))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "seed", 7, "7 and the run in R was started with 0: set it to that"),
        ("train", "global_batch_size", 16, "16 and the run in R was started with 8"),
        ("train", "objective", "sft", '"sft" and the run in R was started with "pretrain"'),
        ("adapter", "rank", 4, "4 and the run in R was started with 8"),
        ("adapter", "target_modules", ("wq",), '["wq"] and the run in R was started with ["*"]'),
        ("optimizer", "name", "lion", '"lion" and the run in R was started with "adamw"'),
    ],
)
def test_a_setting_that_a_run_keeps_is_named_with_both_values(section, key, value, message):
    changed = dataclasses.replace(getattr(LORA, section), **{key: value})
    run, started = dataclasses.replace(LORA, **{section: changed}), started_with(LORA, Path("R"))
    check_settings(LORA, Path("R"), started)
    with pytest.raises(ConfigError) as caught:
        check_settings(run, Path("R"), started)
    assert str(caught.value).startswith(f"{section}.{key} is {message}")


def test_what_may_change_is_not_compared(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1.0, freeze=("embed.*",), ema_decay=0.9, layer_decay=0.5)
    changed = dataclasses.replace(LORA, optimizer=optimizer, train=TrainConfig(steps=7, dtype="float32"))
    check_settings(changed, tmp_path, started_with(LORA, tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", ("a", "b"), 'data.labels is ["a", "b"] and the run in R was started with []'),
        ("vocab_size", 512, "model.vocab_size is 512 and the run in R was started with 288"),
        ("rope_theta", 5e5, "the rope_theta of model.init_from is 500000.0 and the run in R was"),
    ],
)
def test_a_model_of_another_configuration_is_named_by_its_setting(field, value, message):
    model = tiny.CONFIG.replace(**{field: value})
    with pytest.raises(ConfigError) as caught:
        check_model(LORA, model, Path("R"), started_with(LORA, Path("R")))
    assert message in str(caught.value)
    check_model(LORA, tiny.CONFIG, Path("R"), started_with(LORA, Path("R")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shuffle": False}, "data.shuffle is false, and was true"),
        ({"validation_fraction": 0.5}, "data.validation_fraction is 0.5, and was 0.01"),
        ({"template": "chatml", "too_long": "truncate"}, 'template is "chatml", and was ""; data.too_long'),
        ({}, "(the files of 'x' or the tokenizer have changed); restore it"),
    ],
)
def test_other_batches_are_named_by_the_settings_or_the_files(changes, message):
    run = dataclasses.replace(LORA, data=DataConfig(files="x"))
    changed = dataclasses.replace(run, data=DataConfig(files="x", **changes))
    current = started_with(changed, Path("R"), data="other").run
    with pytest.raises((ConfigError, DataError)) as refused:
        check_data(changed, current, Path("R"), started_with(run, Path("R")), "other".__eq__)
    assert message in str(refused.value) and ("have changed" in str(refused.value)) == (not changes)
    other = started_with(run, Path("R"), base="c").run
    with pytest.raises(ConfigError, match="other weights than those that the adapter in R was started on"):
        check_data(run, other, Path("R"), started_with(run, Path("R")), "d".__eq__)
    check_data(run, current | {"data": "d"}, Path("R"), started_with(run, Path("R")), "d".__eq__)


def test_the_base_and_the_tokenizer_are_found_where_they_were_and_beside_the_run(tmp_path, monkeypatch):
    project = tmp_path / "project"
    for name in ("runs/base", "runs/lora"):
        (project / name).mkdir(parents=True)
    (project / "t.model").write_text("")
    monkeypatch.chdir(project)
    run = RunConfig(
        model=ModelConfig(init_from="runs/base"),
        tokenizer=TokenizerConfig(path="t.model"),
        adapter=AdapterConfig(type="lora"),
    )
    started = started_with(run, Path("runs/lora"))
    assert with_places(run, Path("runs/lora"), started) == run
    monkeypatch.chdir("/")
    started = started_with(run, project / "runs" / "lora", started)  # once more, from another directory
    found = with_places(run, project / "runs" / "lora", started)
    assert found.model.init_from == str(project / "runs" / "base")
    assert found.tokenizer.path == str(project / "t.model")
    moved = project.rename(tmp_path / "moved") / "runs" / "lora"
    found = with_places(run, moved, started)
    assert Path(found.model.init_from).resolve() == moved.parent / "base"
    (moved.parent / "base").rmdir()
    for record in (started, started_with(run, moved, started)):
        assert place_of(run, moved, record, "model.init_from") is None
    with pytest.raises(ConfigError, match=r"init_from 'runs/base': the weights .* new place with --model"):
        with_places(run, moved, started)
    whole = dataclasses.replace(run, adapter=AdapterConfig())  # trains all weights: reads them no more
    assert with_places(whole, moved, started_with(whole, moved)).model.init_from == "runs/base"
    given = dataclasses.replace(run, model=ModelConfig(init_from="/elsewhere"))  # another than at the start
    assert with_places(given, moved, started).model.init_from == "/elsewhere"
    named = dataclasses.replace(run, model=ModelConfig(init_from="smollm2-135m"))
    assert place_of(named, moved, started_with(named, moved), "model.init_from") == "smollm2-135m"


def test_settings_of_a_run_by_an_earlier_version_come_from_its_configuration(tmp_path):
    assert read_started(tmp_path) is None
    save_run(tmp_path, 1)
    assert read_started(tmp_path).run == {"data": "abc"}
    (tmp_path / "config.toml").write_text('[data]\nfiles = "x"\n[train]\nseed = 5\n')
    assert read_started(tmp_path).run["settings"]["train.seed"] == 5


def test_processes_with_other_settings_are_refused_naming_both(monkeypatch):
    mine = RunConfig(data=DataConfig(files="/here/x"))
    check_agreement(mine)

    def gather(other: RunConfig) -> None:
        """Makes a second process that was started with `other`."""

        def gather_bytes(text: bytes) -> list[bytes]:
            sent = []
            monkeypatch.setattr(provenance_module, "gather_bytes", lambda text: [sent.append(text) or text])
            check_agreement(other)
            return [text, *sent]

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(provenance_module, "gather_bytes", gather_bytes)

    gather(dataclasses.replace(mine, data=DataConfig(files="/there/x")))  # each has its own copy of the data
    check_agreement(mine)
    gather(dataclasses.replace(mine, train=TrainConfig(seed=7)))
    with pytest.raises(ConfigError, match=r"train.seed is 7 in process 1 and 0 in process 0"):
        check_agreement(mine)


def test_an_average_begins_at_the_present_weights_and_ends_at_those_of_the_optimizer():
    leaf = jnp.arange(3.0)
    state = TrainState(params={"w": leaf}, opt_state=(), step=1, key=0, skipped=0, bad_run=0)
    begun = with_ema(state, True)
    np.testing.assert_array_equal(begun.moved["w"], leaf)
    assert begun.moved["w"] is not leaf  # both are donated
    assert with_ema(begun, True) is begun and with_ema(state, False) is state
    ended = with_ema(dataclasses.replace(begun, params={"w": leaf + 1}), False)
    np.testing.assert_array_equal(ended.params["w"], leaf)
    assert ended.moved is None


def test_moments_of_parameters_that_are_frozen_no_longer_are_zero(tmp_path):
    """And those of newly frozen ones are left out."""

    def optimizer(*freeze: str) -> Any:
        config = OptimizerConfig(freeze=freeze)
        return make_optimizer(config, make_schedule(config, 10))

    def abstract(*freeze: str) -> State:
        whole = abstract_state(one_device())
        sharding = whole.step.sharding
        shapes = jax.eval_shape(optimizer(*freeze).init, whole.params)
        add = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        return whole.replace(opt_state=jax.tree.map(add, shapes))

    state = make_state(one_device())
    fill = lambda x: jnp.full(x.shape, 2, x.dtype)  # noqa: E731
    with checkpoints_of(tmp_path) as checkpoints:
        checkpoints.save(1, state.replace(opt_state=jax.tree.map(fill, abstract("embed.*").opt_state)), {})
    with checkpoints_of(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="only this run has opt_state"):
            checkpoints.restore(abstract("*norm*"))
        restored = checkpoints.restore(abstract("*norm*"), lambda name: name.startswith("opt_state."))
    moments = restored.state.opt_state[0]
    assert int(moments.count) == 2
    np.testing.assert_array_equal(moments.mu["embed"]["embedding"], np.zeros((MODEL.vocab_size, 16)))
    assert (np.asarray(moments.nu["layers"]["attention"]["wq"]) == 2).all()
    assert not jax.tree.leaves(moments.mu["final_norm"])


def test_the_best_kept_step_is_named(tmp_path):
    lines: list[str] = []
    log_best_step(save_run(tmp_path / "falling", 1, 2), lines.append)  # eval_loss is 10 / step
    assert not lines
    run = save_run(tmp_path / "rising", 2, 3)
    (run / "checkpoints" / "3").rename(run / "checkpoints" / "1")
    log_best_step(run, lines.append)
    assert lines == [
        "the lowest eval_loss of a kept checkpoint, 3.3333, is that of step 1: "
        f"{run}/checkpoints/1 is that model, {run} the last one"
    ]
