"""A training run's directory is a model like any other: what was trained is what is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import CheckpointError
from llama_jax.sharding import make_mesh, named, param_specs
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights import load_params, manifest, open_source
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
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("whole"), 1, 2)


@pytest.fixture
def own_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole_run, tmp_path / "run")


def equal(left: object, right: object) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))


def trained(step: int) -> dict[str, object]:
    return make_state(one_device(), step).params


def test_the_newest_step_is_loaded_with_its_tokenizer(run: Path) -> None:
    model = lj.load(run)
    assert model.config == MODEL and model.path == run
    assert equal(model.params, trained(3))
    assert jax.tree.structure(model.params) == jax.tree.structure(trained(3))
    assert model.tokenizer.vocab_size == MODEL.vocab_size
    assert isinstance(model.generate("a", max_new_tokens=3), str)


def test_a_step_can_be_asked_for(run: Path) -> None:
    step = run / "checkpoints" / "2"
    model = lj.load(step)
    assert equal(model.params, trained(2)) and model.tokenizer.vocab_size == MODEL.vocab_size
    assert open_source(step).metadata["metrics"] == {"eval_loss": 5.0, "tokens": 2000.0}


def test_other_dtypes_are_the_cast_ones(run: Path) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), trained(3))
        assert equal(load_params(open_source(run), dtype=dtype), cast)


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_shards_and_layers_are_those_of_the_whole(spec: str, run: Path) -> None:
    mesh = make_mesh(spec)
    params = load_params(open_source(run), mesh=mesh)
    assert equal(params, trained(3))
    for leaf, part in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(param_specs(MODEL), is_leaf=lambda x: isinstance(x, jax.P)),
        strict=True,
    ):
        assert leaf.sharding == named(mesh, part)
    split = load_params(open_source(run), mesh=mesh, scan_layers=False)
    for index, layer in enumerate(split["layers"]):
        assert equal(layer, jax.tree.map(lambda x, index=index: x[index], trained(3)["layers"]))


def test_one_tensor_can_be_read(run: Path) -> None:
    source = open_source(run)
    assert np.array_equal(source.read("layers.attention.wq"), trained(3)["layers"]["attention"]["wq"])
    with pytest.raises(CheckpointError, match="there is no tensor 'x'"):
        source.read("x")


def test_progress_counts_every_byte(run: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_params(open_source(run), progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(0, 4 * MODEL.num_params), (4 * MODEL.num_params, 4 * MODEL.num_params)]


def test_parameters_saved_by_orbax_alone(tmp_path: Path) -> None:
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
        assert equal(load_params(open_source(home)), trained(1))
    assert equal(load_params(open_source(tmp_path / "step" / "params")), trained(1))


@pytest.mark.parametrize("quick", [0, 1 << 16])  # found when the arrays are read, or when the run is opened
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_step_before_is_loaded(
    kind: str, quick: int, own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK", quick)
    damage, message = DAMAGE[kind]
    path = largest_file(own_run / "checkpoints" / "2" / "params")
    damage(path)
    with pytest.warns(UserWarning, match=message) as said:
        assert equal(lj.load(own_run).params, trained(1))
    name = path.parent / "x" if kind == "an unexpected file" else path
    assert len(said) == 1
    assert str(name) in str(said[0].message)
    assert str(said[0].message).endswith(f"{own_run}/checkpoints/1 is read instead")
    with pytest.raises(CheckpointError, match=message) as caught:
        lj.load(own_run / "checkpoints" / "2")
    assert str(name) in one_line(caught)


def test_damage_is_found_by_conversions_too(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK", 0)  # found when the arrays are read
    flip(largest_file(own_run / "checkpoints" / "2" / "params"))
    tensors = StoredTensors(open_source(own_run))
    plan = plan_hf(tensors, None, Vocabulary())
    with pytest.warns(UserWarning, match="1 is read instead"):
        write(plan, tensors, tmp_path / "out")
    assert equal(load_params(open_source(tmp_path / "out")), trained(1))


def test_damage_that_generation_does_not_read_is_no_matter(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK", 0)  # arrays are larger than what is read when a run is opened
    flip(largest_file(own_run / "checkpoints" / "2" / "state"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(lj.load(own_run).params, trained(2))


def test_the_command_line_says_which_step_it_reads(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = largest_file(own_run / "checkpoints" / "2" / "params")
    flip(path)
    assert main(["generate", str(own_run), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: {path}: damaged") and said[0].endswith(
        "checkpoints/1 is read instead"
    )


def test_runs_in_which_no_step_is_whole(
    own_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_QUICK", 0)
    for step in "12":
        flip(largest_file(own_run / "checkpoints" / step / "params"))
    with pytest.raises(CheckpointError, match="restore the file from a copy") as caught:
        lj.load(own_run)
    assert one_line(caught).count("damaged") == 2
    monkeypatch.undo()
    for step in "12":
        (own_run / "checkpoints" / step / "run" / "run.json").unlink()
    assert main(["inspect", str(own_run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("run.json: missing") == 2


def test_a_run_without_a_checkpoint_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {tmp_path}: a training run without a checkpoint yet; train it first: llama-jax train\n"
    )


def test_records_that_describe_no_model(own_run: Path) -> None:
    step = own_run / "checkpoints" / "2"
    record = json.loads((step / "run" / "run.json").read_text())
    for changes, message in [
        ({"model": {"hidden_size": 7}}, "does not describe a model"),
        ({"model": {"colour": "red"}}, "colour"),
        ({"model": record["model"] | {"intermediate_size": 8}}, "wrong shapes: layers.feed_forward.w_gate"),
        ({"model": None}, "not what the trainer writes"),
        ({"step": "2"}, "not what the trainer writes"),
        ({"time": 1e300}, "not what the trainer writes"),
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
    assert "least held-out loss" in shown and "newest 2" in shown and "layers.attention.wq" in shown
    assert main(["inspect", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "orbax" and result["parameters"] == MODEL.num_params
    training = result["training"]
    assert (
        training["step"] == 3 and training["metrics"]["tokens"] == 3000 and training["run"] == {"data": "abc"}
    )
    assert [(step["step"], step["kept"]) for step in training["steps"]] == [
        (2, ["newest 2"]),
        (3, ["newest 2", "least held-out loss"]),
    ]
    assert all(step["bytes"] > 0 and step["problem"] is None for step in training["steps"])


def test_inspect_lists_damaged_steps(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_run / "checkpoints" / "1" / "run" / "run.json").unlink()
    assert main(["inspect", str(own_run), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["training"]["steps"]
    assert "run.json: missing" in first["problem"] and second["problem"] is None


def test_other_formats_do_not_wait_for_orbax(run: Path) -> None:
    code = "import sys, llama_jax.weights; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    loud = subprocess.run(
        [sys.executable, "-m", "llama_jax.cli", "inspect", str(run)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert loud.returncode == 0 and loud.stderr == ""
