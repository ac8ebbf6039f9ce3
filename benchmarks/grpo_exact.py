"""Rollouts beside the trainer: `python -m benchmarks.grpo_exact OUT [--steps N] [--dtype D]`.

GRPO of SmolLM2-135M on 8 ragged prompts x 4 completions, with and without `train.exact_rollouts`, both
stopped half way and resumed. Prints the largest mismatch of any step, and tokens per second.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from pathlib import Path
from typing import Any

from llama_jax.train.config.read import load_config
from llama_jax.train.launch import train

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
global_batch_size = 32
seq_len = {seq_len}
loss_chunks = 4
[rl]
rewards = ["overlong:{longest},{longest}"]
num_generations = 4
max_completion_length = {longest}
[adapter]
type = "lora"
[optimizer]
learning_rate = 1e-4
warmup_steps = 0
schedule = "constant"
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


def run(folder: Path, name: str, steps: int, longest: int, dtype: str, exact: bool) -> dict[str, Any]:
    """Trains for half of the steps, resumes for the others, and reads the metrics."""
    config = folder / "grpo.toml"
    config.write_text(CONFIG.format(folder=folder, longest=longest, seq_len=16 + longest))
    flags = ["--train.run_dir", str(folder / name), "--train.dtype", dtype]
    flags += ["--train.exact_rollouts", str(exact).lower()]
    for count in (steps // 2, steps):
        train(load_config(config, [*flags, "--train.steps", str(count)]))
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    warm = [record for record in records if record["step"] not in (1, 2, steps // 2 + 1, steps // 2 + 2)]
    return {
        "steps": steps,
        "mismatch_max": max(record["rollout_logprob_diff_max"] for record in records),
        "mismatch_mean": statistics.mean(record["rollout_logprob_diff_mean"] for record in records),
        "kl_max": max(record["rollout_kl"] for record in records),
        **{
            key: statistics.median(record[key] for record in warm)
            for key in ("rollout_tokens_per_second", "update_tokens_per_second", "scoring_seconds")
        },
        **({"passes": statistics.mean(record["rollout_passes"] for record in records)} if exact else {}),
        **({"changed_tokens": sum(record["rollout_changed_tokens"] for record in records)} if exact else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run (default: 50)")
    parser.add_argument(
        "--tokens", type=int, default=32, help="tokens of a completion, at most (default: 32)"
    )
    parser.add_argument("--dtype", default="float32", help="compute dtype (default: float32)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    sums = ([str(rng.randint(1, 9)) for _ in range(rng.randint(2, 7))] for _ in range(200))
    lines = [json.dumps({"prompt": f"{' + '.join(terms)} ="}) for terms in sums]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{platform.processor() or platform.machine()}, {args.dtype}")
    for name, exact in (("exact", True), ("plain", False)):
        found = run(args.out, f"{name}_{args.dtype}", args.steps, args.tokens, args.dtype, exact)
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
