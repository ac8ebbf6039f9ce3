"""Predicted beside published: the page shows the stored numbers, and every run is of a known slice."""

from __future__ import annotations

import json

import pytest

from benchmarks import published
from benchmarks.published_runs import PUBLISHED
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.topology import Topology


def test_the_page_shows_the_stored_numbers():
    stored = json.loads(published.STORED.read_text())
    assert stored and stored.keys() <= PUBLISHED.keys()
    assert published.table(stored) in published.PAGE.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_is_of_a_slice_that_is_known(name):
    run = PUBLISHED[name]
    topology = Topology.parse(run.topology)
    assert topology.kind in CHIPS and 0.3 < run.mfu < 0.8
    if not run.slice_name.startswith("v5p-"):  # MaxText orders the sides of others as `plan` does
        assert Topology.parse(run.slice_name).sides == topology.sides


def test_a_program_without_collectives_takes_its_cycles():
    """Two operations, one of them in a loop of three trips, on a chip of v5e at 1.5 GHz."""
    text = """
HloModule m

%c (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %n = f32[8] negate(%x)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8] get-tuple-element(%p), index=1
  %f = f32[8] fusion(%x), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"500000000"}
  ROOT %t = (s32[], f32[8]) tuple(%next, %f)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8]) tuple(%zero, %x)
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=1
}
"""
    about = {
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "vocab_size": 256,
        },
        "mesh": {"fsdp": 256},
        "places": [[0, i // 16, i % 16, 0, 0] for i in range(256)],
        "batch": 256,
        "length": 2048,
        "peak_bytes": 10**9,
        "maxtext": "0",
    }
    found = published.predict(PUBLISHED["16b-v5e-256"], text, about)
    assert found.compute_seconds == pytest.approx(1.0)
    assert found.exposed_seconds == 0
    assert found.peak_bytes == 10**9
