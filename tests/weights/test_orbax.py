"""Training runs and Orbax checkpoints as models: what was trained is what is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import CheckpointError
from llama_jax.meshes import make_mesh
from llama_jax.sharding import named, param_specs
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights import load_params, manifest, open_source, orbax
from llama_jax.weights.runs import list_steps
from llama_jax.weights.tensors import StoredTensors
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.train.small_runs import MODEL, make_state, one_device, save_run
from tests.train.test_checkpoint import DAMAGE, flip, largest_file
from tests.weights.test_load import one_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"), 1, 2, 3, config=CheckpointConfig(every=1, keep=2, best=1))


@pytest.fixture(scope="module")
def module_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("whole"), 1, 2)


@pytest.fixture
def damaged_run(module_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(module_run, tmp_path / "run")


def trees_equal(left: object, right: object) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))


def trained(step: int) -> dict[str, object]:
    return make_state(one_device(), step).params


def test_newest_step_and_tokenizer_are_loaded(run: Path) -> None:
    model = lj.load(run)
    assert model.config == MODEL and model.path == run
    assert trees_equal(model.params, trained(3))
    assert jax.tree.structure(model.params) == jax.tree.structure(trained(3))
    assert model.tokenizer.vocab_size == MODEL.vocab_size
    assert isinstance(model.generate("a", max_new_tokens=3), str)


def test_loading_one_step(run: Path) -> None:
    step = run / "checkpoints" / "2"
    model = lj.load(step)
    assert trees_equal(model.params, trained(2)) and model.tokenizer.vocab_size == MODEL.vocab_size
    assert open_source(step).metadata["metrics"] == {"eval_loss": 5.0, "tokens": 2000.0}


def test_dtypes_are_cast(run: Path) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        cast = jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(dtype), trained(3))
        assert trees_equal(load_params(open_source(run), dtype=dtype), cast)


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_sharded_and_unstacked_params_are_equal(spec: str, run: Path) -> None:
    mesh = make_mesh(spec)
    params = load_params(open_source(run), mesh=mesh)
    assert trees_equal(params, trained(3))
    for leaf, part in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(param_specs(MODEL), is_leaf=lambda x: isinstance(x, jax.P)),
        strict=True,
    ):
        assert leaf.sharding == named(mesh, part)
    split = load_params(open_source(run), mesh=mesh, scan_layers=False)
    for index, layer in enumerate(split["layers"]):
        expected = jax.tree.map(lambda x, index=index: np.asarray(x)[index], trained(3)["layers"])
        assert trees_equal(layer, expected)


def test_reading_one_tensor(run: Path) -> None:
    source = open_source(run)
    assert np.array_equal(source.read("layers.attention.wq"), trained(3)["layers"]["attention"]["wq"])
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        source.read("x")


def test_progress_counts_every_byte(run: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_params(open_source(run), progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(0, 4 * MODEL.num_params), (4 * MODEL.num_params, 4 * MODEL.num_params)]


def test_params_saved_by_plain_orbax(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    fields = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
    for folder in (tmp_path / "bare", tmp_path / "step" / "params"):
        with ocp.PyTreeCheckpointer() as saver:
            saver.save(folder, trained(1))
        home = tmp_path / folder.relative_to(tmp_path).parts[0]
        with pytest.raises(CheckpointError, match=r"put the model's config\.json there") as caught:
            open_source(home)
        one_line(caught)
        (home / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
        assert trees_equal(load_params(open_source(home)), trained(1))
    assert trees_equal(load_params(open_source(tmp_path / "step" / "params")), trained(1))


@pytest.mark.parametrize("quick", [0, 1 << 17])  # found when arrays are read, or when the run is opened
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_to_the_previous_step(
    kind: str, quick: int, damaged_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK_MAX_BYTES", quick)
    damage, message = DAMAGE[kind]
    path = largest_file(damaged_run / "checkpoints" / "2" / "params")
    damage(path)
    with pytest.warns(UserWarning, match=message) as captured:
        assert trees_equal(lj.load(damaged_run).params, trained(1))
    name = path.parent / "x" if kind == "an unexpected file" else path
    assert len(captured) == 1
    assert str(name) in str(captured[0].message)
    assert str(captured[0].message).endswith(f"; using {damaged_run}/checkpoints/1 instead")
    with pytest.raises(CheckpointError, match=message) as caught:
        lj.load(damaged_run / "checkpoints" / "2")
    assert str(name) in one_line(caught)


def test_conversions_detect_damage(
    damaged_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK_MAX_BYTES", 0)  # found when arrays are read
    flip(largest_file(damaged_run / "checkpoints" / "2" / "params"))
    tensors = StoredTensors(open_source(damaged_run))
    plan = plan_hf(tensors, None, Vocabulary())
    with pytest.warns(UserWarning, match="checkpoints/1 instead"):
        write(plan, tensors, tmp_path / "out")
    assert trees_equal(load_params(open_source(tmp_path / "out")), trained(1))


def test_damage_outside_the_params_is_ignored(damaged_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_QUICK_MAX_BYTES", 0)  # arrays are not hashed when a run is opened
    flip(largest_file(damaged_run / "checkpoints" / "2" / "state"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trees_equal(lj.load(damaged_run).params, trained(2))


def test_command_line_warns_of_damaged_steps(damaged_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = largest_file(damaged_run / "checkpoints" / "2" / "params")
    flip(path)
    assert main(["generate", str(damaged_run), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr().err.splitlines()
    assert captured[0].startswith(f"warning: {path}: damaged") and captured[0].endswith(
        "checkpoints/1 instead"
    )


def test_runs_without_an_intact_step(
    damaged_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK_MAX_BYTES", 0)
    for step in "12":
        flip(largest_file(damaged_run / "checkpoints" / step / "params"))
    with pytest.raises(CheckpointError, match="restore the file from a copy") as caught:
        lj.load(damaged_run)
    assert one_line(caught).count("damaged") == 2
    monkeypatch.undo()
    for step in "12":
        (damaged_run / "checkpoints" / step / "run" / "run.json").unlink()
    assert main(["inspect", str(damaged_run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("run.json: missing") == 2


def test_a_run_without_a_checkpoint_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {tmp_path}: a training run without a checkpoint yet; train it first: llama-jax train\n"
    )


def test_invalid_step_metadata(damaged_run: Path) -> None:
    step = damaged_run / "checkpoints" / "2"
    record = json.loads((step / "run" / "run.json").read_text())
    for changes, message in [
        ({"model": {"hidden_size": 7}}, "invalid model configuration"),
        ({"model": {"colour": "red"}}, "colour"),
        ({"model": record["model"] | {"intermediate_size": 8}}, "wrong shapes: layers.feed_forward.w_gate"),
        ({"model": None}, "not written by the trainer"),
        ({"step": "2"}, "not written by the trainer"),
        ({"time": 1e300}, "not written by the trainer"),
    ]:
        (step / "run" / "run.json").write_text(json.dumps(record | changes))
        manifest.write_manifest(step / "run")
        manifest.write_manifest(step)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_params(open_source(step))
        one_line(caught)


def test_generate_and_inspect_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("a")
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "orbax: a training run; its newest step is 3" in shown
    assert "lowest eval_loss" in shown and "newest 2" in shown and "layers.attention.wq" in shown
    assert main(["inspect", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "orbax" and result["parameters"] == MODEL.num_params
    training = result["training"]
    assert (
        training["step"] == 3 and training["metrics"]["tokens"] == 3000 and training["run"] == {"data": "abc"}
    )
    assert [(step["step"], step["kept"]) for step in training["steps"]] == [
        (2, ["newest 2"]),
        (3, ["newest 2", "lowest eval_loss"]),
    ]
    assert all(step["bytes"] > 0 and step["problem"] is None for step in training["steps"])


def test_inspect_lists_damaged_steps(damaged_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged_run / "checkpoints" / "1" / "run" / "run.json").unlink()
    assert main(["inspect", str(damaged_run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["training"]["steps"]
    assert "run.json: missing" in first["problem"] and second["problem"] is None


def test_orbax_is_imported_lazily_and_silently(run: Path) -> None:
    code = """
