"""Load time and peak host memory of SmolLM2-135M: `python -m benchmarks.load [--json]`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.hub import known

DTYPES = ("float32", "bfloat16")


def _load_here(path: Path, dtype: str) -> None:
    """In a fresh process: loads once, and prints seconds and memory."""
    import jax

    import llama_jax as lj

    jax.block_until_ready(jax.numpy.zeros(1))  # start the backend outside the timing
    before = peak_bytes()
    start = time.perf_counter()
    model = lj.load(path, dtype=dtype)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    result = {"seconds": seconds, "params_bytes": params, "before_bytes": before, "peak_bytes": peak_bytes()}
    print(json.dumps(result))


def peak_bytes() -> int:
    """The process's largest resident set so far."""
    # Not getrusage, whose maximum is inherited from the parent process.
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: /proc/self/status has no VmHWM line; this benchmark needs Linux")


def measure(path: Path, rounds: int) -> list[dict[str, Any]]:
    """One result per dtype: median seconds and maximum memory of `rounds` fresh processes."""
    results = []
    for dtype in DTYPES:
        command = [sys.executable, "-m", "benchmarks.load", "--here", dtype, "--model", str(path)]
        runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(rounds)]
        params = runs[0]["params_bytes"]
        peak = max(run["peak_bytes"] for run in runs)
        grown = max(run["peak_bytes"] - run["before_bytes"] for run in runs)
        results.append(
            {
                "dtype": dtype,
                "seconds": statistics.median(run["seconds"] for run in runs),
                "params_bytes": params,
                "peak_bytes": peak,
                "peak_over_params": peak / params,
                "load_bytes": grown,
                "load_over_params": grown / params,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how long loading takes, and how much memory.")
    parser.add_argument("--model", type=Path, help="a checkpoint (default: SmolLM2-135M, downloaded)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per dtype")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--here", metavar="DTYPE", help=argparse.SUPPRESS)  # for the fresh processes
    args = parser.parse_args()
    path = args.model or known.fetch("smollm2-135m")
    if args.here:
        _load_here(path, args.here)
        return
    results = measure(path, args.rounds)
    if args.json:
        print(json.dumps({"rounds": args.rounds, "results": results}, indent=1))
        return
    table = Table(title=f"Loading {path.name}")
    for column in ("dtype", "seconds", "parameters", "process peak", "ratio", "grown by loading", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row["dtype"],
            f"{row['seconds']:.2f}",
            f"{row['params_bytes'] / 1e6:.0f} MB",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['peak_over_params']:.2f}",
            f"{row['load_bytes'] / 1e6:.0f} MB",
            f"{row['load_over_params']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
