"""What to change where a step does not fit."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from llama_jax.model import Remat
from llama_jax.model_sizes import presets
from llama_jax.plan.alternatives import alternatives
from llama_jax.plan.estimate import estimate
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import SAVED
from llama_jax.plan.topology import Topology

MESH = {"data": 1, "fsdp": 64, "context": 1, "tensor": 1}
INPUTS = StepInputs(
    presets.LLAMA2_70B, Topology.parse("v5p-128"), MESH, global_batch_size=256, seq_len=4096, remat="none"
)


def test_they_fit_and_the_fastest_is_first():
    capacity = 90e9
    assert estimate(INPUTS).memory.peak > capacity
    found = alternatives(INPUTS, capacity)
    assert 0 < len(found) <= 5
    assert all(plan.memory.peak <= capacity for _, plan in found)
    seconds = [plan.step_seconds for _, plan in found]
    assert seconds == sorted(seconds)
    assert any("--train.remat" in change for change, _ in found)


def test_two_changes_are_tried_where_one_is_not_enough():
    least = min(estimate(dataclasses.replace(INPUTS, remat=remat)).memory.peak for remat in SAVED)
    found = alternatives(INPUTS, 0.8 * least)
    assert found
    assert all(len(change.split(" --")) >= 2 for change, _ in found)


def test_nothing_fits_a_slice_that_is_too_small():
    small = dataclasses.replace(INPUTS, topology=Topology.parse("v5e:2x4"), mesh={**MESH, "fsdp": 8})
    assert alternatives(small, 16e9) == []


@pytest.mark.parametrize("remat", SAVED)
def test_every_policy_can_be_set(remat):
    assert remat in get_args(Remat)
