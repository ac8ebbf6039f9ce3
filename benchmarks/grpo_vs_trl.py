"""A step of GRPO beside TRL's: `python -m benchmarks.grpo_vs_trl [--adapter none] [--tokens N] [--json]`.

SmolLM2-135M in f32, the same weights and prompts, 8 prompts x 4 completions, one update on each rollout, no
reference model. Each side stays warm in its own process on the same cores; a round takes one step of each,
one after the other: sampling, rewards, update. Run it in an environment with the `parity` extra, and nothing
else meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.workers import pin
from llama_jax.eval.throughput import peak_host_memory

PROMPTS, GROUP, RANK = 8, 4, 16
GOAL = 2.0
PAUSE_S = 0.5  # idle thread pools spin for some milliseconds after their last task
STEPS = 1000  # more than there are rounds
CONFIG = """\
[model]
init_from = "smollm2-135m"
[tokenizer]
path = "smollm2-135m"
[data]
files = "{folder}/prompts.jsonl"
validation_fraction = 0
[train]
objective = "grpo"
run_dir = "{folder}/run"
steps = {steps}
global_batch_size = {rows}
seq_len = {seq_len}
dtype = "float32"
remat = "none"
loss_chunks = 1
[rl]
rewards = ["overlong:{tokens},{tokens}"]
num_generations = {group}
max_completion_length = {tokens}
{adapter}
[optimizer]
learning_rate = 1e-6
warmup_steps = 0
schedule = "constant"
weight_decay = 0.0
[checkpoint]
every = 0
[eval]
every = 0
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""
LORA = f"""\
[adapter]
type = "lora"
rank = {RANK}
alpha = {2 * RANK}
"""


class Gate:
    """Lets a training loop take one step for each line on stdin, and answers with what it measured."""

    def __init__(self, answers: TextIO) -> None:
        self._answers, self._start = answers, 0.0

    def open(self) -> None:
        """Waits for a line; ends the process where there is none."""
        if not sys.stdin.readline():
            os._exit(0)
        self._start = time.perf_counter()

    def close(self, **measured: float) -> None:
        """Answers with the seconds since `open`."""
        answer = {"seconds": time.perf_counter() - self._start, "peak_bytes": peak_host_memory(), **measured}
        print(json.dumps(answer), file=self._answers, flush=True)


def llama_jax(folder: Path, gate: Gate, tokens: int, adapter: str) -> None:
    """The trainer of this project."""
    from llama_jax.train import loop
    from llama_jax.train.config.read import load_config
    from llama_jax.train.launch import train

    run_step = loop.Loop._run_step

    def gated(self: loop.Loop) -> None:
        gate.open()
        run_step(self)
        self.report.flush()
        record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        sampled = record["completion_length"] * PROMPTS * GROUP
        gate.close(rollout_seconds=record["rollout_seconds"], tokens=sampled)

    loop.Loop._run_step = gated  # type: ignore[method-assign]
    config = folder / "grpo.toml"
    config.write_text(
        CONFIG.format(
            folder=folder,
            steps=STEPS,
            rows=PROMPTS * GROUP,
            seq_len=16 + tokens,
            tokens=tokens,
            group=GROUP,
            adapter=LORA if adapter == "lora" else "",
        )
    )
    train(load_config(config, []))


def trl(folder: Path, gate: Gate, tokens: int, adapter: str) -> None:
    """TRL's GRPOTrainer on transformers, without gradient checkpointing, which would be slower."""
    import datasets
    import peft
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measured: dict[str, float] = {}

    class Gated(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.open()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.close(**measured)

    class Trainer(GRPOTrainer):
        def _generate(self, *arguments: Any) -> Any:
            start = time.perf_counter()
            found = super()._generate(*arguments)
            measured["rollout_seconds"] = time.perf_counter() - start
            measured["tokens"] = sum(map(len, found[1]))
            return found

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=STEPS,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=tokens,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_steps=STEPS,
        disable_tqdm=True,
    )
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=matrices, task_type="CAUSAL_LM")
    Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
        reward_funcs=lambda completion_ids, **_: [-len(ids) / tokens for ids in completion_ids],
        args=settings,
        train_dataset=datasets.load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "hf"),
        peft_config=lora if adapter == "lora" else None,
        callbacks=[Gated()],
    ).train()


SIDES: dict[str, Callable[[Path, Gate, int, str], None]] = {"trl": trl, "llama_jax": llama_jax}


