"""Training cost by sequence length and number of layers: `python -m benchmarks.train_scaling [--json]`.

Each row runs in its own process, which gives it its own memory peak. `--write` writes docs/scaling.md and
docs/scaling.png. Tokens per step are the same at every length, so only the cost of attention grows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 8192  # per step, at every length
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LAYERS = (2, 8, 32)
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
DOCS = Path(__file__).parents[1] / "docs"


def measure(length: int, layers: int, attention: str) -> dict[str, Any]:
    import jax
    import numpy as np

    from llama_jax.eval.throughput import peak_host_memory
    from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
    from llama_jax.train.optimizer import make_optimizer, make_schedule
    from llama_jax.train.state import create_state
    from llama_jax.train.step import build_step

    batch = max(TOKENS // length, 1)
    run = RunConfig(
        model=ModelConfig(vocab_size=8192, num_hidden_layers=layers, max_position_embeddings=length, **SHAPE),
        train=TrainConfig(global_batch_size=batch, seq_len=length, attention=attention),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    model = run.model.build()
    step, state, abstract, _ = build_step(run, model, None, "cpu")
    lowered = step.lower(state, abstract)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    current = create_state(model, make_optimizer(run.optimizer, make_schedule(run.optimizer, 100)), 0)
    ids = np.random.default_rng(0).integers(0, 8192, (batch, length), dtype=np.int32)
    rows = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    inputs = {"tokens": ids, "segment_ids": np.ones_like(ids), "positions": rows}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        current, _ = compiled(current, inputs)
        jax.block_until_ready(current)
        seconds.append(time.perf_counter() - start)
    return {
        "length": length,
        "layers": layers,
        "attention": attention,
        "batch": batch,
        "tokens_per_second": batch * length / min(seconds),
        "activation_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak_host_memory(),
        "compile_seconds": compile_seconds,
    }


def run_in_subprocess(*row: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_scaling", "--row", *map(str, row)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def draw(by_length: list[dict[str, Any]], by_layers: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    speed, memory, compile_time = figure.subplots(1, 3)
    for attention in ("blockwise", "xla"):
        rows = [row for row in by_length if row["attention"] == attention]
        lengths = [row["length"] for row in rows]
        speed.plot(lengths, [row["tokens_per_second"] for row in rows], "o-", label=attention)
        memory.plot(lengths, [row["activation_bytes"] / 1e9 for row in rows], "o-", label=attention)
    compile_time.plot(
        [row["layers"] for row in by_layers], [row["compile_seconds"] for row in by_layers], "o-", color="C2"
    )
    length: dict[str, Any] = {"xlabel": "sequence length", "xscale": "log"}
    speed.set(title="Speed", ylabel="tokens/s", **length)
    memory.set(title="Memory of temporaries", ylabel="GB", **length)
    compile_time.set(title="Compile time", xlabel="layers", ylabel="seconds")
    for axes in (speed, memory, compile_time):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # no point on the edge
    for axes in (speed, memory):
        axes.set_xticks(LENGTHS, LENGTHS)
        axes.minorticks_off()
        axes.legend()
    figure.savefig(DOCS / "scaling.png", dpi=130)


def write(by_length: list[dict[str, Any]], by_layers: list[dict[str, Any]]) -> None:
    draw(by_length, by_layers)
    lines = [
        "# How training cost grows",
        "",
        "`python -m benchmarks.train_scaling --write` generated this page from one run: two CPU cores,",
        f"bf16 products, full rematerialization, hidden size {SHAPE['hidden_size']}, {TOKENS} tokens per",
        f"step at every length (recorded {datetime.date.today()}, JAX {importlib.metadata.version('jax')}).",
        "Compare values within this page; absolute values depend on the machine.",
        "",
        "![tokens/s and memory by length, compile time by layers](scaling.png)",
        "",
        "With `blockwise` attention, memory depends on the number of tokens, not on the sequence length;",
        "`xla` attention materializes all scores of a layer and grows with the square of the length.",
        "Layers are scanned: compile time does not depend on their number.",
        "",
        "| sequence length | batch | attention | tokens/s | temporaries of the step | process peak |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['length']} | {row['batch']} | {row['attention']} | {row['tokens_per_second']:.0f} | "
        f"{row['activation_bytes'] / 1e9:.2f} GB | {row['peak_bytes'] / 1e9:.2f} GB |"
        for row in by_length
    ]
    lines += ["", "| layers | compile time | tokens/s | process peak |", "|---|---|---|---|"]
    lines += [
        f"| {row['layers']} | {row['compile_seconds']:.1f} s | {row['tokens_per_second']:.0f} | "
        f"{row['peak_bytes'] / 1e9:.2f} GB |"
        for row in by_layers
    ]
    (DOCS / "scaling.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and docs/scaling.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(int(args.row[0]), int(args.row[1]), args.row[2])))
        return
    by_length = [
        run_in_subprocess(length, 4, attention)
        for attention in ("blockwise", "xla")
        for length in LENGTHS
        if attention == "blockwise" or length <= 2048  # longer, the [T, T] scores would not fit in memory
    ]
    by_layers = [run_in_subprocess(512, layers, "blockwise") for layers in LAYERS]
    if args.json:
        print(json.dumps({"by_length": by_length, "by_layers": by_layers}, indent=1))
    for row in [] if args.json else [*by_length, *by_layers]:
        print(
            f"length {row['length']:5d}  layers {row['layers']:2d}  {row['attention']:9s} "
            f"{row['tokens_per_second']:7.0f} tokens/s  temporaries {row['activation_bytes'] / 1e9:5.2f} GB  "
            f"peak {row['peak_bytes'] / 1e9:5.2f} GB  compiled in {row['compile_seconds']:4.1f} s",
        )
    if args.write:
        write(by_length, by_layers)


if __name__ == "__main__":
    main()
