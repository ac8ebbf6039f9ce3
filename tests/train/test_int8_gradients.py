"""Gradients summed over slices in int8: what crosses them, losses, and the residual in checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.meshes import make_mesh
from llama_jax.plan import collectives, hlo
from llama_jax.sharding import use_mesh
from llama_jax.train.config.mesh import MeshConfig
from llama_jax.train.config.optimizer import OptimizerConfig
from llama_jax.train.feed import Feed
from llama_jax.train.restoring import restore_state
from llama_jax.train.state import TrainState, residual_parts, with_residual
from llama_jax.train.step import build_step
from llama_jax.weights.runs import StepMetadata
from tests.train.small_runs import checkpoints_of, same
from tests.train.test_step import (
    BATCH,
    LENGTH,
    MODEL,
    SLICES,
    changed,
    compiled,
    initial_state,
    on_two_slices,
    packed,
)

RUN = on_two_slices(1, gradient_dtype="int8")


def initial(spec: str = SLICES) -> TrainState:
    mesh = make_mesh(spec)
    return with_residual(initial_state(RUN, spec), mesh.shape["data"], mesh)


def train(state: TrainState, first: int, last: int, run: Any = RUN) -> tuple[TrainState, np.ndarray]:
    """The state after some steps, and their losses."""
    step, feed, losses = compiled(run, SLICES), Feed.for_mesh(make_mesh(SLICES), BATCH, LENGTH), []
    with use_mesh(make_mesh(SLICES)):
        for seed in range(first, last):
            state, metrics = step(state, feed.put(packed(seed)))
            losses.append(float(metrics.loss))
    return state, np.array(losses)


@functools.cache
def abstract(spec: str, run: Any = RUN) -> TrainState:
    with use_mesh(mesh := make_mesh(spec)):
        return build_step(run, MODEL, mesh, "cpu")[1]


def restored(folder: Any, spec: str, run: Any = RUN) -> TrainState:
    started = StepMetadata(**{field.name: None for field in dataclasses.fields(StepMetadata)})
    started = dataclasses.replace(started, run={})
    with checkpoints_of(folder) as checkpoints, use_mesh(mesh := make_mesh(spec)):
        found = restore_state(checkpoints, abstract(spec, run), OptimizerConfig(), mesh, started)
    assert found is not None
    return found.state


def test_only_int8_and_its_scales_cross_slices():
    text = compiled(RUN, SLICES).as_text()
    moved: dict[tuple[str, str], int] = collections.Counter()
    for one in collectives.find(hlo.parse(text)):
        if collectives.mesh_axes(one.groups, make_mesh(SLICES).shape) == ("data",):
            moved[one.kind] += one.bytes * one.times
    across = {kind: moved[kind] for kind in ("all-to-all", "all-gather")}
    # The loss and the number of tokens are summed in f32.
    assert moved.keys() <= {*across, "all-reduce"} and moved["all-reduce"] <= 8
    plain = compiled(on_two_slices(1), SLICES).as_text()
    sent = sum(
        one.bytes * one.times
        for one in collectives.find(hlo.parse(plain))
        if collectives.mesh_axes(one.groups, make_mesh(SLICES).shape) == ("data",)
    )
    # An all-reduce moves twice its bytes; of these small leaves many blocks are half empty.
    assert sum(across.values()) < 0.45 * 2 * sent
    kinds = set(re.findall(r"(\w+)\[[\d,]*\]\S* (all-to-all)\(", text))
    assert kinds == {("s8", "all-to-all"), ("f32", "all-to-all")}


def test_losses_are_those_of_gradients_in_f32():
    steps = 20
    _, narrow = train(initial(), 0, steps)
    _, wide = train(initial_state(RUN, SLICES), 0, steps, on_two_slices(1))
    assert wide[-1] < wide[0] - 1.5
    np.testing.assert_allclose(narrow, wide, atol=0.02)
    assert narrow[1:].tolist() != wide[1:].tolist()


def test_a_skipped_step_leaves_the_residual_as_it_was():
    state, _ = train(initial(), 0, 2)
    before = jax.device_get(state.residual)
    with use_mesh(make_mesh(SLICES)):
        broken = jax.tree.map(lambda x: x * np.nan, state.params["final_norm"])
        state = dataclasses.replace(state, params={**state.params, "final_norm": broken})
    state, _ = train(state, 2, 3)
    assert int(state.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, state.residual, before)


def test_a_run_resumes_bit_for_bit_and_on_another_number_of_slices(tmp_path):
    state, _ = train(initial(), 0, 3)
    with checkpoints_of(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
    residual = jax.device_get(state.residual)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(residual))
    expected, losses = train(state, 3, 5)
    again, found = train(restored(tmp_path, SLICES), 3, 5)
    assert same(again, expected) and (found == losses).all()

    for spec, parts in (("data=4,fsdp=2", 4), ("data=8", 8)):
        wider = (state := restored(tmp_path, spec)).residual
        assert residual_parts(state) == parts
        jax.tree.map(
            lambda new, old: np.testing.assert_allclose(
                np.asarray(new).sum(0), old.sum(0), rtol=1e-5, atol=1e-9
            ),
            wider,
            residual,
        )
    assert restored(tmp_path, SLICES, on_two_slices(1)).residual is None


def test_a_residual_begins_at_zero(tmp_path):
    with checkpoints_of(tmp_path) as checkpoints:
        checkpoints.save(1, initial_state(RUN, SLICES), {})
    state = restored(tmp_path, SLICES)
    assert residual_parts(state) == 2 and not any(np.any(leaf) for leaf in jax.tree.leaves(state.residual))


@pytest.mark.parametrize(("dtype", "spec"), [("int8", "fsdp=8"), ("bfloat16", None)])
def test_a_dtype_without_a_sum_over_data_is_one_line(dtype, spec):
    run, mesh = changed(RUN, mesh={"gradient_dtype": dtype}), spec and make_mesh(spec)
    with use_mesh(mesh), pytest.raises(ConfigError, match=r"and mesh\.data 1: there is no sum") as caught:
        build_step(run, MODEL, mesh, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"mesh\.gradient_dtype"):
        MeshConfig(gradient_dtype="fp8")  # type: ignore[arg-type]
