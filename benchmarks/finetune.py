"""Finetunes SmolLM2-135M on the generated tasks: `python -m benchmarks.finetune [NAMES] [--steps N]`.

Each run has its own process, one after another, on the same batches: all weights, LoRA, QLoRA, bottlenecks
and a prefix on `extract`; DPO with LoRA on `manner`, with the reference model in each step or precomputed. It
reports the accuracy on validation prompts before and after, the cost of training, and, with `--text`, the
perplexity of ordinary text before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.tasks import write

MODEL = "smollm2-135m"
CONFIG = """\
[model]
init_from = "smollm2-135m"
[tokenizer]
path = "smollm2-135m"
[data]
files = "{train}"
validation_files = "{test}"
[train]
objective = "{objective}"
run_dir = "{run_dir}"
steps = {steps}
global_batch_size = 4
seq_len = 256
loss_chunks = 4
[optimizer]
learning_rate = {rate}
warmup_steps = 3
weight_decay = 0.0
b2 = 0.999
[adapter]
{adapter}
[checkpoint]
every = 0
[eval]
every = 1000
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""
# Task, objective, learning rate, and lines of the [adapter] section.
RUNS = {
    "full": ("extract", "sft", 5e-5, ""),
    "lora": ("extract", "sft", 1e-3, 'type = "lora"'),
    "qlora": ("extract", "sft", 1e-3, 'type = "lora"\nbase = "nf4"'),
    "bottleneck": ("extract", "sft", 3e-4, 'type = "bottleneck"'),
    "prefix": ("extract", "sft", 2e-2, 'type = "prefix"'),
    "dpo": ("manner", "dpo", 5e-5, 'type = "lora"'),
    "dpo-precomputed": (
        "manner",
        "dpo",
        5e-5,
        'type = "lora"\n[preference]\nprecompute_ref_log_probs = true',
    ),
}


def train(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Runs one finetuning; returns its cost, its last evaluation and its run directory."""
    task, objective, rate, adapter = RUNS[name]
    run_dir, config = folder / name, folder / f"{name}.toml"
    config.write_text(
        CONFIG.format(
            train=folder / f"{task}_train.jsonl",
            test=folder / f"{task}_test.jsonl",
            objective=objective,
            run_dir=run_dir,
            steps=steps,
            rate=rate,
            adapter=adapter,
        )
    )
    code = (
        "import resource, sys; from llama_jax.cli import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = sorted(record["step_seconds"] for record in records)[len(records) // 2]
    evaluation = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])
    checkpoint_bytes = sum(
        path.stat().st_size for path in (run_dir / "checkpoints" / str(steps)).rglob("*") if path.is_file()
    )
    return {
        "name": name,
        "seconds": seconds,
        "step_seconds": step,
        "peak_bytes": int(done.stdout.split()[-1]) * 1024,
        "checkpoint_bytes": checkpoint_bytes,
        "run_dir": str(run_dir),
        "evaluation": evaluation,
    }


def accuracy(model: Any, test: Path, max_items: int) -> float:
    """Fraction of validation prompts whose greedy answer is exactly the expected one."""
    import jax

    import llama_jax as lj
    from llama_jax.chat import chat_template, encode_chat

    records = [json.loads(line)["messages"] for line in test.read_text().splitlines()][:max_items]
    template = chat_template(model.tokenizer)
    prompts = [encode_chat(model.tokenizer, template, messages[:-1]) for messages in records]
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = lj.generate(
        model.config,
        model.params,
        tokens,
        np.array([len(prompt) for prompt in prompts], np.int32),
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=24,
        eos_id=model.tokenizer.eos_ids,
    )
    correct = 0
    for ids, length, messages in zip(np.asarray(out.tokens), np.asarray(out.lengths), records, strict=True):
        correct += model.tokenizer.decode(ids[:length].tolist()).strip() == messages[-1]["content"]
    return correct / len(records)


def perplexity(model: Any, text: str, max_items: int = 8192) -> float:
    """Perplexity of ordinary English, in rows of 512 tokens."""
    import llama_jax as lj

    ids = np.array(model.tokenizer.encode(text[: 6 * max_items])[:max_items], np.int32)
    rows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    losses = [lj.next_token_loss(model.config, model.params, rows[i : i + 4]) for i in range(0, len(rows), 4)]
    return math.exp(sum(float(x.total) for x in losses) / sum(float(x.count) for x in losses))


def measure(names: list[str], steps: int, folder: Path, text: str | None, max_items: int) -> dict[str, Any]:
    """Runs each finetuning, and measures the model before and after."""
    import llama_jax as lj

    write(folder)
    results = [train(name, steps, folder) for name in names]
    base = lj.load(MODEL, scan_layers=False)
    test = folder / "extract_test.jsonl"
    before = {"accuracy": accuracy(base, test, max_items)}
    if text is not None:
        before["perplexity"] = perplexity(base, text)
    for result in results:
        model = lj.load(result["run_dir"], scan_layers=False)
        if RUNS[result["name"]][0] == "extract":
            result["accuracy"] = accuracy(model, test, max_items)
        if text is not None:
            result["perplexity"] = perplexity(model, text)
    return {"steps": steps, "before": before, "names": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RUNS)}; all by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=100, help="number of validation prompts to answer")
    parser.add_argument("--text", type=Path, help="ordinary English, whose perplexity is evaluation")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_intermixed_args()
    unknown = [name for name in args.names if name not in RUNS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as folder:
        text = args.text.read_text(encoding="utf-8") if args.text else None
        report = measure(args.names or list(RUNS), args.steps, Path(folder), text, args.prompts)
    if args.json:
        print(json.dumps(report))
        return
    table = Table(title=f"{MODEL}, {args.steps} steps of 4 x 256 tokens; before: {report['before']}")
    for name in (
        "run",
        "validation answers correct",
        "pairs correct",
        "perplexity",
        "s per step",
        "s in total",
        "peak",
        "checkpoint",
    ):
        table.add_column(name)
    for result in report["names"]:
        cell = lambda name, form, result=result: format(result[name], form) if name in result else ""  # noqa: E731
        table.add_row(
            result["name"],
            cell("accuracy", ".0%"),
            format(result["evaluation"]["accuracy"], ".0%") if "accuracy" in result["evaluation"] else "",
            cell("perplexity", ".2f"),
            cell("step_seconds", ".2f"),
            cell("seconds", ".0f"),
            f"{result['peak_bytes'] / 1e9:.1f} GB",
            f"{result['checkpoint_bytes'] / 1e6:.0f} MB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
