"""Checkpoints: a restored state equals the saved one bit for bit, whatever happened to files or process."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.meshes import make_mesh
from llama_jax.train.checkpoints.checkpoints import Restored
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights.runs import list_steps
from tests.train.processes import finish, wait_for
from tests.train.small_runs import (
    MODEL,
    State,
    abstract_state,
    checkpoints_of,
    host_leaves,
    make_state,
    one_device,
    same,
    save_run,
)

ROOT = Path(__file__).parents[2]


def restore(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Restored:
    with checkpoints_of(folder, warn) as checkpoints:
        restored = checkpoints.restore(abstract_state(one_device()))
    assert restored is not None
    return restored


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def intact_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("whole"), 1, 2)


@pytest.fixture
def two_steps(intact_run: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage."""
    return shutil.copytree(intact_run, tmp_path / "run")


@pytest.mark.parametrize(
    "mesh", ["data=8", "data=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=2,context=4", ""]
)
def test_restore_is_bitwise_exact_on_any_mesh(mesh, tmp_path):
    saved_mesh, restore_mesh = make_mesh("fsdp=4,tensor=2"), make_mesh(mesh) if mesh else one_device()
    state = make_state(saved_mesh)
    with checkpoints_of(tmp_path) as checkpoints:
        checkpoints.save(7, state, {"files": ["ä"], "at": 2**60})
    with checkpoints_of(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract_state(restore_mesh))
    assert (restored.step, restored.data_states) == (7, [{"files": ["ä"], "at": 2**60}])
    assert same(restored.state, state)
    assert all(
        leaf.sharding == expected.sharding
        for leaf, expected in zip(
            jax.tree.leaves((restored.state.params, restored.state.opt_state)),
            jax.tree.leaves((abstract_state(restore_mesh).params, abstract_state(restore_mesh).opt_state)),
            strict=True,
        )
    )


def test_run_metadata_and_metrics_are_restored(tmp_path):
    restored = restore(save_run(tmp_path, 4))
    assert restored.run == {"data": "abc"}
    assert restored.metrics == {"eval_loss": 2.5, "tokens": 4000.0}


def test_save_copies_the_state_when_it_is_called(tmp_path):
    """The next steps donate the state's buffers while it is being written."""

    @jax.jit
    def step(state: State) -> State:
        return state.replace(params=jax.tree.map(lambda x: x * 1.25 + 1, state.params), step=state.step + 1)

    step = jax.jit(step, donate_argnums=0)
    params = {f"w{index}": jnp.full((512, 1024), index, jnp.float32) for index in range(4)}
    state = State(params=params, opt_state=(), step=jnp.int32(0), key=jax.random.key(3))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with checkpoints_of(tmp_path) as checkpoints:
        for number in range(1, 6):
            expected = host_leaves(state)
            checkpoints.save(number, state, {})
            for _ in range(10):
                state = step(state)
            checkpoints.wait()
            found = host_leaves(checkpoints.restore(abstract).state)
            assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_new_run_has_nothing_to_restore(tmp_path):
    with checkpoints_of(tmp_path / "new") as checkpoints:
        assert checkpoints.restore(abstract_state(one_device())) is None
        assert checkpoints.steps() == []
    assert not (tmp_path / "new").exists()


def test_should_save(tmp_path):
    checkpoints = checkpoints_of(tmp_path, every=3)
    assert [step for step in range(1, 10) if checkpoints.should_save(step)] == [3, 6, 9]
    assert not any(checkpoints_of(tmp_path, every=0).should_save(step) for step in range(1, 10))
    often = checkpoints_of(tmp_path, every=0, every_minutes=1e-9)
    assert often.should_save(1)


def test_saving_a_saved_step_again_does_nothing(tmp_path):
    with checkpoints_of(tmp_path, every=1000) as checkpoints:
        checkpoints.save(3, make_state(one_device(), 3), {})
        checkpoints.save(3, make_state(one_device(), 4), {})
    assert same(restore(tmp_path).state, make_state(one_device(), 3))


def test_synchronous_save_is_committed_when_it_returns(tmp_path):
    with checkpoints_of(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, make_state(one_device()), {})
        assert (tmp_path / "checkpoints" / "3" / "checksums.json").is_file()


