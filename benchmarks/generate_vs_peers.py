"""Decoding beside its peers: `python -m benchmarks.generate_vs_peers [--hf PYTHON] [--llama-cpp PYTHON]`.

SmolLM2-135M, the same dequantised weights on every side, greedy, no end token. Each side stays warm in its
own process on the same cores; within a round every call is made once, one side right after the other, so
that whatever the machine does meets all of them.
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
# An idle pool spins for some milliseconds after its last task; let it come to rest before the other's turn.
PAUSE_S = 0.3
# Load average above which the machine has something else to do.
BUSY = 0.5


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed: a task of a side, on so many rows of a prompt."""

    side: str
    task: str
    weights: str = "float32"
    batch: int = 1

    @property
    def tokens(self) -> np.ndarray:
        """int32 [B, T]: 18 tokens; 512 of prose to read; or prose twice over, which asks for a third time."""
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
        """The tokens that tokens/s is about: new ones, or read ones for `prefill`."""
        return self.tokens.size if self.task == "prefill" else self.batch * NEW_TOKENS

    def run(self, worker: Worker) -> tuple[float, np.ndarray]:
        settings = (self.weights,) if self.task == "prefill" else (NEW_TOKENS, self.weights)
        return worker.run("generate" if self.task == "copy" else self.task, self.tokens, *settings)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours beside theirs, each the fastest of its calls."""

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
    Comparison("8-bit weights, own f32", (Call("llama_jax", "generate", "int8"),), (_OURS,), goal=1.3),
    Comparison("4-bit weights, own f32", (Call("llama_jax", "generate", "int4"),), (_OURS,)),
    Comparison("4 beams, f32, HF", *_both(("beams", "float32", 1)), goal=1.5),
    Comparison(
        "prompt lookup on a copy, own greedy",
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
      only: what a comparison's name must hold.
      pythons: the interpreter of each side; without one for llama.cpp it is left out.
    """
    machine = _machine()  # before the workers start, for the load is to be the others'
    wanted = [
        c for c in COMPARISONS if only in c.name and ("llama_cpp" in pythons or "llama.cpp" not in c.name)
    ]
    calls = list(dict.fromkeys(call for c in wanted for call in (*c.ours, *c.theirs)))
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
    results = [_summary(comparison, first, seconds) for comparison in wanted]
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
    for column in ("ours beside", "weights"):
        table.add_column(column, no_wrap=True)
    for column in ("theirs tok/s", "ours tok/s", "ratio", "(range)", "goal", "first call", "same ids"):
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
    if load > BUSY:
        console.print(
            f"[bold]The machine was busy (load average {load:.1f}): these numbers say little,"
            "[/bold] for torch loses more than XLA when others want the cores."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times llama_jax beside its peers, and beside itself.")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's GGUF file (default: fetched)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each; the median counts")
    parser.add_argument("--cores", type=int, default=2, help="how many cores every side may use")
    parser.add_argument("--only", default="", help='what has these words in its name: "4 beams"')
    parser.add_argument("--hf", metavar="PYTHON", help="the Python that has transformers (default: this one)")
    parser.add_argument(
        "--llama-cpp", metavar="PYTHON", help="a Python that has llama-cpp-python; left out without it"
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
