"""Writing llama2.c files: round trips, int8 groups, models that the format cannot represent."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from llama_jax.weights import load_params, open_source
from llama_jax.weights.names import leaves
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import ParamsTensors, StoredTensors, Tensors
from llama_jax.weights.write.llama2c import plan_llama2c
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.weights.test_load import LLAMA2C, assert_same, one_line
from tests.weights.writers import random_params, write_llama2c

NO_VOCABULARY = Vocabulary()


def write_and_open(
    tensors: Tensors, target: Path, vocabulary: Vocabulary = NO_VOCABULARY, **options: Any
) -> Source:
    write(plan_llama2c(tensors, vocabulary, **options), tensors, target)
    return open_source(target / "model.bin")


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_the_file_equals_the_reference_writers(
    version: int, tied: bool, kv_heads: int, tmp_path: Path
) -> None:
    config = LLAMA2C.replace(tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    params = random_params(config)
    source = write_and_open(ParamsTensors(config, params), tmp_path / "ours", version=version)
    assert source.config == config
    assert source.metadata["version"] == version
    loaded = load_params(source)
    if version < 2:
        assert_same(loaded, params)
    else:  # the reference writer's scale is fixed
        assert_close(loaded, params, config)
        return
    theirs = write_llama2c(tmp_path / "theirs.bin", config, params, version=version).read_bytes()
    ours = (tmp_path / "ours" / "model.bin").read_bytes()
    if version == 0:  # the reference writer leaves the rotary tables empty
        start = source.tensors["freq_cis_real"].offset
        end = start + 2 * source.tensors["freq_cis_real"].nbytes
        ours, theirs = (raw[:start] + raw[end:] for raw in (ours, theirs))
    assert ours == theirs


def assert_close(ours: Any, theirs: Any, config: LlamaConfig, group: int = 32) -> None:
    """The error is at most half a quantization step, and the largest value of a group is exact to f32."""
    tensors, others = ParamsTensors(config, ours), ParamsTensors(config, theirs)
    for leaf in leaves(config):
        for layer in range(config.num_hidden_layers) if leaf.per_layer else (None,):
            a, b = (
                leaf.convert_layout(each.read(leaf, layer), config, "hf", "llama2c")
                for each in (tensors, others)
            )
            if a.ndim == 1:
                np.testing.assert_array_equal(a, b)
                continue
            a, b = a.reshape(-1, group), b.reshape(-1, group)
            largest = abs(b).max(axis=1, keepdims=True)
            assert (abs(a - b) <= largest / 127 / 2 * (1 + 1e-5)).all()
            np.testing.assert_allclose(abs(a).max(axis=1, keepdims=True), largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group"), [(64, 128, 64), (64, 160, 32), (64, 172, 4), (64, 81, 1)]
)
def test_the_group_size_divides_rows(hidden: int, intermediate: int, group: int, tmp_path: Path) -> None:
    config = LLAMA2C.replace(hidden_size=hidden, intermediate_size=intermediate)
    params = random_params(config)
    params["embed"]["embedding"][:2] = 0  # all-zero groups
    source = write_and_open(ParamsTensors(config, params), tmp_path / "out", version=2)
    header = (tmp_path / "out" / "model.bin").read_bytes()[:256]
    assert struct.unpack_from("<i", header, 37) == (group,)
    loaded = load_params(source)
    assert_close(loaded, params, config, group)
    assert not np.asarray(loaded["embed"]["embedding"][:2]).any()


def test_int8_matches_export_py(tmp_path: Path) -> None:
    params = random_params(LLAMA2C)
    params = jax.tree.map(lambda x: x * np.float32(1.0371), params)
    source = write_and_open(ParamsTensors(LLAMA2C, params), tmp_path / "out", version=2)
    raw = (tmp_path / "out" / "model.bin").read_bytes()
    info = source.tensors["wv[1]"]
    weight = params["layers"]["attention"]["wv"][1].reshape(64, 32).T.reshape(-1, 32)
    scales = abs(weight).max(axis=1) / np.float32(127)
    values = np.frombuffer(raw, np.int8, weight.size, info.offset).reshape(weight.shape)
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4", len(scales), info.offset + weight.size), scales)
    np.testing.assert_array_equal(values, np.round(weight / scales[:, None]))
    assert abs(values).max() == 127


def test_stories260k_round_trip_is_byte_exact_except_for_the_rotary_tables(
    shared_data: Path, tmp_path: Path
) -> None:
    """PyTorch, which wrote the tables, rounds some sines differently; run.c does not read them."""
    path = shared_data / "stories260K" / "stories260K.bin"
    source, tokenizer = open_source(path), load_tokenizer(path)
    copy = write_and_open(StoredTensors(source), tmp_path / "out", export_vocabulary(tokenizer, "llama2c"))
    theirs, ours = path.read_bytes(), (tmp_path / "out" / "model.bin").read_bytes()
    start = source.tensors["freq_cis_real"].offset
    assert source.tensors["freq_cis_imag"].offset + source.tensors["freq_cis_imag"].nbytes == len(theirs)
    assert ours[:start] == theirs[:start]
    assert len(ours) == len(theirs)
    tables = (np.frombuffer(raw[start:], "<f4") for raw in (ours, theirs))
    np.testing.assert_allclose(*tables, rtol=0, atol=2**-24)
    assert (tmp_path / "out" / "tokenizer.bin").read_bytes() == (path.parent / "tok512.bin").read_bytes()
    assert_same(load_params(copy), load_params(source))
    assert load_tokenizer(tmp_path / "out" / "model.bin").vocab_size == 512


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_become_f32(dtype: str, tmp_path: Path) -> None:
    params = random_params(LLAMA2C)
    halves = jax.tree.map(lambda x: jax.numpy.asarray(x, dtype), params)
    source = write_and_open(ParamsTensors(LLAMA2C, halves), tmp_path / "out")
    assert_same(load_params(source), params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06; llama2.c's programs run every model with 1e-05"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0; llama2.c's programs run every model with 10000"),
        (
            {"rope_scaling": RopeScaling("linear", 2.0)},
            "rope_scaling is linear; llama2.c's programs run every model with none",
        ),
        ({"head_dim": 16}, "head_dim is 16; llama2.c's programs run every model with 8"),
    ],
)
def test_settings_that_llama2c_computes_differently_are_rejected(
    changes: dict[str, Any], message: str
) -> None:
    config = LLAMA2C.replace(**changes)
    with pytest.raises(ConfigError) as caught:
        plan_llama2c(ParamsTensors(config, random_params(config)), NO_VOCABULARY)
    assert message in one_line(caught)
