"""`verify` against Hugging Face transformers: it agrees on what we write, and finds what is wrong."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import cli
from llama_jax.errors import CheckpointError
from llama_jax.eval.verify import compare
from llama_jax.weights import load_params, open_source
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model
from tests.weights.test_load import assert_same
from tests.weights.writers import CONFIG, hf_tensors, random_params, write_hf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def written(folder: Path, tensors: ParamsTensors | StoredTensors, dtype: str = "float32") -> Path:
    write(plan_hf(tensors, jnp.dtype(dtype), Vocabulary()), tensors, folder / "hf")
    return folder / "hf"


# Every rule of scaling, tied and not; transformers runs no model whose heads do not divide its width.
@pytest.mark.parametrize("seed", [0, 1, 2, 5, 7, 8, 11, 12])
def test_random_models_as_we_write_them(seed: int, tmp_path: Path) -> None:
    config, params = random_model(seed)
    path = written(tmp_path, ParamsTensors(config, params))
    report = compare(path, path, b_backend="transformers")
    assert report.problems == ()
    assert report.b.format == "transformers"
    assert {tensor.verdict for tensor in report.tensors} == {"equal"}
    assert report.outputs is not None
    assert 0 < report.outputs.mean_kl < report.max_kl
    assert [at.layer for at in report.streams] == [None, *range(config.num_hidden_layers)]
    assert report.divergence is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_as_we_write_it(dtype: str, tmp_path: Path, smollm2_path: Path) -> None:
    path = written(tmp_path, StoredTensors(open_source(smollm2_path)), dtype)
    report = compare(smollm2_path, path, b_backend="transformers")
    assert report.problems == ()
    assert report.outputs is not None and report.text is not None
    assert report.text.what == "the built-in text with A's tokenizer"
    assert report.outputs.mean_kl < (1e-9 if dtype == "float32" else 1e-3)
    assert report.divergence is None


def test_computing_in_bfloat16(tmp_path: Path) -> None:
    path = written(tmp_path, ParamsTensors(CONFIG, random_params()))
    report = compare(path, path, b_backend="transformers", dtype="bfloat16", max_kl=1.0)
    assert report.same
    # whose values bfloat16 holds exactly
    assert {tensor.types for tensor in report.tensors} == {("F32", "BF16")}
    assert {tensor.verdict for tensor in report.tensors} == {"equal"}


def test_a_model_that_is_only_nearly_the_same(tmp_path: Path) -> None:
    config, params = random_model(0)
    a = written(tmp_path, ParamsTensors(config, params))
    assert compare(a, a, b_backend="transformers").same
    fields = json.loads((a / "config.json").read_text())
    b = tmp_path / "b"
    b.mkdir()
    (b / "model.safetensors").symlink_to(a / "model.safetensors")
    (b / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 10 * config.rms_norm_eps}))
    report = compare(a, b, b_backend="transformers")
    assert report.problems[0] == "the configurations differ in rms_norm_eps"
    assert report.outputs is not None
    assert report.outputs.mean_kl > report.max_kl
    assert report.divergence is not None and report.divergence.layer == 0


def pickled(folder: Path, state: dict[str, np.ndarray]) -> Path:
    """A directory whose weights torch alone reads."""
    write_hf(folder, CONFIG, random_params())
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_are_read_without_torch(tmp_path: Path) -> None:
    params = random_params()
    folder = pickled(tmp_path / "a", hf_tensors(CONFIG, params))
    assert_same(load_params(open_source(folder)), params)


def test_pickled_weights_that_transformers_runs(tmp_path: Path) -> None:
    params = random_params()
    a, state = write_hf(tmp_path / "a", CONFIG, params), hf_tensors(CONFIG, params)
    assert compare(a, pickled(tmp_path / "b", state), b_backend="transformers").same
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 4] += 1
    report = compare(a, pickled(tmp_path / "c", state), b_backend="transformers")
    assert [tensor.name for tensor in report.tensors if not tensor.same] == [name]
    assert report.divergence is not None and report.divergence.layer == 1


def test_what_transformers_cannot_load(tmp_path: Path, smollm2_path: Path) -> None:
    state = hf_tensors(CONFIG, random_params())
    a = write_hf(tmp_path / "a", CONFIG, random_params())
    with pytest.raises(CheckpointError, match="transformers reads Hugging Face directories"):
        compare(a, smollm2_path, b_backend="transformers")
    del state["model.norm.weight"]
    b = pickled(tmp_path / "b", state)
    with pytest.raises(CheckpointError, match=r"of another shape for transformers: model\.norm\.weight"):
        compare(a, b, b_backend="transformers")
    (b / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        compare(a, b, b_backend="transformers")


def test_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, ParamsTensors(CONFIG, random_params()))
    with redirect_stdout(io.StringIO()) as out:
        status = cli.main(["verify", str(path), "--with", "transformers", "--max-kl", "1e-6"])
    assert status == 0, out.getvalue()
    assert out.getvalue().splitlines()[1] == f"B  {path}  transformers"
