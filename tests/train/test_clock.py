"""What a start of a run spends its time on, and its watchdog."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time

import pytest

from llama_jax.eval.goodput import GOODPUT_FILE
from llama_jax.train.config.distributed import DistributedConfig
from llama_jax.train.metrics.clock import Clock, GoodputRecords
from llama_jax.train.watchdog import STACKS, Watchdog


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])

    def move(by: float) -> None:
        now[0] += by

    return move


def test_every_second_is_spent_on_one_activity(seconds, tmp_path):
    clock = Clock()
    seconds(1)
    with clock.spend("compile"):
        seconds(2)
        with clock.spend("evaluation"):
            seconds(4)
        seconds(8)
    clock.switch("steps")
    seconds(16)
    clock.reassign(5, source="steps", target="data")
    expected = {"steps": 11, "compile": 10, "data": 5, "evaluation": 4, "checkpoint": 0, "startup": 1}
    assert clock.seconds() == expected and sum(expected.values()) == 31
    with GoodputRecords(tmp_path, clock, first=3, is_primary=True) as records:
        records.finish(7, complete=True)
        seconds(100)  # not of the run
        goodput = records.goodput()
    assert goodput is not None and goodput.total == 31
    lines = (tmp_path / GOODPUT_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 7]


def test_what_ends_a_start_does_not_lose_its_time(seconds, tmp_path):
    clock = Clock()
    clock.switch("steps")
    records = GoodputRecords(tmp_path, clock, first=0, is_primary=True)
    with contextlib.suppress(KeyboardInterrupt), records:
        seconds(10)
        records.write(5)
        seconds(3)
        raise KeyboardInterrupt
    last = json.loads((tmp_path / GOODPUT_FILE).read_text().splitlines()[-1])
    assert (last["step"], last["seconds"]["steps"]) == (5, 13)


def test_other_processes_write_nothing(tmp_path):
    with GoodputRecords(tmp_path, Clock(), first=0, is_primary=False) as records:
        records.write(1)
        assert records.goodput() is None
    assert not list(tmp_path.iterdir())


CONFIG = DistributedConfig(hang_steps=10, hang_seconds=30, hang_other_seconds=1000)


@pytest.mark.parametrize(
    ("activity", "step_seconds", "bound"),
    [
        ("steps", 1, 30),  # not before hang_seconds
        ("steps", 8, 80),  # ten median steps
        ("steps", None, 1000),  # the first step
        ("compile", 1, 1000),
        ("evaluation", 1, 1000),
        ("checkpoint", 8, 1000),
    ],
)
def test_what_counts_as_a_hang(seconds, tmp_path, activity, step_seconds, bound):
    clock = Clock()
    clock.switch("steps")
    for _ in range(5) if step_seconds else ():
        seconds(step_seconds)
        clock.progress()
    clock.switch(activity)
    watchdog = Watchdog(clock, CONFIG, tmp_path)
    seconds(bound)
    assert watchdog.hang() is None
    seconds(1)
    assert f"for {bound + 1} s" in (watchdog.hang() or "")
    clock.progress()
    assert watchdog.hang() is None


def test_the_stacks_of_all_threads_are_written(tmp_path):
    clock = Clock()
    clock.waiting_for = "waiting for a batch"
    Watchdog(clock, CONFIG, tmp_path).dump("no step has ended")
    text = (tmp_path / STACKS / "process_0.txt").read_text()
    assert "waiting for a batch; no step has ended" in text
    assert "Thread 0x" in text and "test_the_stacks_of_all_threads_are_written" in text


def test_a_process_that_was_stopped_itself_does_not_count_that_time(seconds, monkeypatch, tmp_path):
    """As by Ctrl-Z and fg: the time between two ticks of the watchdog is no hang."""
    watchdog = Watchdog(Clock(), dataclasses.replace(CONFIG, hang_other_seconds=100), tmp_path)
    ticks = iter([0.5, 5000.0, 0.5])

    def wait(_: float) -> bool:
        tick = next(ticks, None)
        seconds(tick or 0)
        return tick is None

    monkeypatch.setattr(watchdog._stopped, "wait", wait)
    monkeypatch.setattr(watchdog, "dump", pytest.fail)
    watchdog._watch()
    assert watchdog.hang() is None
