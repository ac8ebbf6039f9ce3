"""Writing Meta directories: bit-exact round trips in any number of shards, and the torch archive."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError
from llama_jax.rope import rotary_frequencies
from llama_jax.weights import load_params
from llama_jax.weights.meta import open_meta
from llama_jax.weights.names import entries
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.torch_zip import read_torch_zip
from llama_jax.weights.write import run
from llama_jax.weights.write.meta import plan_meta
from llama_jax.weights.write.torch_zip import Layout, TensorSpec
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.golden import meta
from tests.weights.test_load import assert_same
from tests.weights.writers import random_params

NO_VOCABULARY = Vocabulary()
UNTIED = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=99,
    rms_norm_eps=3e-6,
)
CONFIGS = {
    "K = N": UNTIED,
    "tied": UNTIED.replace(tie_word_embeddings=True),
    "K < N": UNTIED.replace(num_attention_heads=16, num_key_value_heads=8, head_dim=None, rope_theta=1e6),
    "Llama 3": UNTIED.replace(
        rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), tie_word_embeddings=True
    ),
}


def write(
    target: Path, tensors: Any, dtype: Any = None, vocabulary: Vocabulary = NO_VOCABULARY, **options: Any
) -> Path:
    run.write(plan_meta(tensors, dtype, vocabulary, **options), tensors, target)
    return target


def random_bits_params(config: LlamaConfig, dtype: str = "float32") -> dict[str, Any]:
    """Random numpy parameters whose mantissa bits are all random."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(jnp.dtype(dtype)), random_params(config)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(name: str, dtype: str, shards: int, tmp_path: Path) -> None:
    config, params = CONFIGS[name], random_bits_params(CONFIGS[name], dtype)
    tensors = ParamsTensors(config, params)
    source = open_meta(write(tmp_path / "m", tensors, shards=shards), "test")
    assert source.config == config and source.metadata == {"parts": shards}
    stored = StoredTensors(source)
    for _, leaf, layer in entries(config, "hf"):
        assert stored.dtype(leaf, layer) == np.dtype(dtype)
        ours, theirs = tensors.read(leaf, layer), stored.read(leaf, layer)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))
    if dtype == "float32":
        assert_same(load_params(source), params)
    # Writing the read tensors again gives the same files.
    write(tmp_path / "copy", stored, shards=shards)
    assert contents(tmp_path / "copy") == contents(tmp_path / "m")


