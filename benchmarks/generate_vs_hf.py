"""Decode and prefill speed beside Hugging Face's: `python -m benchmarks.generate_vs_hf [--json]`.

SmolLM2-135M, the same dequantised weights on both sides, greedy, no end token. Each side stays warm in its
own process on the same cores; within a round every measurement is taken on one side and then at once on
the other, so that whatever the machine does meets both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.workers import DTYPES, SIDES, DType, Worker, pin
from llama_jax import known
from tests.golden import cases

NEW_TOKENS = 128
PREFILL_TOKENS = 512
# An idle pool spins for some milliseconds after its last task; let it come to rest before the other's turn.
PAUSE_S = 0.3
# Load average above which the machine has something else to do.
BUSY = 0.5


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is timed: `generate` of 128 tokens after an 18-token prompt, or `prefill` of 512 tokens."""

    task: str
    dtype: DType
    batch: int

    @property
    def tokens(self) -> np.ndarray:
        """int32 [B, T]: the prompt, the same in every row."""
        with np.load(cases.SMOLLM2) as golden:
            prompt, prose = (golden[name].astype(np.int32) for name in ("prompt_0", "prose"))
        row = prompt if self.task == "generate" else np.concatenate([prompt, prose])[:PREFILL_TOKENS]
        return np.broadcast_to(row, (self.batch, len(row)))

    @property
    def tokens_counted(self) -> int:
        """The tokens that tokens/s is about: new ones for `generate`, read ones for `prefill`."""
        return self.batch * NEW_TOKENS if self.task == "generate" else self.tokens.size

    def run(self, worker: Worker) -> tuple[float, np.ndarray]:
        settings = (NEW_TOKENS, self.dtype) if self.task == "generate" else (self.dtype,)
        return worker.run(self.task, self.tokens, *settings)


MEASUREMENTS = tuple(
    Measurement(task, dtype, batch)
    for dtype in DTYPES
    for task, batch in (("generate", 1), ("generate", 8), ("prefill", 1))
)


def measure(path: Path, rounds: int, only: str) -> dict[str, Any]:
    """Runs everything; returns the object that `--json` prints."""
    machine = _machine()  # before the workers start, for the load is to be the others'
    wanted = [m for m in MEASUREMENTS if only in f"{m.task} {m.dtype} {m.batch}"]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(side, path)) for side in SIDES]
        results = []
        for measurement in wanted:
            first = {worker.side: measurement.run(worker) for worker in workers}
            seconds: dict[str, list[float]] = {worker.side: [] for worker in workers}
            for _ in range(rounds):
                for worker in workers:
                    time.sleep(PAUSE_S)
                    seconds[worker.side].append(measurement.run(worker)[0])
            results.append(_summary(measurement, first, seconds))
        versions = {worker.side: worker.version for worker in workers}
    return {"machine": machine, "versions": versions, "rounds": rounds, "results": results}


def _summary(
    measurement: Measurement, first: dict[str, tuple[float, np.ndarray]], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    median = {side: statistics.median(times) for side, times in seconds.items()}
    ratios = [theirs / ours for theirs, ours in zip(seconds["hf"], seconds["llama_jax"], strict=True)]
    return dataclasses.asdict(measurement) | {
        "tokens_per_second": {side: measurement.tokens_counted / time for side, time in median.items()},
        "ratio": median["hf"] / median["llama_jax"],
        "ratio_range": [min(ratios), max(ratios)],
        "seconds": seconds,
        "first_call_seconds": {side: time for side, (time, _) in first.items()},
        "same_tokens": bool(np.array_equal(first["hf"][1], first["llama_jax"][1])),
    }


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "python": platform.python_version(), "load_average": os.getloadavg()[0]}


def _show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"SmolLM2-135M on {report['machine']['cpu']}, {report['machine']['cores']} cores")
    table.add_column("")
    table.add_column("dtype")
    for column in ("batch", "HF tok/s", "llama_jax tok/s", "ratio", "(range)", "first call", "same ids"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["results"]:
        speed, first = row["tokens_per_second"], row["first_call_seconds"]
        table.add_row(
            row["task"],
            row["dtype"],
            str(row["batch"]),
            f"{speed['hf']:.1f}",
            f"{speed['llama_jax']:.1f}",
            f"{row['ratio']:.2f}",
            "{:.2f}-{:.2f}".format(*row["ratio_range"]),
            f"{first['llama_jax']:.1f} s",
            "yes" if row["same_tokens"] else "no",
        )
    console.print(table)
    for version in report["versions"].values():
        console.print(version)
    load = report["machine"]["load_average"]
    if load > BUSY:
        console.print(
            f"[bold]The machine was busy (load average {load:.1f}): these numbers say little,"
            "[/bold] for torch loses more than XLA when others want the cores."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times llama_jax beside Hugging Face transformers.")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's GGUF file (default: fetched)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each; the median counts")
    parser.add_argument("--cores", type=int, default=2, help="how many cores both sides may use")
    parser.add_argument("--only", default="", help='measure what contains these words: "generate float32 8"')
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    used = pin(args.cores)
    report = measure(args.model or known.fetch("smollm2-135m"), args.rounds, args.only)
    report["machine"]["cores"] = len(used)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report, Console(width=120))


if __name__ == "__main__":
    main()