def test_retention_by_number_by_metric_and_forever(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: 3.0, 6: 3.0, 7: 2.0, 8: 3.0, 9: 4.0}
    with checkpoints_of(tmp_path, keep=2, keep_every=4, best=1) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(one_device(), step), {}, {"eval_loss": loss})
            checkpoints.wait()
            assert {step, max(1, step - 1)} <= set(checkpoints.steps())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4", "8", "9"]
    kept_by = {step.step: step.kept_by for step in list_steps(tmp_path)}
    assert kept_by == {
        2: ["lowest eval_loss"],
        4: ["every 4"],
        8: ["newest 2", "every 4"],
        9: ["newest 2"],
    }


def test_keep_hours_retains_one_step_per_interval(tmp_path, monkeypatch):
    """The first three steps are saved two hours ago, by the clock that is recorded with them."""
    now = time.time_ns
    with (
        monkeypatch.context() as patch,
        checkpoints_of(tmp_path, keep=1, keep_hours=1, best=0) as checkpoints,
    ):
        patch.setattr(time, "time_ns", lambda: now() - 2 * 3600 * 10**9)
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(one_device(), step), {})
        checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    with checkpoints_of(tmp_path, keep=1, keep_hours=1, best=0) as checkpoints:
        for step in (4, 5, 6):
            checkpoints.save(step, make_state(one_device(), step), {})
    assert checkpoints.steps() == [1, 4, 6]


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte": (flip, "damaged"),
    "a truncated file": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes; it was saved with"),
    "a missing file": (Path.unlink, "missing"),
    "an unexpected file": (lambda path: (path.parent / "x").touch(), "was not there when"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("item", ["params", "state"])
def test_damaged_step_is_reported_and_the_previous_one_restored(kind, item, two_steps):
    damage, message = DAMAGE[kind]
    path = largest_file(two_steps / "checkpoints" / "2" / item)
    damage(path)
    warnings: list[str] = []
    restored = restore(two_steps, warnings.append)
    assert restored.step == 1 and same(restored.state, make_state(one_device(), 1))
    name = path.parent / "x" if kind == "an unexpected file" else path
    assert warnings[0].startswith("skipping the checkpoint of step 2: ")
    assert str(name) in warnings[0] and message in warnings[0]
    assert warnings[1] == "resuming from step 1, the newest intact checkpoint"
    assert (two_steps / "checkpoints" / "2").is_dir()


def test_damaged_step_is_renamed_when_its_step_is_saved_again(two_steps):
    folder = two_steps / "checkpoints"
    for again in ("2.damaged", "2.damaged-2"):
        flip(largest_file(folder / "2"))
        before = largest_file(folder / "2").read_bytes()
        warnings: list[str] = []
        with checkpoints_of(two_steps, warnings.append) as checkpoints:
            assert checkpoints.restore(abstract_state(one_device())).step == 1
            assert (folder / "2").is_dir()
            checkpoints.save(2, make_state(one_device(), 22), {})
        assert same(restore(two_steps).state, make_state(one_device(), 22))
        assert largest_file(folder / again).read_bytes() == before
        assert str(folder / again) in warnings[-1]


def test_if_every_step_is_damaged_nothing_is_restored_or_deleted(two_steps):
    paths = [largest_file(two_steps / "checkpoints" / step) for step in "12"]
    for path in paths:
        flip(path)
    before = sorted((two_steps / "checkpoints").rglob("*"))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
        restore(two_steps)
    assert all(str(path) in one_line(caught) for path in paths)
    assert sorted((two_steps / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ({"config": MODEL.replace(intermediate_size=32)}, ["feed_forward.w_gate", "24]", "32]", "float32"]),
        ({"config": MODEL.replace(num_hidden_layers=3)}, ["layers.attention.wq", "[2, ", "[3, "]),
        ({"config": MODEL.replace(tie_word_embeddings=False)}, ["only this run has lm_head.kernel"]),
        (
            {"optimizer": optax.sgd(0.1, momentum=0.9)},
            ["only this run has opt_state.0.trace", "opt_state.1"],
        ),
    ],
)
def test_checkpoint_of_another_model_or_optimizer_is_an_error(kind, parts, two_steps):
    with checkpoints_of(two_steps) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract_state(one_device(), **kind))
    assert all(part in one_line(caught) for part in [*parts, "of another model or optimizer"])


def test_another_dtype_is_an_error_instead_of_cast(two_steps):
    abstract = abstract_state(one_device())
    half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), abstract.params)
    with checkpoints_of(two_steps) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract.replace(params=half))
    assert "float32" in one_line(caught) and "bfloat16" in one_line(caught)


