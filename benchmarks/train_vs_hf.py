"""Training speed beside Hugging Face and a plain JAX step: `python -m benchmarks.train_vs_hf [--json]`.

134.5M parameters (SmolLM2's shape), batch 4 x 512, AdamW on f32 parameters with bf16 products, gradients
clipped to norm 1. Each side stays warm in its own process on the same cores; a round takes one step of each,
one after the other. Run it in an environment with the `parity` extra, and nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.workers import pin
from llama_jax.eval.throughput import peak_host_memory
from llama_jax.model_sizes import SMOLLM2_135M as CONFIG

BATCH, LENGTH = 4, 512
PAUSE_S = 0.5  # idle thread pools spin for some milliseconds after their last task
GOALS = {"hf": 0.75, "naive": 2.2}


def tokens_of(step: int) -> np.ndarray:
    """int32 [BATCH, LENGTH], the same on every side."""
    return np.random.default_rng(step).integers(0, CONFIG.vocab_size, (BATCH, LENGTH), dtype=np.int32)


def hf() -> Callable[[np.ndarray], float]:
    """transformers, eager, bf16 autocast, as usual on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "vocab_size", "tie_word_embeddings")
    model = LlamaForCausalLM(LlamaConfig(**{name: getattr(CONFIG, name) for name in names})).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)

    def step(tokens: np.ndarray) -> float:
        ids = torch.tensor(tokens, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def naive() -> Callable[[np.ndarray], float]:
    """`naive_train.py`."""
    import jax
    import optax

    import llama_jax as lj
    from benchmarks import naive_train

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1)
    )
    params = lj.init(CONFIG, jax.random.key(0))
    state = [params, optimizer.init(params)]
    compiled = naive_train.make_step(CONFIG, optimizer)

    def step(tokens: np.ndarray) -> float:
        state[0], state[1], loss = compiled(*state, tokens)
        jax.block_until_ready(state)
        return float(loss)

    return step


def llama_jax() -> Callable[[np.ndarray], float]:
    """The trainer's step with its default settings."""
    import jax

    from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
    from llama_jax.train.optimizer import make_optimizer, make_schedule
    from llama_jax.train.state import create_state
    from llama_jax.train.step import build_step

    run = RunConfig(
        model=ModelConfig(preset="smollm2_135m"),
        train=TrainConfig(
            global_batch_size=BATCH, seq_len=LENGTH, **json.loads(os.environ.get("TRAIN", "{}"))
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0),
    )
    compiled, *_ = build_step(run, CONFIG, None, "cpu")
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
    state = [create_state(CONFIG, optimizer, 0)]
    rows = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))

    def step(tokens: np.ndarray) -> float:
        batch = {"tokens": tokens, "segment_ids": np.ones_like(rows), "positions": rows}
        state[0], metrics = compiled(state[0], batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step


SIDES = {"hf": hf, "naive": naive, "llama_jax": llama_jax}


class Side:
    """One side in its own process, which the context manager ends."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.train_vs_hf", "--side", name]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, number: int) -> dict[str, float]:
        """Runs a step; returns seconds, loss, and the process's peak memory in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(number, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.name} side ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def serve(name: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    step = SIDES[name]()
    for line in sys.stdin:
        tokens = tokens_of(int(line))
        start = time.perf_counter()
        loss = step(tokens)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "loss": loss, "peak_bytes": peak_host_memory()}
        print(json.dumps(answer), file=answers, flush=True)


def measure(rounds: int, names: list[str]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(Side(name)) for name in names]
        steps: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for number in range(rounds + 1):  # the first step compiles, and warms torch's allocator
            for side in sides:
                time.sleep(PAUSE_S)
                steps[side.name].append(side.step(number))
    timed = {name: [step["seconds"] for step in taken[1:]] for name, taken in steps.items()}
    rows = {}
    for name, seconds in timed.items():
        rows[name] = {
            "tokens_per_second": BATCH * LENGTH / statistics.median(seconds),
            "peak_bytes": steps[name][-1]["peak_bytes"],
            "first_step_seconds": steps[name][0]["seconds"],
            "losses": [step["loss"] for step in steps[name]],
        }
        if "llama_jax" in timed:
            ratios = [a / b for a, b in zip(seconds, timed["llama_jax"], strict=True)]
            rows[name] |= {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
    return {"load_average": load, "rounds": rounds, "sides": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--cores", type=int, default=2, help="cores of each side")
    parser.add_argument("--only", default="hf,naive,llama_jax", help="sides to run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args.side)
        return
    pin(args.cores)
    report = measure(args.rounds, args.only.split(","))
    if args.json:
        print(json.dumps(report, indent=1))
        return
    table = Table(title=f"134.5M parameters, batch {BATCH} x {LENGTH}, {args.cores} cores")
    for column in ("", "tokens/s", "llama_jax is faster by", "(range)", "goal", "peak memory", "first step"):
        table.add_column(column, justify="right")
    for name, row in report["sides"].items():
        ratio = row.get("ratio", float("nan"))
        table.add_row(
            name,
            f"{row['tokens_per_second']:.0f}",
            f"{ratio:.2f}",
            "{:.2f}-{:.2f}".format(*row.get("range", (ratio, ratio))),
            str(GOALS.get(name, "")),
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['first_step_seconds']:.1f} s",
        )
    Console(width=110).print(table, f"load average before: {report['load_average']:.1f}")


if __name__ == "__main__":
    main()