import sys
import llama_jax.weights
assert "orbax.checkpoint" not in sys.modules
from llama_jax import cli
sys.exit(cli.main(["inspect", *sys.argv[1:]]))
"""
    inspected = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert inspected.returncode == 0 and inspected.stderr == ""


RACES = {  # a function of orbax.py, during whose first call the run saves a step and deletes the others
    "while the headers are read": "read_step_metadata",
    "while checksums are verified": "manifest.verify",
    "while the arrays are read": "read_verified",
}


@pytest.mark.parametrize("race", RACES)
def test_a_step_that_is_deleted_while_it_is_read_gives_way_to_the_next(
    race: str, module_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(module_run, tmp_path / "run"))
    (run / "checkpoints" / "1").rename(tmp_path / "3")
    owner, name = (manifest, "verify") if "." in RACES[race] else (orbax, RACES[race])
    function = getattr(owner, name)
    calls: list[object] = []

    def racing(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            (tmp_path / "3").rename(run / "checkpoints" / "3")
            shutil.rmtree(run / "checkpoints" / "2")
        return function(*args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no step is damaged
        monkeypatch.setattr(owner, name, racing)
        params = load_params(open_source(run))
    assert len(calls) > 1 and trees_equal(params, trained(1))


def test_steps_are_listed_while_they_are_deleted(
    module_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(module_run, tmp_path / "run"))
    verify = manifest.verify
    monkeypatch.setattr(
        manifest, "verify", lambda folder, **kw: (shutil.rmtree(folder), verify(folder, **kw))
    )
    assert list_steps(run) == []


def test_an_orbax_tree_that_orbax_cannot_read_is_named(damaged_run: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(damaged_run / "checkpoints" / "2" / "params", tmp_path / "tree")
    (tree / "_METADATA").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        orbax.tree_metadata(tree)
    assert str(tree) in one_line(caught) and "NoneType" not in str(caught.value)


def test_what_orbax_gives_up_after_an_error_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: said.append(str(args.exc_value)))

    @types.coroutine
    def wait() -> Iterator[None]:
        yield

    async def read() -> None:
        try:
            await wait()
        finally:
            raise ValueError("the loop is closed")

    def abandon() -> None:
        read().send(None)

    abandon()
    assert said == ["the loop is closed"]
    with warnings.catch_warnings():
        with pytest.raises(CheckpointError), orbax.single_line_errors(Path("tree")):
            raise ValueError
        abandon()
    assert said == ["the loop is closed"]