def test_files_of_a_killed_save_are_removed(tmp_path):
    save_run(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-unsealed", "deleted/0"):
        shutil.copytree(folder / "1", folder / name)
    with checkpoints_of(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract_state(one_device())).step == 1
        checkpoints.save(4, make_state(one_device()), {})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "4"]


def test_failed_save_is_one_error_and_keeps_earlier_steps(tmp_path, capfd):
    save_run(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as caught, checkpoints_of(tmp_path) as checkpoints:  # noqa: PT012
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            checkpoints.save(2, make_state(one_device()), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = one_line(caught)
    assert message.startswith(
        f"checkpoint of step 2 could not be written to {tmp_path}/checkpoints: File too"
    )
    assert "the newest is of step 1" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert same(restore(tmp_path).state, make_state(one_device(), 1))
    assert capfd.readouterr().err == ""
    with checkpoints_of(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(one_device(), 2), {})
    assert restore(tmp_path).step == 2


def test_failed_background_save_raises_at_the_next_step(tmp_path):
    checkpoints = checkpoints_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        checkpoints.save(1, make_state(one_device()), {})
        with pytest.raises(CheckpointError, match="step 1 could not be written"):  # noqa: PT012
            for _ in range(1000):
                checkpoints.should_save(2)
                time.sleep(0.02)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()


def test_full_disk_is_a_one_line_error_and_keeps_earlier_steps(tmp_path, fork_server):
    """On a real file system of 1 MB, in its own mount namespace."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a user mount a small file system")
    function = "tests.train.saving_processes:fill_a_small_disk"
    done = finish(fork_server.start(function, [tmp_path], devices=1, cwd=ROOT))
    assert (done.status, done.err) == (0, "")
    error, restored = done.out.splitlines()
    assert "No space left on device; the earlier checkpoints are intact" in error
    step, whole = restored.split()
    assert int(step) >= 1 and whole == "True" and f"newest is of step {step};" in error


@pytest.mark.slow
def test_killed_run_resumes_from_the_newest_committed_step(tmp_path, fork_server):
    """kill -9 at random times, mostly during a save, since this run does nothing else."""
    rng = random.Random(0)
    newest = 0
    for _ in range(3):
        function = "tests.train.saving_processes:save_until_killed"
        process = fork_server.start(function, [tmp_path], devices=1, cwd=ROOT)
        # The third save starts when the second is committed.
        wait_for(lambda process=process: process.out.read_text().count("\n") >= 3, process)
        time.sleep(rng.random() / 10)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        warnings: list[str] = []
        restored = restore(tmp_path, warnings.append)
        assert restored.step >= int(process.out.read_text().split()[-1]) - 1 > newest and not warnings
        assert same(restored.state, make_state(one_device(), restored.step))
        assert restored.data_states == [{"batch": restored.step}]
        newest = restored.step


@pytest.mark.slow
def test_one_process_restores_what_two_saved(tmp_path, fork_server):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    function = "tests.train.saving_processes:save_as_one_of_two"
    both = [
        fork_server.start(function, [tmp_path, address, index], devices=2, cwd=ROOT) for index in range(2)
    ]
    for process in both:
        done = finish(process)
        assert done.status == 0, done.err
    restored = restore(tmp_path)
    assert restored.step == 3 and same(restored.state, make_state(one_device(), 3))
    assert restored.data_states == [{"process": 0}, {"process": 1}]
    shares = sorted(path.name for path in tmp_path.glob("checkpoints/3/params/ocdbt.process_*"))
    assert shares == ["ocdbt.process_0", "ocdbt.process_1"]


def test_directory_layout(tmp_path):
    step = save_run(tmp_path, 5) / "checkpoints" / "5"
    items = ["data", "metrics", "params", "run", "state"]
    assert sorted(path.name for path in step.iterdir() if path.is_dir()) == items
    record = json.loads((step / "run" / "run.json").read_text())
    assert record["step"] == 5 and record["model"]["hidden_size"] == MODEL.hidden_size
    assert record["keep"]["keep"] == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("every", -1), ("every", 1.5), ("keep", 0), ("keep_every", True), ("best", -1)),
        *(("every_minutes", -1.0), ("keep_hours", float("inf")), ("asynchronous", "yes")),
    ],
)
def test_invalid_settings_are_named(field, value):
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**{field: value})
    assert one_line(caught).startswith(f"checkpoint.{field} is {value!r}; it must be ")
