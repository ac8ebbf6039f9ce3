"""Writing Hugging Face directories: round trips, shards, dtypes, configuration files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import llama_jax as lj
from llama_jax.weights import load_params, open_source
from llama_jax.weights.names import entries
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model

# Each kind of RoPE scaling; tied or not; groups of 1, 2 and 3 heads; 1 to 3 layers.
SEEDS = (0, 1, 4, 5, 8, 11)
VOCABULARY = Vocabulary(files={"tokenizer.json": b"{}"}, bos_id=1, eos_ids=(2,), pad_id=0)


def write_hf(tensors, target, dtype=None, **options):
    write(plan_hf(tensors, dtype, VOCABULARY, **options), tensors, target)
    return target


def identical(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def cast(params, dtype):
    """With numpy, which compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trip_is_bit_exact(tmp_path, seed):
    config, params = random_model(seed)
    host = jax.device_get(params)  # slices of device arrays would compile a program for each shape
    source = open_source(write_hf(ParamsTensors(config, host), tmp_path / "out"))
    stored, expected = StoredTensors(source), ParamsTensors(config, host)
    for entry in entries(config, "hf"):
        found, value = (tensors.read(entry.leaf, entry.layer) for tensors in (stored, expected))
        assert found.dtype == value.dtype and np.array_equal(found, value), entry.name
    if (
        config.rope_scaling is not None and config.rope_scaling.kind == "ntk"
    ):  # written as its effective theta
        tokens = np.arange(20, dtype=np.int32)[None]
        assert np.array_equal(lj.forward(source.config, params, tokens), lj.forward(config, params, tokens))
    else:
        assert source.config == config


@pytest.mark.parametrize(
    ("dtype", "shard_bytes"),
    [("float32", 1), ("float32", 5_000), ("bfloat16", 5_000), ("float16", 40_000), ("float32", 10**9)],
)
def test_any_number_of_shards(tmp_path, shard_bytes, dtype):
    config, params = random_model(2)
    params = cast(params, dtype)
    target = write_hf(ParamsTensors(config, params), tmp_path / "out", shard_bytes=shard_bytes)
    assert identical(load_params(open_source(target), dtype=dtype), params)
    files = sorted(target.glob("*.safetensors"))
    names = [name for file in files for name in safe_open(file, "np").keys()]  # noqa: SIM118
    assert sorted(names) == sorted(entry.name for entry in entries(config, "hf"))
    assert all(file.stat().st_size % 4 == 0 or dtype != "float32" for file in files)
    if shard_bytes == 1:
        assert len(files) == len(names)
    if shard_bytes == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == config.num_params * jnp.dtype(dtype).itemsize
        assert set(index["weight_map"]) == set(names)


@pytest.mark.parametrize(
    ("dtype", "shards"),
    [("float32", 1), ("bfloat16", 2), ("float32", 3), ("bfloat16", 4), ("float32", 7)],
)
def test_equal_shards(tmp_path, shards, dtype):
    config, params = random_model(2, lj.presets.TINY.replace(vocab_size=64, num_hidden_layers=4))
    params = cast(params, dtype)
    target = write_hf(ParamsTensors(config, params), tmp_path / "out", shards=shards)
    assert len(list(target.glob("*.safetensors"))) == shards
    assert identical(load_params(open_source(target), dtype=dtype), params)


def test_unstacked_and_sharded_parameters_give_the_same_file(tmp_path):
    config, params = random_model(2, lj.presets.TINY.replace(vocab_size=64, num_hidden_layers=2))
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    models = {
        "stacked": params,
        "unstacked": lj.unstack(params),
        "mesh": lj.shard_params(params, mesh, config),
    }
    contents = {
        name: (write_hf(ParamsTensors(config, tree), tmp_path / name) / "model.safetensors").read_bytes()
        for name, tree in models.items()
    }
    assert contents["stacked"] == contents["unstacked"] == contents["mesh"]


def test_dtype_of_tensors_and_config(tmp_path):
    config, params = random_model(2)
    target = write_hf(ParamsTensors(config, params), tmp_path / "out", np.dtype(jnp.bfloat16))
    assert {info.dtype for info in open_source(target).tensors.values()} == {"BF16"}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert identical(load_params(open_source(target), dtype="bfloat16"), cast(params, "bfloat16"))


def test_mixed_dtypes_are_kept(tmp_path):
    config, params = random_model(2)
    params = {**params, "final_norm": cast(params["final_norm"], "bfloat16")}
    first = write_hf(ParamsTensors(config, params), tmp_path / "one")
    second = write_hf(StoredTensors(open_source(first)), tmp_path / "two")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert open_source(second).tensors["model.norm.weight"].dtype == "BF16"


def test_special_token_ids_and_tokenizer_files(tmp_path):
    target = write_hf(ParamsTensors(*random_model(2)), tmp_path / "out")
    assert (target / "tokenizer.json").read_bytes() == b"{}"
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((target / name).read_text())
        assert {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }


def test_several_eos_ids_are_a_list_and_none_is_omitted(tmp_path):
    tensors = ParamsTensors(*random_model(2))
    for name, eos_ids, expected in (("two", (2, 7), [2, 7]), ("none", (), None)):
        write(plan_hf(tensors, None, Vocabulary(eos_ids=eos_ids)), tensors, tmp_path / name)
        fields = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert fields.get("eos_token_id") == expected
