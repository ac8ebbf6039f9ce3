"""torch itself: what it saves in Meta's parts is read as the same tensors, and it loads what is written."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params
from llama_jax.weights.meta import open_meta
from llama_jax.weights.tensors import ParamsTensors
from llama_jax.weights.torch_zip import read_array, read_torch_zip
from llama_jax.weights.write import run
from llama_jax.weights.write.meta import plan_meta
from llama_jax.weights.write.torch_zip import Layout, TensorSpec
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.golden import meta
from tests.weights.test_load import assert_same
from tests.weights.writers import random_params

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity

CONFIGS = {
    "K = N": LlamaConfig(48, 64, 88, 3, 8),
    "K < N": LlamaConfig(48, 64, 88, 3, 16, 8),
}
DTYPES = ("float32", "bfloat16", "float16")
LOADS: dict[str, dict[str, Any]] = {
    "plain": {"weights_only": False},
    "weights only": {"weights_only": True},
    "mapped": {"weights_only": True, "mmap": True},
}


def to_torch(array: np.ndarray, dtype: str) -> Any:
    return torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, dtype))


def assert_equal(ours: np.ndarray, theirs: Any) -> None:
    """Bit by bit."""
    assert ours.shape == tuple(theirs.shape) and ours.dtype.name == str(theirs.dtype).removeprefix("torch.")
    flat = theirs.detach().reshape(-1).contiguous()
    np.testing.assert_array_equal(ours.reshape(-1).view(np.uint8), flat.view(torch.uint8).numpy())


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_torch_saves_is_read(name: str, dtype: str, parts: int, tmp_path: Path) -> None:
    config = CONFIGS[name]
    params = random_params(config)
    for number, part in enumerate(meta.split(config, params, parts, llama3=parts == 2)):
        tensors = {key: to_torch(array, dtype) for key, array in part.items()}
        torch.save(tensors, tmp_path / f"consolidated.{number:02}.pth")
    sizes = {"dim": 64, "n_layers": 3, "n_heads": config.num_attention_heads, "norm_eps": 1e-5}
    fields = sizes | {"n_kv_heads": config.num_key_value_heads, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(fields))
    source = open_meta(tmp_path, "test")
    assert source.config == config
    assert_same(load_params(source), params)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_what_is_written(dtype: str, parts: int, how: str, tmp_path: Path) -> None:
    config = CONFIGS["K < N"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), random_params(config))
    tensors = ParamsTensors(config, params)
    run.write(plan_meta(tensors, None, Vocabulary(), shards=parts), tensors, tmp_path / "m")
    for number, part in enumerate(meta.split(config, params, parts)):
        loaded = torch.load(tmp_path / "m" / f"consolidated.{number:02}.pth", **LOADS[how])
        assert loaded.keys() == part.keys() - {"rope.freqs"}
        for key, tensor in loaded.items():
            assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
            assert_equal(part[key], tensor)


@pytest.mark.parametrize("parts", meta.CONFIGS)
def test_the_goldens_are_what_torch_reads(parts: int) -> None:
    for path in meta.folder(parts).glob("*.pth"):
        theirs = torch.load(path, weights_only=True)
        ours = read_torch_zip(path)
        assert ours.keys() == theirs.keys()
        for name, info in ours.items():
            assert_equal(read_array(name, info), theirs[name])


def test_any_view_is_read(tmp_path: Path) -> None:
    whole = torch.arange(7 * 8 * 9, dtype=torch.float32).view(7, 8, 9)
    views = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "columns": whole[:, 2:5, ::3],
        "row": whole[3, 4],
        "value": whole[1, 2, 3],
        "nothing": whole[2:2],
        "parameter": torch.nn.Parameter(whole.half()),
        "double": whole.double().mT,
        "module": torch.nn.Linear(3, 5).weight,
        "several": whole.bfloat16().unfold(0, 2, 2),
    }
    torch.save(OrderedDict(views), tmp_path / "a.pth")
    found = read_torch_zip(tmp_path / "a.pth")
    assert list(found) == list(views)
    for name, info in found.items():
        assert_equal(read_array(name, info), views[name])


def test_a_modules_state_is_read(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).to(torch.bfloat16)
    torch.save({"model": model.state_dict(), "optimizer": {"lr": 0.1, "steps": [1, 2]}}, tmp_path / "a.pth")
    found = read_torch_zip(tmp_path / "a.pth")
    assert found.keys() == model.state_dict().keys()
    for name, info in found.items():
        assert_equal(read_array(name, info), model.state_dict()[name])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"a": torch.zeros(3).expand(2, 3)}, "expanded view"),
        (lambda: {"a": torch.zeros(3, dtype=torch.int64)}, "imports 'torch.LongStorage'"),
        (lambda: {"a": torch.zeros(3).to(torch.float8_e4m3fn)}, "imports"),
        (lambda: {"a": torch.zeros(2, dtype=torch.complex64).conj()}, "not supported"),
        (lambda: {"a": torch.zeros(2, 2).to_sparse()}, "imports 'torch._utils._rebuild_sparse_tensor'"),
        (lambda: torch.nn.Linear(2, 2), "imports 'torch.nn.modules.linear.Linear'"),
        (lambda: [torch.zeros(2)], "holds a list without named tensors"),
    ],
)
def test_what_is_not_read_is_said(make: Any, said: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        read_torch_zip(tmp_path / "a.pth")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_without_checksums(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3).to(torch.bfloat16)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    found = read_torch_zip(tmp_path / "a.pth")
    assert found["a"].crc == 0
    for name, info in found.items():
        assert_equal(read_array(name, info), state[name])


def test_the_format_before_zip(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="a PyTorch file older than"):
        read_torch_zip(tmp_path / "a.pth")


def test_torch_maps_a_file_beyond_4_gb(tmp_path: Path) -> None:
    """Sparse, so that it takes no disk; and mapped, so that it takes no memory."""
    path = tmp_path / "a.pth"
    tensors = [TensorSpec("large", (5, 1 << 28), "F32"), TensorSpec("after", (3,), "BF16")]
    layout = Layout(tensors)
    values = np.array([1, 2, 3], jnp.bfloat16)
    with path.open("wb") as file:
        for offset, data in [(layout.offsets[1], values.tobytes()), *layout.fixed, *layout.finish([0, 0])]:
            file.seek(offset)
            file.write(data)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["large"].shape == (5, 1 << 28) and loaded["large"][4, -1] == 0
    assert loaded["after"].tolist() == [1, 2, 3]
    assert_equal(read_array("after", read_torch_zip(path)["after"]), loaded["after"])
