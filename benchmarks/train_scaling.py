"""How training's cost grows with sequence length and layers: `python -m benchmarks.train_scaling [--json]`.

One row a process, so that each has its own peak of memory. Writes docs/scaling.md and docs/scaling.png with
`--write`. Tokens a step stay the same along the length, so that what grows is attention's own cost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 8192  # a step, whatever the length
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


def apart(*row: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_scaling", "--row", *map(str, row)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write(by_length: list[dict[str, Any]], by_layers: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    speed, memory, compiling = figure.subplots(1, 3)
    for attention in ("blockwise", "xla"):
        rows = [row for row in by_length if row["attention"] == attention]
        lengths = [row["length"] for row in rows]
        speed.plot(lengths, [row["tokens_per_second"] for row in rows], "o-", label=attention)
        memory.plot(lengths, [row["activation_bytes"] / 1e9 for row in rows], "o-", label=attention)
    compiling.plot(
        [row["layers"] for row in by_layers], [row["compile_seconds"] for row in by_layers], "o-", color="C2"
    )
    speed.set(xlabel="sequence length", ylabel="tokens/s", xscale="log", ylim=(0, None))
    memory.set(xlabel="sequence length", ylabel="temporaries, GB", xscale="log", ylim=(0, None))
    compiling.set(xlabel="layers", ylabel="compile time, s", ylim=(0, None))
    for axes in (speed, memory):
        axes.set_xticks(LENGTHS, LENGTHS)
        axes.minorticks_off()
        axes.legend()
    figure.savefig(DOCS / "scaling.png", dpi=130)
    lines = [
        "# How the cost of training grows",
        "",
        "`python -m benchmarks.train_scaling --write` made this page: one run, two CPU cores, bf16 products,",
        f"full rematerialisation, {SHAPE['hidden_size']} wide, {TOKENS} tokens a step at every length.",
        "Compare within the page; absolute numbers are the machine's.",
        "",
        "![tokens/s and memory by length, compile time by layers](scaling.png)",
        "",
        "With `blockwise` attention memory is that of the tokens, whatever the length of their rows; `xla`,",
        "which forms all scores of a layer, grows with the square. Layers are scanned: more of them cost no",
        "compile time.",
        "",
        "| sequence length | batch | attention | tokens/s | temporaries of the step | peak of the process |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['length']} | {row['batch']} | {row['attention']} | {row['tokens_per_second']:.0f} | "
        f"{row['activation_bytes'] / 1e9:.2f} GB | {row['peak_bytes'] / 1e9:.2f} GB |"
        for row in by_length
    ]
    lines += ["", "| layers | compile time | tokens/s | peak of the process |", "|---|---|---|---|"]
    lines += [
        f"| {row['layers']} | {row['compile_seconds']:.1f} s | {row['tokens_per_second']:.0f} | "
        f"{row['peak_bytes'] / 1e9:.2f} GB |"
        for row in by_layers
    ]
    (DOCS / "scaling.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/scaling.md and its picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(int(args.row[0]), int(args.row[1]), args.row[2])))
        return
    by_length = [
        apart(length, 4, attention)
        for attention in ("blockwise", "xla")
        for length in LENGTHS
        if attention == "blockwise" or length <= 2048  # its scores would soon be all there is
    ]
    by_layers = [apart(512, layers, "blockwise") for layers in LAYERS]
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
