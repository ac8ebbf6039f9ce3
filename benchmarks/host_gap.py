"""Whether the host keeps the devices waiting between steps: `python -m benchmarks.host_gap [--json]`.

Trains a small model in several processes on this machine, over gloo, and reads what ran from profiler traces:
the programs, the collectives that are not of the step, how many steps were dispatched before the one
before them had ended, and the gaps from the last operation of a step to the first of the next. Exits with 1
if there is such a collective, a step that was not dispatched ahead, or a median gap above 1 ms. Run it on
an idle machine: a thread that waits for a core is a gap too.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STEPS, TRACE_AT, TRACED = 45, 12, 25
LOG_EVERY = 5  # a record of metrics within the trace must not make the devices wait either
LIMIT_MS = 1.0
COLLECTIVE = re.compile(r"all-(gather|reduce|to-all)|reduce-scatter|collective-permute|collective-broadcast")
DISPATCH = "PjitFunction(jit(step))"  # a call of the compiled step; it has another event of this name in it

CONFIG = """\
[model]
hidden_size = {width}
intermediate_size = {feed_forward}
num_hidden_layers = 4
num_attention_heads = 4
max_position_embeddings = 128
[tokenizer]
vocab_size = 320
[data]
files = "{files}"
validation_fraction = 0.0
[train]
run_dir = "{run_dir}"
steps = {steps}
global_batch_size = 8
seq_len = 128
dtype = "float32"
remat = "none"
profile_at = {at}
profile_steps = {traced}
[mesh]
fsdp = {processes}
data = 1
[eval]
every = 0
max_new_tokens = 0
[checkpoint]
every = 0
[log]
every = {log_every}
tensorboard = false
plot = false
[distributed]
coordinator = "{address}"
num_processes = {processes}
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=256, help="of the model: the length of a step")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        return train(args.folder, args.process)
    with tempfile.TemporaryDirectory() as folder:
        run_all(Path(folder), args.processes, args.width)
        results = [read_trace(Path(folder) / f"trace_{i}") for i in range(args.processes)]
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        for index, result in enumerate(results):
            print(f"process {index}: {result}")
    return int(any(is_late(result) for result in results))


def is_late(result: dict[str, Any]) -> bool:
    """Whether the devices of a process have waited for a host."""
    late = result["dispatched_ahead"] < result["dispatched"] - 1 or result["median_gap_ms"] >= LIMIT_MS
    return bool(result["other_collectives"]) or late


def run_all(folder: Path, processes: int, width: int) -> None:
    """Trains, each process writing its trace to its own directory."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    sentences = (
        f"the cat number {i} sat on mat {i * 7 % 101} and ran after {i % 13} rats" for i in range(4000)
    )
    (folder / "text.txt").write_text(".\n".join(sentences))
    config = CONFIG.format(
        width=width,
        feed_forward=width * 8 // 3 // 8 * 8,
        files=folder / "text.txt",
        run_dir=folder / "run",
        steps=STEPS,
        at=TRACE_AT,
        traced=TRACED,
        log_every=LOG_EVERY,
        address=address,
        processes=processes,
    )
    (folder / "run.toml").write_text(config)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, "-m", "benchmarks.host_gap", "--folder", str(folder), "--process"]
    started = [
        subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for index in range(processes)
    ]
    for process in started:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"a process ended with {process.returncode}:\n{errors[-2000:]}")


def train(folder: Path, index: int) -> int:
    """One of the processes: the trainer as it is, but for where its trace goes."""
    import jax

    from llama_jax.train.config.read import load_config
    from llama_jax.train.launch import train as train_run

    start_trace = jax.profiler.start_trace

    def start_own_trace(_: str) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the host down
        start_trace(str(folder / f"trace_{index}"), profiler_options=options)

    jax.profiler.start_trace = start_own_trace
    return train_run(load_config(folder / "run.toml", ["--distributed.process_id", str(index)]))


def read_trace(folder: Path) -> dict[str, Any]:
    """What ran on the devices of one process, from a directory that holds its trace."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        return summarize(json.load(file)["traceEvents"])


def summarize(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ran on the devices of one process, from the events of a trace (times in microseconds)."""
    programs: Counter[str] = Counter()
    collectives: Counter[str] = Counter()
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    dispatches = []
    for event in events:
        if event.get("ph") != "X":
            continue
        start, args = event["ts"], event.get("args", {})
        end = start + event.get("dur", 0)
        if event["name"] == DISPATCH:
            dispatches.append((start, end))
        if "hlo_module" not in args:
            continue
        program = args["hlo_module"]
        if COLLECTIVE.match(args["hlo_op"]):
            collectives[program] += 1
        key = (program, args["run_id"])
        programs[program] += key not in spans
        first, last = spans.get(key, (start, end))
        spans[key] = (min(first, start), max(last, end))
    steps = sorted(span for (program, _), span in spans.items() if program == "jit_step")
    pairs = list(itertools.pairwise(steps))
    gaps = [(after[0] - before[1]) / 1000 for before, after in pairs]
    # From the last on: steps that were running when the trace began were dispatched before it.
    calls = _outermost(dispatches)[::-1]
    ahead = sum(call < before[1] for (before, _), call in zip(pairs[::-1], calls, strict=False))
    return {
        "programs": dict(programs),
        "step_collectives": collectives.pop("jit_step", 0),
        "other_collectives": dict(collectives),
        "steps": len(steps),
        "dispatched": len(calls),
        "dispatched_ahead": ahead,
        "step_ms": round(statistics.median(after[0] - before[0] for before, after in pairs) / 1000, 2),
        "median_gap_ms": round(statistics.median(gaps), 3),
        "largest_gap_ms": round(max(gaps), 3),
    }


def _outermost(spans: Sequence[tuple[float, float]]) -> list[float]:
    """The starts of the spans that are not within another, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if not found or start >= found[-1][1]:
            found.append((start, end))
    return [start for start, _ in found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
