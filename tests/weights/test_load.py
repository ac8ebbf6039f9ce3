"""Every format loads the same parameters; laws of loading; checkpoints that do not match."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import llama_jax as lj
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError
from llama_jax.meshes import make_mesh
from llama_jax.sharding import named, param_specs
from llama_jax.weights import load_params, open_source
from llama_jax.weights.names import LEAVES, split_rotary_pairs
from tests.weights.writers import CONFIG, hf_tensors, random_params, write_gguf, write_hf, write_llama2c

# llama2.c's format does not store head_dim, rms_norm_eps and rope_theta.
LLAMA2C = CONFIG.replace(
    head_dim=CONFIG.hidden_size // CONFIG.num_attention_heads, rms_norm_eps=1e-5, rope_theta=1e4
)
WRITERS = {
    "hf": lambda folder, config, params: write_hf(folder / "hf", config, params),
    "hf-sharded": lambda folder, config, params: write_hf(folder / "hf", config, params, shards=3),
    "gguf": lambda folder, config, params: write_gguf(folder / "a.gguf", config, params),
    "llama2c-0": lambda folder, config, params: write_llama2c(folder / "a.bin", config, params),
    "llama2c-1": lambda folder, config, params: write_llama2c(folder / "a.bin", config, params, version=1),
    "llama2c-2": lambda folder, config, params: write_llama2c(folder / "a.bin", config, params, version=2),
}


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def one_line(caught: pytest.ExceptionInfo[Exception]) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 4000
    return message


def problem(do: Callable[[], Any]) -> str:
    """Returns the error message of a call, or an empty string; other exceptions propagate."""
    try:
        do()
    except LlamaJaxError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_round_trip_of_config_and_params(writer: str, tied: bool, tmp_path: Path) -> None:
    config = (LLAMA2C if "llama2c" in writer else CONFIG).replace(tie_word_embeddings=tied)
    params = random_params(config)
    source = open_source(WRITERS[writer](tmp_path, config, params))
    assert source.config == config
    assert source.format in writer
    assert_same(load_params(source), params)


def test_split_rotary_pairs_commutes_with_rotation() -> None:
    # Rotating pairs (2i, 2i + 1) and then permuting equals permuting and then rotating (i, i + H/2).
    rng = np.random.default_rng(0)
    x, angle = rng.normal(size=(5, 8)), rng.normal(size=4)
    cos, sin = np.cos(angle), np.sin(angle)
    interleaved = np.empty_like(x)
    interleaved[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
    interleaved[:, 1::2] = x[:, 1::2] * cos + x[:, 0::2] * sin
    first, second = np.split(split_rotary_pairs(x), 2, axis=-1)
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    np.testing.assert_allclose(halves, split_rotary_pairs(interleaved), rtol=1e-12)


def test_split_rotary_pairs_has_an_inverse() -> None:
    x = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(split_rotary_pairs(x)[0, 0], [0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(split_rotary_pairs(split_rotary_pairs(x), inverse=True), x)
    np.testing.assert_array_equal(split_rotary_pairs(split_rotary_pairs(x, inverse=True)), x)


def test_table_of_names_is_complete_and_unambiguous() -> None:
    params = jax.eval_shape(lambda: lj.init(CONFIG, jax.random.key(0)))
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    assert set(leaves) == {leaf.path for leaf in LEAVES}
    for leaf in LEAVES:
        lead = (CONFIG.num_hidden_layers,) if leaf.per_layer else ()
        assert leaves[leaf.path].shape == lead + leaf.shape(CONFIG)
    for format in ("hf", "meta", "gguf", "llama2c"):
        assert len({leaf.name(format, 0) for leaf in LEAVES}) == len(LEAVES)


@pytest.mark.parametrize("writer", ["hf", "gguf", "llama2c-0"])
def test_unstacked_layers_equal_stacked_layers(writer: str, tmp_path: Path) -> None:
    source = open_source(WRITERS[writer](tmp_path, LLAMA2C, random_params(LLAMA2C)))
    stacked, unstacked = load_params(source), load_params(source, scan_layers=False)
    assert isinstance(unstacked["layers"], tuple)
    assert_same(unstacked | {"layers": jax.tree.map(lambda *x: np.stack(x), *unstacked["layers"])}, stacked)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_rounds_once(dtype: Any, tmp_path: Path) -> None:
    params = jax.tree.map(lambda x: x * np.float32(1.001), random_params())
    source = open_source(write_hf(tmp_path, CONFIG, params))
    assert_same(load_params(source, dtype=dtype), jax.tree.map(lambda x: x.astype(dtype), params))


@pytest.mark.parametrize("dtype", ["int8", "float64", "nonsense"])
def test_unsupported_dtypes_are_refused(dtype: str, tmp_path: Path) -> None:
    source = open_source(write_hf(tmp_path, CONFIG, random_params()))
    with pytest.raises(ConfigError, match=f"dtype is '{dtype}'; it must be one of float32") as caught:
        load_params(source, dtype=dtype)
    one_line(caught)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("writer", ["hf", "gguf"])
def test_params_on_a_mesh_have_the_tables_shardings(writer: str, scan_layers: bool, tmp_path: Path) -> None:
    params = random_params()
    source = open_source(WRITERS[writer](tmp_path, CONFIG, params))
    mesh = make_mesh("fsdp=4,tensor=2")
    loaded = load_params(source, mesh=mesh, scan_layers=scan_layers)
    specs = param_specs(CONFIG, scan_layers=scan_layers)
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    expected = jax.tree.map(lambda spec: named(mesh, spec), specs, is_leaf=is_spec)
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), loaded, expected)
    assert all(jax.tree.leaves(same))
    assert_same(loaded, load_params(source, scan_layers=scan_layers))


def test_indivisible_mesh_is_refused_before_reading(tmp_path: Path) -> None:
    config = CONFIG.replace(num_attention_heads=6, num_key_value_heads=3)
    source = open_source(write_hf(tmp_path, config, random_params(config)))
    with pytest.raises(ConfigError) as caught:
        load_params(
            source, mesh=make_mesh("fsdp=4,tensor=2"), progress=lambda *_: pytest.fail("data was read")
        )
    assert "attention.wk: num_key_value_heads 3" in one_line(caught)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    source = open_source(write_hf(tmp_path, CONFIG, random_params(), shards=2))
    seen: list[tuple[int, int, str]] = []
    load_params(source, progress=lambda *step: seen.append(step))
    assert {name for _, _, name in seen} == set(source.tensors)
    assert [total for _, total, _ in seen] == [CONFIG.num_params * 4] * len(seen)
    done = [done for done, _, _ in seen]
    assert done == sorted(set(done))
    assert done[-1] == CONFIG.num_params * 4


def test_peak_host_memory_is_a_few_tensors(tmp_path: Path) -> None:
    config = CONFIG.replace(num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    source = open_source(write_hf(tmp_path, config, random_params(config)))
    largest = max(info.nbytes for info in source.tensors.values())
    load_params(source)  # compiles
    tracemalloc.start()  # traces NumPy's allocations, not JAX's device memory
    load_params(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest * 24 < config.num_params * 4
    assert peak < 4 * largest


@pytest.mark.slow
def test_smollm2(smollm2_path: Path, smollm2: lj.Model) -> None:
    source = open_source(smollm2_path)
    assert source.config == smollm2.config == lj.presets.SMOLLM2_135M
    assert source.detected_by == "the file begins with GGUF"
    sizes = [x.size for x in jax.tree.leaves(smollm2.params)]
    assert sum(sizes) == source.config.num_params == 134_515_008
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(smollm2.params))


def test_stories260k(shared_data: Path) -> None:
    """A test of the command line generates its golden text."""
    source = open_source(shared_data / "stories260K" / "stories260K.bin")
    config, params = source.config, load_params(source)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (5, 64, 8)
    assert (config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (4, 512, True)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_params


# Checkpoints that do not match their configuration.


def test_all_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    folder = write_hf(
        tmp_path,
        CONFIG,
        random_params(),
        extra={
            "model.layers.1.mlp.up_proj.weight": np.zeros((4, 4), np.float32),
            "model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32),
            "model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32),
            "surprise": np.zeros(1, np.float32),
        },
        num_hidden_layers=5,
    )
    source = open_source(folder)
    with pytest.raises(CheckpointError) as caught:
        load_params(source, progress=lambda *_: pytest.fail("data was read"))
    message = one_line(caught)
    assert str(folder) in message
    assert "model.layers.3-4.self_attn.q_proj.weight" in message
    assert "unexpected tensors: 'model.layers.0-1.self_attn.q_proj.bias', 'surprise'" in message
    assert "model.layers.1.mlp.up_proj.weight [4, 4] should be [160, 64]" in message


def test_scattered_missing_layers_are_listed(tmp_path: Path) -> None:
    source = open_source(write_hf(tmp_path, CONFIG, random_params()))
    tensors = dict(source.tensors)
    for layer in (0, 2):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"missing tensors: model\.layers\.\{0, 2\}\.mlp\.up_proj\.weight;"
    ):
        load_params(dataclasses.replace(source, tensors=tensors))


def test_too_many_layers_are_refused_early(tmp_path: Path) -> None:
    source = open_source(write_hf(tmp_path, CONFIG, random_params(), num_hidden_layers=2_000_000_000))
    with pytest.raises(
        CheckpointError, match="has 2000000000 layers but there are only 30 tensors"
    ) as caught:
        load_params(source)
    one_line(caught)


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    config = CONFIG.replace(tie_word_embeddings=True)
    params = random_params(config)
    extra = {
        "lm_head.weight": params["embed"]["embedding"],
        "model.layers.2.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
    }
    assert set(extra).isdisjoint(hf_tensors(config, params))
    assert_same(load_params(open_source(write_hf(tmp_path, config, params, extra=extra))), params)


def test_untied_models_require_an_output_projection(tmp_path: Path) -> None:
    config = CONFIG.replace(tie_word_embeddings=True)
    source = open_source(write_hf(tmp_path, config, random_params(config), tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"missing tensors: lm_head\.weight"):
        load_params(source)


def test_truncation_after_opening_is_an_error(tmp_path: Path) -> None:
    path = write_llama2c(tmp_path / "a.bin", LLAMA2C, random_params(LLAMA2C))
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="the file changed while it was read") as caught:
        load_params(source)
    one_line(caught)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file") as caught:
        load_params(source)
    one_line(caught)


def test_reading_an_unknown_tensor(tmp_path: Path) -> None:
    source = open_source(write_hf(tmp_path, CONFIG, random_params()))
    with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
        source.read("nothing")
