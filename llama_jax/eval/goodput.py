"""Goodput: what the wall time of a training run was spent on, over all of its starts.

The trainer appends records to RUN/goodput.jsonl; each says how far one start of the run has come and the
seconds that it has spent on each activity. Steps that a later start had to repeat are lost work, and the time
between two starts is counted too: the terms are those of Google's ML goodput measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import LlamaJaxError

GOODPUT_FILE = "goodput.jsonl"
# In this order they are shown; they exclude each other, and sum to the wall time.
ACTIVITIES = {
    "steps": "training steps that are part of the result",
    "lost": "steps that were repeated, as no checkpoint had them",
    "compile": "compiling the step",
    "data": "waiting for a batch while the devices were idle",
    "evaluation": "evaluating and sampling",
    "checkpoint": "waiting for checkpoints to be saved or restored",
    "startup": "the first start, without compiling",
    "restart": "the time between starts, and later starts without compiling and restoring",
}
MEASURED = ("steps", "compile", "data", "evaluation", "checkpoint", "startup")  # of one start


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The wall time of a run.

    Attributes:
      seconds: by activity.
      starts: how often the run was started.
      lost_steps: number of steps that were repeated.
    """

    seconds: Mapping[str, float]
    starts: int
    lost_steps: int

    @property
    def total(self) -> float:
        """Seconds from the first start to the last record."""
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of the wall time by activity."""
        return {name: value / self.total if self.total else 0.0 for name, value in self.seconds.items()}


def read_goodput(run: Path) -> Goodput | None:
    """The goodput of a run; None if it has no records."""
    records = read_records(run)
    return account(records) if records else None


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run, without those that a kill has cut short."""
    try:
        lines = (run / GOODPUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, LlamaJaxError):
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            records.append(_checked(json.loads(line)))
    return records


def account(records: Iterable[Mapping[str, Any]]) -> Goodput:
    """Adds up the records of a run.

    Args:
      records: in the order of writing. `start`, when the start began that it is of, in seconds since the
        epoch; `time`, that of the record; `first`, the step that the start resumed after; `step`, the last
        step done; `seconds` by activity since `start`; `complete`, whether the run had no steps left.
    """
    starts = [list(group) for _, group in itertools.groupby(records, key=lambda record: record["start"])]
    seconds = dict.fromkeys(ACTIVITIES, 0.0)
    lost_steps = 0
    for number, records_of_start in enumerate(starts):
        last, later = records_of_start[-1], starts[number + 1 :]
        for name in MEASURED:
            seconds["restart" if name == "startup" and number else name] += last["seconds"].get(name, 0.0)
        kept = min((other[0]["first"] for other in later), default=last["step"])
        if kept < last["step"]:
            lost = last["seconds"].get("steps", 0.0) - _step_seconds(records_of_start, kept)
            lost_steps += last["step"] - max(kept, last["first"])
            seconds["lost"] += lost
            seconds["steps"] -= lost
        if later and not last.get("complete"):  # of a complete run no time passes, until it gets more steps
            seconds["restart"] += max(0.0, later[0][0]["start"] - last["time"])  # clocks may differ
    return Goodput(seconds, len(starts), lost_steps)


def _step_seconds(records: Sequence[Mapping[str, Any]], step: int) -> float:
    """The seconds of a start's steps up to this one, interpolated between records."""
    before_step, before = records[0]["first"], 0.0
    for record in records:
        now = record["seconds"].get("steps", 0.0)
        if record["step"] >= step:
            if record["step"] == before_step:
                return now if step >= before_step else 0.0
            share = max(0.0, (step - before_step) / (record["step"] - before_step))
            return before + share * (now - before)
        before_step, before = record["step"], now
    return before


def _checked(record: Any) -> dict[str, Any]:
    """A record with numbers where numbers belong; raises what it likes for another."""
    for name in ("start", "time"):
        if not math.isfinite(record[name]):
            raise ValueError(name)
    steps = {name: int(record[name]) for name in ("first", "step")}
    seconds = {name: float(value) for name, value in record["seconds"].items()}
    if not all(0 <= value < math.inf for value in seconds.values()):
        raise ValueError("seconds")
    return {**record, **steps, "seconds": seconds}


def describe(goodput: Goodput) -> str:
    """One line: the share of steps, and what the rest was spent on, the largest first."""
    shares = goodput.shares
    rest = sorted(((share, name) for name, share in shares.items() if name != "steps"), reverse=True)
    parts = ", ".join(f"{name} {share:.1%}" for share, name in rest if share >= 0.0005)
    starts = f"{goodput.starts} start{'s' * (goodput.starts != 1)}"
    repeated = f", {goodput.lost_steps} steps repeated" if goodput.lost_steps else ""
    line = f"goodput: {shares['steps']:.1%} of {_duration(goodput.total)} were steps ({starts}{repeated})"
    return f"{line}; {parts}" if parts else line


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
