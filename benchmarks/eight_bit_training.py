"""Held-out loss after training in eight bits: `python -m benchmarks.eight_bit_training [--out FILE]`.

A small Llama is trained on Python's standard library once for each dtype of its products, from the same
weights and on the same batches. The held-out loss is that of the trained weights with products in the compute
dtype, as the model is used afterwards. The goal: within 0.5% of the loss without quantization.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

GOAL_PERCENT = 0.5
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"train.quantization": "int8"},
    "fp8": {"train.quantization": "fp8"},
    "int8, stochastic rounding": {"train.quantization": "int8", "train.stochastic_rounding": True},
}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def train(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Trains one variant with the shipped `tiny_cpu` in a smaller size."""
    settings: dict[str, Any] = {f"model.{key}": value for key, value in MODEL.items()}
    settings |= {
        "tokenizer.vocab_size": 2048,
        "train.run_dir": folder / name.replace(", ", "_").replace(" ", "_"),
        "train.steps": steps,
        "train.global_batch_size": 8,
        "train.seq_len": 128,
        "optimizer.schedule_steps": steps,
        "optimizer.warmup_steps": min(50, steps // 2),
        "checkpoint.every": steps,
        "eval.every": steps,
        "eval.batches": 50,
        "eval.max_new_tokens": 0,
        "log.every": max(1, steps // 100),
        "log.tensorboard": False,
        "log.plot": False,
    }
    flags = [f"--{key}={_text(value)}" for key, value in (settings | VARIANTS[name]).items()]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llama_jax.train", "configs/tiny_cpu.toml", *flags], check=True)
    evaluations = (settings["train.run_dir"] / "evaluations.jsonl").read_text().splitlines()
    held_out = [json.loads(line)["eval_loss"] for line in evaluations]
    return {"name": name, "held_out_loss": held_out[-1], "seconds": round(time.perf_counter() - start)}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss after training in eight bits, on this CPU.")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run (default: 1000)")
    parser.add_argument("--out", type=Path, help="write results to this JSON file; those in it are kept")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    settings = {"jax": jax.__version__, "machine": platform.machine(), "steps": args.steps, "model": MODEL}
    if args.out is not None and args.out.exists():
        stored = json.loads(args.out.read_text())
        rows = stored["results"] if settings.items() <= stored.items() else []
    for name in list(VARIANTS)[len(rows) :]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(train(name, args.steps, Path(folder)))
        rows[-1]["above_percent"] = 100 * (rows[-1]["held_out_loss"] / rows[0]["held_out_loss"] - 1)
        if args.out is not None:
            result = {"date": time.strftime("%Y-%m-%d"), **settings, "goal_percent": GOAL_PERCENT}
            args.out.write_text(json.dumps(result | {"results": rows}, indent=1) + "\n")
    table = Table(title=f"{args.steps} steps")
    for column in ("train.quantization", "held-out loss", "above none", "goal"):
        table.add_column(column, justify="left" if "train" in column else "right")
    for row in rows:
        goal = "" if row["name"] == "none" else f"{GOAL_PERCENT}%"
        table.add_row(row["name"], f"{row['held_out_loss']:.4f}", f"{row['above_percent']:+.2f}%", goal)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