@pytest.mark.parametrize("parts", meta.CONFIGS)
def test_shards_match_those_written_by_torch(parts: int, tmp_path: Path) -> None:
    config = meta.CONFIGS[parts]
    tensors = ParamsTensors(config, random_params(config))
    write(tmp_path / "m", tensors, jnp.dtype(meta.DTYPES[parts]), shards=parts)
    for path in sorted(meta.folder(parts).glob("*.pth")):
        theirs, ours = read_torch_zip(path), read_torch_zip(tmp_path / "m" / path.name)
        assert ours.keys() == theirs.keys() - {"rope.freqs"}
        for name, info in ours.items():
            assert (info.shape, info.dtype) == (theirs[name].shape, theirs[name].dtype)
    assert_same(load_params(open_meta(tmp_path / "m", "test")), random_params(config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_casting(dtype: str, tmp_path: Path) -> None:
    config, params = UNTIED, random_bits_params(UNTIED)
    write(tmp_path / "m", ParamsTensors(config, params), jnp.dtype(dtype), shards=2)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype("float32"), params)
    assert_same(load_params(open_meta(tmp_path / "m", "test")), cast)


def test_params_json_matches_metas() -> None:
    """Meta's code passes every field as an argument, so unknown ones must not be written."""

    def params(config: LlamaConfig) -> dict[str, Any]:
        return json.loads(plan_meta(ShapesOnly(config), None, NO_VOCABULARY).extras["params.json"])

    llama2 = {"multiple_of": 256, "norm_eps": 1e-05, "vocab_size": 32_000}
    assert params(lj.presets.LLAMA2_7B) == llama2 | {"dim": 4096, "n_heads": 32, "n_layers": 32}
    assert params(lj.presets.LLAMA2_13B) == llama2 | {"dim": 5120, "n_heads": 40, "n_layers": 40}
    assert params(lj.presets.LLAMA2_70B) == llama2 | {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
    }
    assert "rope_theta" in params(UNTIED.replace(rope_theta=1e6))


class ShapesOnly:
    """A model's configuration without tensors."""

    def __init__(self, config: LlamaConfig, dtype: str = "bfloat16") -> None:
        self.config = config
        self._dtype = np.dtype(jnp.dtype(dtype))

    def dtype(self, leaf: Any, layer: int | None) -> np.dtype[Any]:
        return self._dtype

    def read(self, leaf: Any, layer: int | None) -> np.ndarray:
        raise AssertionError("planning must not read tensors")


def test_llama_2_70b_in_8_shards_is_planned_from_shapes() -> None:
    plan = plan_meta(ShapesOnly(lj.presets.LLAMA2_70B), None, NO_VOCABULARY, shards=8)
    assert list(plan.files) == [f"consolidated.{number:02}.pth" for number in range(8)]
    # Norms are replicated in every shard; the rest is split.
    norms = 161 * 8192
    assert sum(region.nbytes for region in plan.regions) == 2 * (lj.presets.LLAMA2_70B.num_params + 7 * norms)
    assert all(
        0 < size - 2 * (68_976_648_192 - norms) / 8 - 2 * norms < 400_000 for size in plan.files.values()
    )
    assert all(region.offset % 64 == 0 for region in plan.regions)


def test_tokenizer_files(tmp_path: Path) -> None:
    config, params = UNTIED, random_bits_params(UNTIED)
    vocabulary = Vocabulary(files={"tokenizer.model": b"spm"})
    folder = write(tmp_path / "m", ParamsTensors(config, params), vocabulary=vocabulary)
    assert sorted(contents(folder)) == [
        "consolidated.00.pth",
        "llama_jax.json",
        "params.json",
        "tokenizer.model",
    ]
    assert (folder / "tokenizer.model").read_bytes() == b"spm"
    assert open_meta(folder, "test").tokenizer_dir == folder


def test_an_interrupted_write_is_resumed_with_valid_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(ParamsTensors):
        reads = 0

        def read(self, leaf: Any, layer: int | None) -> np.ndarray:
            Failing.reads += 1
            if Failing.reads == 9:
                raise KeyboardInterrupt
            return super().read(leaf, layer)

    monkeypatch.setattr(run, "_THREADS", 1)
    config, params = CONFIGS["tied"], random_bits_params(CONFIGS["tied"])
    tensors = Failing(config, params)
    target = tmp_path / "m"
    with pytest.raises(KeyboardInterrupt):
        run.write(plan_meta(tensors, None, NO_VOCABULARY, shards=2), tensors, target, origin="source")
    assert not target.exists()
    with pytest.raises(CheckpointError):
        open_meta(tmp_path / "m.partial" / "data", "test")
    run.write(plan_meta(tensors, None, NO_VOCABULARY, shards=2), tensors, target, origin="source")
    assert contents(target) == contents(write(tmp_path / "uninterrupted", tensors, shards=2))
    for path in target.glob("*.pth"):
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
    assert_same(load_params(open_meta(target, "test")), params)


def test_a_partial_output_of_another_dtype_is_not_resumed(tmp_path: Path) -> None:
    class Failing(ParamsTensors):
        def read(self, leaf: Any, layer: int | None) -> np.ndarray:
            if leaf.path[0] == "lm_head":
                raise KeyboardInterrupt
            return super().read(leaf, layer)

    params, target = random_bits_params(UNTIED), tmp_path / "m"
    float16, bfloat16 = jnp.dtype("float16"), jnp.dtype("bfloat16")  # of the same size
    failing, tensors = Failing(UNTIED, params), ParamsTensors(UNTIED, params)
    with pytest.raises(KeyboardInterrupt):
        run.write(plan_meta(failing, float16, NO_VOCABULARY), failing, target, origin="source")
    run.write(plan_meta(tensors, bfloat16, NO_VOCABULARY), tensors, target, origin="source")
    assert contents(target) == contents(write(tmp_path / "uninterrupted", tensors, bfloat16))


# Models that Meta's format cannot represent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 16}, "head_dim is 16 but Meta's code would use 4"),
        ({"hidden_size": 36, "head_dim": 4}, "hidden_size 36 is not a multiple of num_attention_heads 8"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling is RopeScaling(kind='linear'"),
        ({"rope_scaling": RopeScaling("yarn", 2.0, 64)}, "rope_scaling is RopeScaling(kind='yarn'"),
        ({"rope_scaling": RopeScaling("llama3", 4.0, 8192)}, "rope_scaling is RopeScaling(kind='llama3'"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 4096)}, "but Meta's code would use RopeScaling("),
    ],
)
def test_models_that_metas_code_computes_differently_are_rejected(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match="write another format") as caught:
        plan_meta(ShapesOnly(UNTIED.replace(**changes)), None, NO_VOCABULARY)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_ntk_scaling_is_stored_as_theta(tmp_path: Path) -> None:
    config = UNTIED.replace(rope_scaling=RopeScaling("ntk", 4.0))
    back = open_meta(write(tmp_path / "m", ParamsTensors(config, random_bits_params(config))), "test").config
    assert back == config.replace(rope_scaling=None, rope_theta=1e4 * 4.0 ** (4 / 2))

    def frequencies(config: LlamaConfig) -> np.ndarray:
        theta, scaling = config.rope_theta, config.rope_scaling
        return rotary_frequencies(head_dim=config.head_dim, theta=theta, scaling=scaling)[0]

    np.testing.assert_array_equal(frequencies(config), frequencies(back))