class Side:
    """One side in its own process, which the context manager ends."""

    def __init__(self, name: str, folder: Path, tokens: int, adapter: str) -> None:
        command = [sys.executable, "-m", "benchmarks.grpo_vs_trl", "--side", name, "--folder", str(folder)]
        command += ["--tokens", str(tokens), "--adapter", adapter]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Takes a step; returns its seconds, those of sampling, the sampled tokens, and the peak memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the {self.name} side ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def prepare(folder: Path) -> None:
    """Writes the prompts, sums of 2 to 7 numbers, and the weights as Hugging Face reads them."""
    import llama_jax as lj

    rng = random.Random(0)
    sums = ([str(rng.randint(1, 9)) for _ in range(rng.randint(2, 7))] for _ in range(200))
    lines = [json.dumps({"prompt": f"{' + '.join(terms)} ="}) for terms in sums]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    lj.save(lj.load("smollm2-135m"), folder / "hf", format="hf")


def measure(rounds: int, names: list[str], tokens: int, adapter: str) -> dict[str, Any]:
    """Takes the steps of all sides; returns the object that `--json` prints."""
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare(folder)
        sides = [stack.enter_context(Side(name, folder, tokens, adapter)) for name in names]
        steps: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        for _ in range(rounds + 2):  # the first two steps compile, and warm torch's allocator
            for side in sides:
                time.sleep(PAUSE_S)
                steps[side.name].append(side.step())
    timed = {name: taken[2:] for name, taken in steps.items()}
    rates = {
        "rollout": lambda step: step["tokens"] / step["rollout_seconds"],
        "update": lambda step: step["tokens"] / (step["seconds"] - step["rollout_seconds"]),
        "step": lambda step: step["tokens"] / step["seconds"],
    }
    rows: dict[str, Any] = {}
    for name, taken in timed.items():
        rows[name] = {
            "step_seconds": statistics.median(step["seconds"] for step in taken),
            "tokens": statistics.mean(step["tokens"] for step in taken),
            "peak_bytes": taken[-1]["peak_bytes"],
            "first_step_seconds": steps[name][0]["seconds"],
            **{
                f"{what}_tokens_per_second": statistics.median(map(rate, taken))
                for what, rate in rates.items()
            },
        }
    if len(timed) == 2:
        for what, rate in rates.items():
            pairs = zip(timed["llama_jax"], timed["trl"], strict=True)
            ratios = [rate(ours) / rate(theirs) for ours, theirs in pairs]
            rows[f"{what}_ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return {"load_average": load, "rounds": rounds, "tokens": tokens, "adapter": adapter, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side (default: 5)")
    parser.add_argument("--cores", type=int, default=2, help="cores of each side (default: 2)")
    parser.add_argument(
        "--tokens", type=int, default=32, help="tokens of a completion, at most (default: 32)"
    )
    parser.add_argument(
        "--adapter", choices=("lora", "none"), default="lora", help="what is trained; none: all weights"
    )
    parser.add_argument("--only", default="trl,llama_jax", help="sides to run")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        answers, sys.stdout = sys.stdout, sys.stderr  # keep a library's output out of the answers
        SIDES[args.side](args.folder, Gate(answers), args.tokens, args.adapter)
        return
    pin(args.cores)
    report = measure(args.rounds, args.only.split(","), args.tokens, args.adapter)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    what = "LoRA" if args.adapter == "lora" else "all weights"
    size = f"{PROMPTS} x {GROUP} completions of {args.tokens} tokens"
    table = Table(title=f"GRPO of SmolLM2-135M, f32, {what}, {size}")
    for column in ("tokens/s", *SIDES, "llama_jax is faster by", "(range)", "goal"):
        table.add_column(column, justify="right")
    for name in ("rollout", "update", "step"):
        found = [report.get(side, {}).get(f"{name}_tokens_per_second") for side in SIDES]
        cells = ["" if rate is None else f"{rate:.0f}" for rate in found]
        ratio, *ends = report.get(f"{name}_ratio", [float("nan")] * 3)
        goal = str(GOAL) if name == "step" else ""
        table.add_row(name, *cells, f"{ratio:.2f}", "{:.2f}-{:.2f}".format(*ends), goal)
    Console(width=110).print(table, f"load average before: {report['load_average']:.1f}")


if __name__ == "__main__":
    main()
