"""The search for a step's settings: what it compiles, what it writes, and what it does when refused."""

from __future__ import annotations

import dataclasses
import datetime

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, InputError
from llama_jax.plan.topology import Topology
from llama_jax.train.config.read import load_config
from llama_jax.train.config.run import MeshConfig, RunConfig, TrainConfig
from llama_jax.train.planning import search as search_module
from llama_jax.train.planning.errors import CompilerMissing, OutOfMemory
from llama_jax.train.planning.search import search

MODEL = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32,
)  # fmt: skip
SLICE = Topology.parse("v5p:2x2x1")
RUN = RunConfig(
    train=TrainConfig(global_batch_size=16, seq_len=4096, gradient_accumulation_steps=2),
    mesh=MeshConfig(tensor=2),
)


class Compiler:
    """In place of the TPU compiler: the arithmetic, refusing some candidates."""

    def __init__(self, refuses=lambda plan: False):
        self.refuses = refuses
        self.asked = []

    def __call__(self, run, model, topology, *, compiler_flags, timeout, use_cache):
        from llama_jax.plan.estimate import estimate
        from llama_jax.train.planning.inputs import step_inputs

        self.asked.append(run)
        inputs = step_inputs(run, model, topology, compiler_flags=compiler_flags)
        if self.refuses(run):
            raise OutOfMemory("the step needs 200G of HBM per chip, which has 95G: 105G too much")
        return dataclasses.replace(estimate(inputs), source="compiled")


@pytest.fixture
def compiler(monkeypatch):
    def install(*args):
        made = Compiler(*args)
        monkeypatch.setattr(search_module, "plan_compiled", made)
        return made

    return install


def test_the_best_are_compiled_and_the_winner_is_written(compiler, tmp_path):
    made, lines = compiler(), []
    found = search(RUN, MODEL, SLICE, top=2, progress=lines.append)
    assert found.best.plan.source == "compiled"
    assert len([one for one in found.tried if one.compiled]) == 2
    assert RUN in made.asked  # as it is, so that the winner is no worse
    assert found.best.plan.step_seconds <= found.given.plan.step_seconds
    assert any(line.startswith("compiling fsdp 4") for line in lines)
    path = tmp_path / "best.toml"
    text = found.toml(datetime.date(2026, 11, 30))
    path.write_text(text)
    assert "on 2026-11-30 for v5p:2x2x1 (jax " in text.splitlines()[0]
    loaded = load_config(path)
    searched = {
        "train": ("remat", "gradient_accumulation_steps"),
        "mesh": ("data", "fsdp", "context", "tensor", "topology"),
    }
    for section, names in searched.items():
        same = {name: getattr(getattr(RUN, section), name) for name in names}
        restored = dataclasses.replace(getattr(loaded, section), **same)
        loaded = dataclasses.replace(loaded, **{section: restored})
    assert loaded == RUN


def test_what_the_compiler_refuses_makes_room_for_the_next(compiler):
    first = search(RUN, MODEL, SLICE, compiled=False).best.run.train.remat
    compiler(lambda run: run.train.remat == first)
    found = search(RUN, MODEL, SLICE, top=2)
    refused = [one for one in found.tried if not one.compiled]
    assert refused
    assert all(one.reason.endswith("105G too much") for one in refused)
    assert found.best.run.train.remat != first
    assert found.tried[0] == found.best
    everything = compiler(lambda run: True)
    found = search(RUN, MODEL, SLICE, top=1)
    assert found.best is None
    assert len(everything.asked) <= 1 + search_module._REFUSALS + 1
    with pytest.raises(InputError, match="no candidate fits"):
        found.toml()


def test_without_a_compiler_the_arithmetic_decides(monkeypatch):
    def missing(*args, **kwargs):
        raise CompilerMissing("the TPU compiler is not installed: pip install libtpu")

    monkeypatch.setattr(search_module, "plan_compiled", missing)
    found = search(RUN, MODEL, SLICE)
    assert found.best.plan.source == "arithmetic"
    assert found.best.candidate == next(c for c in found.ranking.fastest if c.plan.memory.fits)
    assert "ranked by arithmetic alone" in found.notes[-1]
    assert search(RUN, MODEL, SLICE, compiled=False).best.candidate == found.best.candidate


def test_no_time_compiles_nothing(compiler):
    made = compiler()
    assert search(RUN, MODEL, SLICE, timeout=0).tried == ()
    assert made.asked == []


def test_a_run_whose_own_mesh_does_not_fit_is_searched_too(compiler):
    compiler()
    run = dataclasses.replace(RUN, mesh=MeshConfig(fsdp=64))
    found = search(run, MODEL, SLICE, top=1)
    assert found.given is None
    assert found.best.run.mesh.fsdp * found.best.run.mesh.tensor == 4


def test_a_batch_that_nothing_divides_is_one_line():
    train = dataclasses.replace(RUN.train, global_batch_size=3, gradient_accumulation_steps=1, seq_len=129)
    odd = MODEL.replace(num_attention_heads=3, num_key_value_heads=3, head_dim=128)
    with pytest.raises(ConfigError, match="no mesh of the 4 chips of v5p:2x2x1 divides"):
        search(dataclasses.replace(RUN, train=train), odd, SLICE)