@pytest.mark.parametrize("shards", [0, -1, 3, 16, 100])
def test_shards_that_do_not_divide(shards: int) -> None:
    with pytest.raises(ConfigError, match=r"use one of 1, 2, 4, 8$") as caught:
        plan_meta(ShapesOnly(UNTIED), None, NO_VOCABULARY, shards=shards)
    assert "\n" not in str(caught.value) and f"shards is {shards};" in str(caught.value)
    with pytest.raises(ConfigError, match=r"num_key_value_heads 2: use one of 1, 2$"):
        plan_meta(ShapesOnly(UNTIED.replace(num_key_value_heads=2)), None, NO_VOCABULARY, shards=4)


def test_a_value_too_large_for_the_dtype(tmp_path: Path) -> None:
    config, params = UNTIED, random_bits_params(UNTIED)
    params = params | {"final_norm": {"scale": np.full(32, 1e6, np.float32)}}
    with pytest.raises(LlamaJaxError, match="too large for float16"):
        write(tmp_path / "m", ParamsTensors(config, params), np.dtype(np.float16))
    assert not (tmp_path / "m").exists()


# The archive


def test_the_archive_is_a_valid_zip_with_a_valid_pickle(tmp_path: Path) -> None:
    config, params = UNTIED, random_bits_params(UNTIED)
    folder = write(tmp_path / "m", ParamsTensors(config, params), shards=2)
    for path in folder.glob("*.pth"):
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None
            assert file.read("consolidated/version") == b"3\n"
            assert file.read("consolidated/byteorder") == b"little"
            pickletools.dis(file.read("consolidated/data.pkl"), out=io.StringIO())  # also checks the stack
            names = [name for name in file.namelist() if "/data/" in name]
            assert names == [f"consolidated/data/{number}" for number in range(len(names))]
    # The output is deterministic.
    assert contents(folder) == contents(write(tmp_path / "n", ParamsTensors(config, params), shards=2))


def sparse_file(path: Path, tensors: list[TensorSpec]) -> Layout:
    """A sparse file whose tensors are all zero."""
    layout = Layout(tensors)
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, data in [*layout.fixed, *layout.finish([0] * len(tensors))]:
            file.seek(offset)
            file.write(data)
    assert path.stat().st_size == layout.size
    return layout


def test_files_beyond_4_gb(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    tensors = [
        TensorSpec("large", (5, 1 << 28), "F32"),
        TensorSpec("after", (3,), "BF16"),
        TensorSpec("wide", (1 << 33,), "F16"),
        TensorSpec("last", (2, 2), "F64"),
    ]
    layout = sparse_file(path, tensors)
    found = read_torch_zip(path)
    assert [(name, info.shape, info.dtype) for name, info in found.items()] == tensors
    assert [info.offset for info in found.values()] == layout.offsets
    with zipfile.ZipFile(path) as file:
        sizes = [entry.file_size for entry in file.infolist() if "/data/" in entry.filename]
        assert sizes == [tensor.nbytes for tensor in tensors]
        assert file.read("consolidated/version") == b"3\n"


@pytest.mark.parametrize("size", [(1 << 32) - 2, 1 << 32])
def test_sizes_at_the_limit_of_32_bits(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sparse_file(path, [TensorSpec("a", (size // 2,), "F16"), TensorSpec("b", (1,), "F32")])
    assert [info.nbytes for info in read_torch_zip(path).values()] == [size, 4]
    with zipfile.ZipFile(path) as file:
        assert file.getinfo("consolidated/data/0").file_size == size
