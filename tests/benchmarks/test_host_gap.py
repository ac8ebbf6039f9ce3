"""The reader of traces that says whether a host keeps the devices waiting."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.host_gap import DISPATCH, is_late, summarize


def event(name: str, start: float, duration: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": duration, "args": arguments}


def trace(dispatched_at: list[float], gap: float = 100.0) -> list[dict[str, Any]]:
    """Four steps of 10 ms, in microseconds, and the calls that dispatched them, with one inside each."""
    events = []
    for run, call in enumerate(dispatched_at):
        start = run * (10_000 + gap)
        for name, offset, duration in (("fusion", 0, 6000), ("all-gather.5", 6000, 4000)):
            step = {"hlo_module": "jit_step", "hlo_op": name, "run_id": str(run)}
            events.append(event(name, start + offset, duration, **step))
        events += [event(DISPATCH, call, 50), event(DISPATCH, call + 10, 30)]
    return events


AHEAD = [-500.0, 500.0, 10_500.0, 20_500.0]  # each while the step before it runs


def test_steps_that_are_dispatched_ahead():
    result = summarize(trace(AHEAD))
    assert result["programs"] == {"jit_step": 4} and result["step_collectives"] == 4
    assert (result["steps"], result["dispatched"], result["dispatched_ahead"]) == (4, 4, 3)
    assert (result["step_ms"], result["median_gap_ms"], result["other_collectives"]) == (10.1, 0.1, {})
    assert not is_late(result)


def test_a_trace_that_begins_within_a_step():
    events = [each for each in trace(AHEAD) if each["name"] != DISPATCH or each["ts"] > 0]
    assert summarize(events)["dispatched_ahead"] == 3


@pytest.mark.parametrize("problem", ["late", "gap", "collective"])
def test_what_keeps_devices_waiting(problem):
    events = {
        "late": lambda: trace([-500.0, 10_050.0, 20_150.0, 30_250.0]),
        "gap": lambda: trace(AHEAD, gap=2000.0),
        "collective": lambda: [
            *trace(AHEAD),
            event("all-gather", 10_010, 20, hlo_module="jit_gather", hlo_op="all-gather.1", run_id="9"),
        ],
    }[problem]()
    assert is_late(summarize(events))
