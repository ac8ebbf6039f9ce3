"""The candidates of a search: everything that divides, pruned and ranked by arithmetic."""

from __future__ import annotations

import dataclasses
import math

from llama_jax.config import LlamaConfig
from llama_jax.plan.candidates import changes, meshes, rank, variants
from llama_jax.plan.estimate import estimate
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import SAVED, plan_memory
from llama_jax.plan.topology import Topology

MODEL = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=4,
)  # fmt: skip
GIVEN = StepInputs(
    MODEL, Topology.parse("v5p:2x2x2"), {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}, 48, 4096
)
REMATS = ("save_projections", "full")


def test_meshes_are_all_products_once():
    found = list(meshes(16))
    assert all(math.prod(mesh.values()) == 16 for mesh in found)
    assert len({tuple(mesh.values()) for mesh in found}) == len(found) == math.comb(4 + 3, 3)
    assert all(mesh["data"] % 2 == 0 for mesh in meshes(16, slices=2))


def test_variants_divide_and_keep_model_batch_and_length():
    found = list(variants(GIVEN, REMATS, (0,)))
    assert len(set(map(repr, found))) == len(found)
    for one in found:
        same = {"mesh": GIVEN.mesh, "remat": GIVEN.remat, "accumulation": GIVEN.accumulation}
        assert dataclasses.replace(one, **same) == GIVEN
        assert one.micro_rows * one.batch_shards * one.accumulation == 48
        assert MODEL.num_key_value_heads % one.mesh["tensor"] == 0
    # tensor 8 does not divide 4 key/value heads; all other sizes are there.
    assert {one.mesh["tensor"] for one in found} == {1, 2, 4}
    assert {one.accumulation for one in found if one.mesh["fsdp"] == 8} == {1, 2, 3, 6}


def test_the_ranking_fits_is_in_order_and_is_no_worse_than_what_was_given():
    ranking = rank(GIVEN, remats=REMATS)
    times = [one.plan.step_seconds for one in ranking.fastest]
    assert times == sorted(times)
    assert all(one.plan.memory.fits for one in ranking.fastest)
    assert 0 < ranking.too_large < ranking.considered
    assert times[0] <= estimate(GIVEN).step_seconds
    settings = [(tuple(one.inputs.mesh.values()), one.inputs.remat) for one in ranking.fastest]
    assert len(set(settings)) == len(settings)
    assert ranking.smallest is not None
    assert plan_memory(ranking.smallest).peak <= min(one.plan.memory.peak for one in ranking.fastest)


def test_less_memory_leaves_fewer_candidates_and_none_is_faster():
    all_of_it, half = rank(GIVEN, remats=REMATS), rank(GIVEN, remats=REMATS, capacity=40e9)
    assert half.considered == all_of_it.considered
    assert half.too_large > all_of_it.too_large
    assert half.fastest[0].plan.step_seconds >= all_of_it.fastest[0].plan.step_seconds
    nothing = rank(GIVEN, remats=REMATS, capacity=1e9)
    assert nothing.fastest == ()
    assert nothing.too_large == nothing.considered


def test_changes_name_what_was_searched():
    other = dataclasses.replace(GIVEN, remat="attention", accumulation=2)
    assert changes(GIVEN, other) == {"remat": ("full", "attention"), "accumulation": (1, 2)}
    assert set(REMATS) <= set(SAVED)
