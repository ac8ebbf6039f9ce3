"""Writing Orbax checkpoints of parameters only: round trips, and Orbax itself reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params, open_source
from llama_jax.weights.names import leaves
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write import orbax, run
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model


def write_orbax(tensors, target, dtype=None, **options):
    run.write(plan_orbax(tensors, dtype, Vocabulary()), tensors, target, **options)
    return target


def cast(params, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)


def identical(a, b):
    """In numpy, which compiles nothing."""
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float16")])
def test_round_trip_is_bit_exact(tmp_path, seed, dtype):
    config, params = random_model(seed)
    params = cast(params, dtype)
    source = open_source(write_orbax(ParamsTensors(config, params), tmp_path / "out"))
    assert identical(load_params(source, dtype=dtype), params)
    assert identical(load_params(source, dtype=dtype, scan_layers=False), lj.unstack(params))


def test_orbax_restores_it(tmp_path):
    config, params = random_model(2)
    write_orbax(ParamsTensors(config, params), tmp_path / "a b")  # a space, to test URL quoting
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore((tmp_path / "a b" / "params").absolute())
    assert identical(found, jax.tree.map(np.asarray, params))


def test_restoring_onto_a_mesh(tmp_path):
    config, params = random_model(2, lj.presets.TINY.replace(vocab_size=64, num_hidden_layers=2))
    source = open_source(write_orbax(ParamsTensors(config, params), tmp_path / "out"))
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    found, expected = load_params(source, mesh=mesh), lj.shard_params(params, mesh, config)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, expected)
    assert identical(found, expected)


@pytest.mark.parametrize("chunk", ["leaf", "layer"])
def test_layers_are_read_one_at_a_time_for_any_chunking(tmp_path, chunk):
    config, params = random_model(3)
    target = write_orbax(ParamsTensors(config, params), tmp_path / "out")
    if chunk == "leaf":  # as the trainer saves them
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save((target / "params").absolute(), args=ocp.args.PyTreeSave(params), force=True)
    stored, memory = StoredTensors(open_source(target)), ParamsTensors(config, params)
    assert stored.stacked
    for leaf in leaves(config):
        for layer in range(config.num_hidden_layers) if leaf.per_layer else (None,):
            assert np.array_equal(stored.read(leaf, layer), memory.read(leaf, layer))


def test_an_interrupted_write_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    config, params = random_model(3)
    reads = []

    class CountingTensors(ParamsTensors):
        def read(self, leaf, layer):
            reads.append((leaf, layer))
            if len(reads) == 8:
                raise KeyboardInterrupt
            return super().read(leaf, layer)

    with pytest.raises(KeyboardInterrupt):
        write_orbax(CountingTensors(config, params), tmp_path / "out", origin="source")
    assert not (tmp_path / "out").exists()
    write_orbax(CountingTensors(config, params), tmp_path / "out", origin="source")
    total = sum(config.num_hidden_layers if leaf.per_layer else 1 for leaf in leaves(config))
    assert len(reads) < 8 + total
    assert identical(load_params(open_source(tmp_path / "out")), params)


def test_a_full_disk(tmp_path, monkeypatch):
    class FullArray:
        def __getitem__(self, layer):
            return self

        def write(self, data):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing ...")

    real = orbax._ArrayStore
    monkeypatch.setattr(
        orbax, "_ArrayStore", lambda folder, arrays: real(folder, dict.fromkeys(arrays, FullArray()))
    )
    config, params = random_model(3)
    with pytest.raises(
        CheckpointError, match=r"out: cannot be written: No space left on device; partial output"
    ):
        write_orbax(ParamsTensors(config, params), tmp_path / "out")


def test_dtype(tmp_path):
    config, params = random_model(3)
    target = write_orbax(ParamsTensors(config, params), tmp_path / "out", np.dtype(jnp.bfloat16))
    half = cast(params, "bfloat16")
    assert identical(load_params(open_source(target), dtype="bfloat16"), half)
