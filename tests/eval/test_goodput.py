"""The wall time of a run over all of its starts."""

from __future__ import annotations

import json

import pytest

from llama_jax.eval.goodput import GOODPUT_FILE, account, describe, read_goodput


def record(start, time, first, step, complete=False, **seconds):
    return {
        "start": start,
        "time": time,
        "first": first,
        "step": step,
        "seconds": seconds,
        "complete": complete,
    }


def test_a_run_of_one_start():
    goodput = account([record(0, 1, 0, 0, startup=1.0), record(0, 10, 0, 4, startup=2.0, steps=8.0)])
    assert goodput.total == 10 and goodput.starts == 1
    assert goodput.shares["steps"] == 0.8 and goodput.shares["startup"] == 0.2
    assert sum(goodput.shares.values()) == pytest.approx(1)


def test_repeated_steps_are_lost_and_the_time_between_starts_is_restart():
    """Killed after step 30, 20 s without a process, resumed after step 20."""
    records = [
        record(0, 12, 0, 10, startup=2.0, steps=10.0),
        record(0, 26, 0, 20, startup=2.0, steps=20.0, checkpoint=4.0),
        record(0, 36, 0, 30, startup=2.0, steps=30.0, checkpoint=4.0),
        record(56, 61, 20, 20, startup=3.0, compile=2.0),
        record(56, 81, 20, 40, startup=3.0, compile=2.0, steps=20.0),
    ]
    goodput = account(records)
    assert goodput.seconds == {
        "steps": 40.0,
        "lost": 10.0,
        "compile": 2.0,
        "data": 0.0,
        "evaluation": 0.0,
        "checkpoint": 4.0,
        "startup": 2.0,
        "restart": 23.0,
    }
    assert (goodput.total, goodput.starts, goodput.lost_steps) == (81, 2, 10)
    line = "goodput: 49.4% of 81 s were steps (2 starts, 10 steps repeated); restart 28.4%, lost"
    assert describe(goodput).startswith(line)


def test_a_step_that_two_starts_lost_is_lost_twice():
    """The third start finds its newest checkpoint damaged, and goes back before the second's."""
    records = [
        record(0, 10, 0, 10, steps=10.0),
        record(10, 20, 5, 15, steps=10.0),
        record(20, 40, 2, 22, steps=20.0),
    ]
    goodput = account(records)
    assert goodput.lost_steps == 8 + 10
    assert goodput.seconds["lost"] == pytest.approx(8 + 10)
    assert goodput.seconds["steps"] == pytest.approx(2 + 20)


def test_clocks_of_hosts_apart_and_a_run_that_was_complete():
    """The second start's host is 5 s behind; the third comes a day after the run was complete."""
    records = [
        record(100, 110, 0, 5, steps=10.0),
        record(105, 115, 5, 9, complete=True, steps=10.0),
        record(90_000, 90_010, 9, 12, steps=10.0),
    ]
    assert account(records).total == 30


def test_a_file_that_a_kill_cut_short(tmp_path):
    lines = [json.dumps(record(0, 10, 0, 4, steps=8.0, startup=2.0)), '{"start": 0, "time": 1', "7", ""]
    lines.append(json.dumps(record(0, 10, 0, 4, steps=float("inf"))))
    (tmp_path / GOODPUT_FILE).write_text("\n".join(lines))
    goodput = read_goodput(tmp_path)
    assert goodput is not None and goodput.total == 10
    assert read_goodput(tmp_path / "none") is None
