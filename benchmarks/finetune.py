"""Finetuning SmolLM2-135M on the made tasks: `python -m benchmarks.finetune [NAMES] [--steps N]`.

Each way of training runs in a process of its own, one after another, on the same batches: all the weights,
LoRA, QLoRA, bottlenecks and a prefix on `extract`; DPO with LoRA on `manner`, its reference asked at every
step or beforehand. It tells how many held-out answers are exactly right before and after, what training
takes, and, for preferences, the perplexity of ordinary text before and after.
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
# On which task, to which objective, at which rate; and what is trained, in the configuration's words.
WAYS = {
    "full": ("extract", "sft", 5e-5, ""),
    "lora": ("extract", "sft", 1e-3, 'kind = "lora"'),
    "qlora": ("extract", "sft", 1e-3, 'kind = "lora"\nbase = "nf4"'),
    "bottleneck": ("extract", "sft", 3e-4, 'kind = "bottleneck"'),
    "prefix": ("extract", "sft", 2e-2, 'kind = "prefix"'),
    "dpo": ("manner", "dpo", 5e-5, 'kind = "lora"'),
    "dpo-precomputed": ("manner", "dpo", 5e-5, 'kind = "lora"\n[preference]\nreference = "precomputed"'),
}


def train(way: str, steps: int, folder: Path) -> dict[str, Any]:
    """Runs one way of training; returns what it took and where it is."""
    task, objective, rate, adapter = WAYS[way]
    run_dir, config = folder / way, folder / f"{way}.toml"
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
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(config)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - began
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = sorted(record["step_seconds"] for record in records)[len(records) // 2]
    told = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])
    state = sum(
        path.stat().st_size for path in (run_dir / "checkpoints" / str(steps)).rglob("*") if path.is_file()
    )
    return {
        "way": way,
        "seconds": seconds,
        "step_seconds": step,
        "peak_bytes": int(done.stdout.split()[-1]) * 1024,
        "checkpoint_bytes": state,
        "run_dir": str(run_dir),
        "evaluation": told,
    }


def accuracy(model: Any, test: Path, most: int) -> float:
    """The share of held-out prompts whose greedy answer is exactly the one that was wanted."""
    import jax

    import llama_jax as lj
    from llama_jax.chat import chat_template, encode_chat

    records = [json.loads(line)["messages"] for line in test.read_text().splitlines()][:most]
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
    right = 0
    for ids, length, messages in zip(np.asarray(out.tokens), np.asarray(out.lengths), records, strict=True):
        right += model.tokenizer.decode(ids[:length].tolist()).strip() == messages[-1]["content"]
    return right / len(records)


def perplexity(model: Any, text: str, most: int = 8192) -> float:
    """Of ordinary English, in rows of 512 tokens."""
    import llama_jax as lj

    ids = np.array(model.tokenizer.encode(text[: 6 * most])[:most], np.int32)
    rows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    losses = [lj.next_token_loss(model.config, model.params, rows[i : i + 4]) for i in range(0, len(rows), 4)]
    return math.exp(sum(float(x.total) for x in losses) / sum(float(x.count) for x in losses))


def measure(ways: list[str], steps: int, folder: Path, text: str | None, most: int) -> dict[str, Any]:
    """Trains each way and measures before and after."""
    import llama_jax as lj

    write(folder)
    found = [train(way, steps, folder) for way in ways]
    base = lj.load(MODEL, scan_layers=False)
    test = folder / "extract_test.jsonl"
    before = {"accuracy": accuracy(base, test, most)}
    if text is not None:
        before["perplexity"] = perplexity(base, text)
    for one in found:
        model = lj.load(one["run_dir"], scan_layers=False)
        if WAYS[one["way"]][0] == "extract":
            one["accuracy"] = accuracy(model, test, most)
        if text is not None:
            one["perplexity"] = perplexity(model, text)
    return {"steps": steps, "before": before, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}; all by default")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=100, help="how many held-out prompts are answered")
    parser.add_argument("--text", type=Path, help="ordinary English, whose perplexity is told")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = [way for way in args.ways if way not in WAYS]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as folder:
        text = args.text.read_text(encoding="utf-8") if args.text else None
        report = measure(args.ways or list(WAYS), args.steps, Path(folder), text, args.held_out)
    if args.json:
        print(json.dumps(report))
        return
    table = Table(title=f"{MODEL}, {args.steps} steps of 4 x 256 tokens; before: {report['before']}")
    for name in (
        "way",
        "held-out answers right",
        "pairs right",
        "perplexity",
        "s a step",
        "s in all",
        "peak",
        "checkpoint",
    ):
        table.add_column(name)
    for one in report["ways"]:
        shown = lambda name, form, one=one: format(one[name], form) if name in one else ""  # noqa: E731
        table.add_row(
            one["way"],
            shown("accuracy", ".0%"),
            format(one["evaluation"]["accuracy"], ".0%") if "accuracy" in one["evaluation"] else "",
            shown("perplexity", ".2f"),
            shown("step_seconds", ".2f"),
            shown("seconds", ".0f"),
            f"{one['peak_bytes'] / 1e9:.1f} GB",
            f"{one['checkpoint_bytes'] / 1e6:.0f} MB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
