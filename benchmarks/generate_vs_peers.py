"""Decoding speed beside peers: `python -m benchmarks.generate_vs_peers [--hf PYTHON] [--llama-cpp PYTHON]`.

SmolLM2-135M, the same dequantized weights on every side, greedy, no end token. Each side stays warm in its
own process on the same cores; within a round every call is made once, one side after the other, so that
changes of the machine's speed affect all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.f32_gguf import write_f32
from benchmarks.workers import Worker, pin
from llama_jax.hub import known
from tests.golden import cases

NEW_TOKENS = 128
# Idle thread pools spin for some milliseconds after their last task; wait before the other side's turn.
PAUSE_S = 0.3
# Load average above which the machine is considered busy.
BUSY_LOAD = 0.5


@dataclasses.dataclass(frozen=True)
class Call:
    """A timed call: a task of a side, with a batch of one prompt."""

    side: str
    task: str
    weights: str = "float32"
    batch: int = 1

    @property
    def tokens(self) -> np.ndarray:
        """int32 [B, T]: 18 tokens; 512 tokens of prose for prefill; or prose repeated, for prompt lookup."""
        with np.load(cases.SMOLLM2) as golden:
            prompt, prose = (golden[name].astype(np.int32) for name in ("prompt_0", "prose"))
        row = {
            "prefill": np.concatenate([prompt, prose])[:512],
            "copy": np.tile(prose[:144], 2),
            "lookup": np.tile(prose[:144], 2),
        }.get(self.task, prompt)
        return np.broadcast_to(row, (self.batch, len(row)))

    @property
    def tokens_counted(self) -> int:
        """The tokens that tokens/s counts: new ones, or prompt tokens for `prefill`."""
        return self.tokens.size if self.task == "prefill" else self.batch * NEW_TOKENS

    def run(self, worker: Worker) -> tuple[float, np.ndarray]:
        settings = (self.weights,) if self.task == "prefill" else (NEW_TOKENS, self.weights)
        return worker.run("generate" if self.task == "copy" else self.task, self.tokens, *settings)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of our fastest call with the peer's fastest call."""

    name: str
    ours: tuple[Call, ...]
    theirs: tuple[Call, ...]
    goal: float | None = None


def _both(*calls: tuple[str, str, int]) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    ours = tuple(Call("llama_jax", *call) for call in calls)
    return ours, tuple(Call("hf", *call) for call in calls)


_OURS = Call("llama_jax", "generate")
COMPARISONS = (
    Comparison("batch 1, f32, HF", *_both(("generate", "float32", 1)), goal=1.4),
    Comparison("batch 1, f32, llama.cpp", (_OURS,), (Call("llama_cpp", "generate"),), goal=0.9),
    Comparison(
        "batch 8, faster dtype, HF",
        *_both(("generate", "float32", 8), ("generate", "bfloat16", 8)),
        goal=1.3,
    ),
    Comparison("batch 8, f32, HF", *_both(("generate", "float32", 8))),
    Comparison("batch 1, bf16, HF", *_both(("generate", "bfloat16", 1))),
    Comparison("8-bit weights, our f32", (Call("llama_jax", "generate", "int8"),), (_OURS,), goal=1.3),
    Comparison("4-bit weights, our f32", (Call("llama_jax", "generate", "int4"),), (_OURS,)),
    Comparison("4 beams, f32, HF", *_both(("beams", "float32", 1)), goal=1.5),
    Comparison(
        "prompt lookup on a copy, our greedy",
        (Call("llama_jax", "lookup"),),
        (Call("llama_jax", "copy"),),
        goal=1.5,
    ),
    Comparison("prefill of 512, f32, HF", *_both(("prefill", "float32", 1))),
    Comparison("prefill of 512, bf16, HF", *_both(("prefill", "bfloat16", 1))),
)


