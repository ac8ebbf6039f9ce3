"""The compiled step under `tensor` and `context`: its collectives, the rows of its norms, its state."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
import pytest

from llama_jax.meshes import make_mesh
from llama_jax.plan import collectives, hlo
from llama_jax.sharding import use_mesh
from llama_jax.train.step import build_step
from tests.train.test_step import ALL_AXES, BATCH, LENGTH, MICROBATCHED, MODEL, changed, compiled

SIZES = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
# Of a device, in each of two microbatches: what stands between the products.
ROWS = BATCH // 2 // SIZES["fsdp"] * LENGTH // SIZES["context"]
ACTIVATIONS = 4 * ROWS * MODEL.hidden_size  # bytes, gathered over `tensor`


@pytest.fixture(scope="module")
def module() -> hlo.Module:
    """The program of test_step.py's microbatches."""
    return hlo.parse(compiled(changed(train=MICROBATCHED), ALL_AXES).as_text())


def bytes_over(module: hlo.Module, *axes: str) -> dict[str, list[tuple[int, int]]]:
    """By kind: bytes, and how often, of the collectives between devices that differ in these axes."""
    found = collections.defaultdict(list)
    for one in collectives.find(module):
        if one.groups and collectives.mesh_axes(one.groups, SIZES) == axes:
            found[one.kind].append((one.bytes, one.times))
    return found


def test_activations_are_gathered_and_scattered_over_tensor_and_never_all_reduced(module):
    """Of a layer: its norms' results in both passes, the cotangents of its sublayers; and what they give."""
    found = bytes_over(module, "tensor")
    layers, steps = MODEL.num_hidden_layers, 2  # microbatches
    total = {kind: sum(size * times for size, times in each) for kind, each in found.items()}
    # 4 of 16 rows of a device's chunked loss are padding: 4 / 3 rows in a chunk are 2.
    loss = ACTIVATIONS * 3 * 2 / 4
    leaving = 2 * ACTIVATIONS  # the zig-zag order of `context`, before the loss; and in the backward pass
    gathered = layers * (2 + 2 + 2) * ACTIVATIONS + ACTIVATIONS + loss + leaving
    # The output of attention is projected again in the backward pass.
    scattered = layers * (2 + 1 + 2) * ACTIVATIONS + ACTIVATIONS + loss
    assert total["all-gather"] == pytest.approx(steps * gathered, rel=0.02)
    assert total["reduce-scatter"] == pytest.approx(steps * scattered, rel=0.02)
    # One f32 for each position of a chunk of the loss: no activations.
    assert all(size <= 4 * 4 * ROWS for size, _ in found["all-reduce"])
    assert {*found} <= {"all-gather", "reduce-scatter", "all-reduce"}


def test_norms_are_computed_on_rows_that_context_and_tensor_divide(module):
    instructions = [one for block in module.computations.values() for one in block if one.opcode == "rsqrt"]
    sizes = {math.prod(dims) for one in instructions for _, dims in one.arrays}
    assert sizes == {ROWS // SIZES["tensor"]}


def test_parameters_are_gathered_and_their_gradients_scattered_over_fsdp_and_context(module):
    found = bytes_over(module, "fsdp", "context")
    assert found["all-gather"] and found["reduce-scatter"]
    for axis in ("fsdp", "context"):
        assert not bytes_over(module, axis)["reduce-scatter"]
    assert not bytes_over(module, "fsdp")["all-gather"]  # over `context` those of tokens


@pytest.mark.parametrize("spec", [ALL_AXES, "context=8", "fsdp=2,context=4"])
def test_state_is_divided_by_fsdp_context_and_tensor(spec):
    with use_mesh(mesh := make_mesh(spec)):
        state = build_step(changed(), MODEL, mesh, "cpu")[1]
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        shard: Any = math.prod(leaf.sharding.shard_shape(leaf.shape))
        is_matrix = leaf.size > MODEL.num_hidden_layers * MODEL.hidden_size
        assert shard * (8 if is_matrix else 1) == leaf.size, leaf
