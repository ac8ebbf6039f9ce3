"""Orbax checkpoints of parameters alone: Orbax itself reads what TensorStore has filled in."""

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


def written(tensors, target, dtype=None, **options):
    run.write(plan_orbax(tensors, dtype, Vocabulary()), tensors, target, **options)
    return target


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read_back_to_the_bit(tmp_path, seed, dtype):
    config, params = random_model(seed)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    source = open_source(written(ParamsTensors(config, params), tmp_path / "out"))
    assert same(load_params(source, dtype=dtype), params)
    assert same(load_params(source, dtype=dtype, scan_layers=False), lj.unstack(params))


def test_orbax_reads_it_without_us(tmp_path):
    config, params = random_model(2)
    written(ParamsTensors(config, params), tmp_path / "a b")  # a space, for URLs
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore((tmp_path / "a b" / "params").absolute())
    assert same(found, jax.tree.map(np.asarray, params))


def test_a_mesh_reads_its_shards(tmp_path):
    config, params = random_model(2, lj.presets.TINY.replace(vocab_size=64, num_hidden_layers=2))
    source = open_source(written(ParamsTensors(config, params), tmp_path / "out"))
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    found, expected = load_params(source, mesh=mesh), lj.shard_params(params, mesh, config)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, expected)
    assert same(found, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_layers_are_read_one_by_one_whether_or_not_the_file_holds_them_so(tmp_path, whole):
    config, params = random_model(3)
    target = written(ParamsTensors(config, params), tmp_path / "out")
    if whole:  # as the trainer saves them
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save((target / "params").absolute(), args=ocp.args.PyTreeSave(params), force=True)
    stored, memory = StoredTensors(open_source(target)), ParamsTensors(config, params)
    assert stored.stacked
    for leaf in leaves(config):
        for layer in range(config.num_hidden_layers) if leaf.per_layer else (None,):
            assert np.array_equal(stored.read(leaf, layer), memory.read(leaf, layer))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    config, params = random_model(3)
    reads = []

    class Counting(ParamsTensors):
        def read(self, leaf, layer):
            reads.append((leaf, layer))
            if len(reads) == 8:
                raise KeyboardInterrupt
            return super().read(leaf, layer)

    with pytest.raises(KeyboardInterrupt):
        written(Counting(config, params), tmp_path / "out", origin="it")
    assert not (tmp_path / "out").exists()
    written(Counting(config, params), tmp_path / "out", origin="it")
    total = sum(config.num_hidden_layers if leaf.per_layer else 1 for leaf in leaves(config))
    assert len(reads) < 8 + total
    assert same(load_params(open_source(tmp_path / "out")), params)


def test_a_full_disk_is_said_as_for_other_formats(tmp_path, monkeypatch):
    class Full:
        def __getitem__(self, layer):
            return self

        def write(self, data):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing ...")

    real = orbax._Arrays
    monkeypatch.setattr(orbax, "_Arrays", lambda folder, arrays: real(folder, dict.fromkeys(arrays, Full())))
    config, params = random_model(3)
    with pytest.raises(
        CheckpointError, match=r"out: cannot be written: No space left on device; what is done"
    ):
        written(ParamsTensors(config, params), tmp_path / "out")


def test_it_is_cast(tmp_path):
    config, params = random_model(3)
    target = written(ParamsTensors(config, params), tmp_path / "out", np.dtype(jnp.bfloat16))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert same(load_params(open_source(target), dtype="bfloat16"), half)