def measure(path: Path, rounds: int, only: str, pythons: dict[str, str]) -> dict[str, Any]:
    """Runs everything; returns the object that `--json` prints.

    Args:
      path: the model.
      rounds: timings of each call.
      only: substring of the comparisons to run.
      pythons: the interpreter of each side; without one for llama.cpp, that side is skipped.
    """
    machine = _machine()  # before the workers start, to measure the load of other processes
    selected = [
        c for c in COMPARISONS if only in c.name and ("llama_cpp" in pythons or "llama.cpp" not in c.name)
    ]
    calls = list(dict.fromkeys(call for c in selected for call in (*c.ours, *c.theirs)))
    with contextlib.ExitStack() as stack:
        workers = {}
        for side in dict.fromkeys(call.side for call in calls):
            weights = path
            if side == "llama_cpp":
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                weights = write_f32(path, Path(folder) / "f32.gguf")
            workers[side] = stack.enter_context(Worker(side, weights, pythons.get(side, sys.executable)))
        first = {call: call.run(workers[call.side]) for call in calls}
        seconds: dict[Call, list[float]] = {call: [] for call in calls}
        for _ in range(rounds):
            for call in calls:
                time.sleep(PAUSE_S)
                seconds[call].append(call.run(workers[call.side])[0])
        versions = [worker.version for worker in workers.values()]
    results = [_summary(comparison, first, seconds) for comparison in selected]
    return {"machine": machine, "versions": versions, "rounds": rounds, "results": results}


def _summary(
    comparison: Comparison, first: dict[Call, tuple[float, np.ndarray]], seconds: dict[Call, list[float]]
) -> dict[str, Any]:
    best = [
        min(calls, key=lambda call: statistics.median(seconds[call]))
        for calls in (comparison.ours, comparison.theirs)
    ]
    ours, theirs = best
    ratios = [their / our for our, their in zip(seconds[ours], seconds[theirs], strict=True)]
    return {
        "name": comparison.name,
        "weights": [call.weights for call in best],
        "tokens_per_second": [call.tokens_counted / statistics.median(seconds[call]) for call in best],
        "ratio": statistics.median(seconds[theirs]) / statistics.median(seconds[ours]),
        "ratio_range": [min(ratios), max(ratios)],
        "goal": comparison.goal,
        "seconds": [seconds[call] for call in best],
        "first_call_seconds": first[ours][0],
        "same_tokens": bool(np.array_equal(first[ours][1], first[theirs][1])),
    }


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "python": platform.python_version(), "load_average": os.getloadavg()[0]}


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"SmolLM2-135M on {report['machine']['cpu']}, {report['machine']['cores']} cores")
    for column in ("compared with", "weights"):
        table.add_column(column, no_wrap=True)
    for column in ("peer tok/s", "llama_jax tok/s", "ratio", "(range)", "goal", "first call", "same ids"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["results"]:
        ours, theirs = row["tokens_per_second"]
        table.add_row(
            row["name"],
            " / ".join(dict.fromkeys(row["weights"])),
            f"{theirs:.1f}",
            f"{ours:.1f}",
            f"{row['ratio']:.2f}",
            "{:.2f}-{:.2f}".format(*row["ratio_range"]),
            "" if row["goal"] is None else f"{row['goal']:.1f}",
            f"{row['first_call_seconds']:.1f} s",
            "yes" if row["same_tokens"] else "no",
        )
    console.print(table)
    for version in report["versions"]:
        console.print(version)
    load = report["machine"]["load_average"]
    if load > BUSY_LOAD:
        console.print(
            f"[bold]The machine was busy (load average {load:.1f}): these results are unreliable,"
            "[/bold] because torch slows down more than XLA when other processes compete for the cores."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the speed of llama_jax with its peers.")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's GGUF file (default: downloaded)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each call; the median counts")
    parser.add_argument("--cores", type=int, default=2, help="cores of each side")
    parser.add_argument(
        "--only", default="", help='only comparisons whose name contains this, such as "4 beams"'
    )
    parser.add_argument("--hf", metavar="PYTHON", help="a Python with transformers (default: this one)")
    parser.add_argument(
        "--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python; skipped without it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    used = pin(args.cores)
    pythons = {side: python for side, python in (("hf", args.hf), ("llama_cpp", args.llama_cpp)) if python}
    report = measure(args.model or known.fetch("smollm2-135m"), args.rounds, args.only, pythons)
    report["machine"]["cores"] = len(used)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report, Console(width=130))


if __name__ == "__main__":
    main()
