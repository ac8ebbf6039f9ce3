"""Rollouts beside the trainer: `python -m benchmarks.grpo_exact OUT [--steps N] [--dtype D] [--json FILE]`.

GRPO of SmolLM2-135M on 8 ragged prompts x 4 completions, with and without `train.exact_rollouts`, both
stopped half way and resumed. Reports the mismatch of the steps, and what exactness takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu import commit, versions
from llama_jax.train.config.read import load_config
from llama_jax.train.launch import train

ROWS = 32
CONFIG = """\
[model]
init_from = "{model}"
[tokenizer]
path = "{model}"
[data]
files = "{folder}/prompts.jsonl"
validation_fraction = 0
[train]
objective = "grpo"
global_batch_size = {rows}
seq_len = {seq_len}
loss_chunks = 4
[rl]
rewards = ["format:.*\\\\d"]
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


def run(folder: Path, name: str, dtype: str, steps: int) -> dict[str, Any]:
    """Trains for half of the steps, resumes for the others, and reads the metrics."""
    config, run_dir, exact = folder / "grpo.toml", folder / f"{name}_{dtype}", name == "exact"
    flags = ["--train.run_dir", str(run_dir), "--train.dtype", dtype]
    flags += ["--train.exact_rollouts", str(exact).lower()]
    for count in (steps // 2, steps):
        train(load_config(config, [*flags, "--train.steps", str(count)]))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    first = (1, 2, steps // 2 + 1, steps // 2 + 2)  # which compile
    warm = [record for record in records if record["step"] not in first] or records
    mismatch = [record["rollout_logprob_diff_max"] for record in records]
    found = {
        "rollouts": name,
        "steps": steps,
        "resumed_after": steps // 2,
        "steps_without_mismatch": mismatch.count(0.0),
        "mismatch_max": max(mismatch),
        "mismatch_mean": statistics.mean(record["rollout_logprob_diff_mean"] for record in records),
        "kl_max": max(record["rollout_kl"] for record in records),
        "tokens": sum(record["completion_length"] for record in records) * ROWS,
    }
    for key in ("rollout_seconds", "scoring_seconds", "update_seconds"):
        found[key] = statistics.median(record[key] for record in warm)
    if exact:
        found["passes"] = statistics.mean(record["rollout_passes"] for record in records)
        found["passes_max"] = max(record["rollout_passes"] for record in records)
        found["changed_tokens"] = sum(record["rollout_changed_tokens"] for record in records)
    return {key: round(x, 4) if isinstance(x, float) and x > 0.01 else x for key, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--steps", type=int, default=50, help="steps of each run (default: 50)")
    parser.add_argument(
        "--tokens", type=int, default=32, help="tokens of a completion, at most (default: 32)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=16, help="tokens of a prompt, at most (default: 16)"
    )
    parser.add_argument("--dtype", default="float32", help="compute dtype (default: float32)")
    parser.add_argument("--model", default="smollm2-135m", help="the model (default: smollm2-135m)")
    parser.add_argument("--only", default="exact,plain", help="rollouts to run (default: exact,plain)")
    parser.add_argument("--json", type=Path, help="file that the results are added to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    most = args.prompt_tokens // 2
    sums = ([str(rng.randint(1, 9)) for _ in range(rng.randint(2, most))] for _ in range(200))
    lines = [json.dumps({"prompt": f"{' + '.join(terms)} ="}) for terms in sums]
    (args.out / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    sizes = {"longest": args.tokens, "seq_len": args.prompt_tokens + args.tokens, "rows": ROWS}
    text = CONFIG.format(folder=args.out, model=args.model, **sizes)
    (args.out / "grpo.toml").write_text(text)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "rows": ROWS,
        "completion_tokens": args.tokens,
    }
    for name in args.only.split(","):
        found = run(args.out, name, args.dtype, args.steps)
        print(json.dumps(found), flush=True)
        if args.json:
            results = json.loads(args.json.read_text()) if args.json.exists() else []
            args.json.write_text(json.dumps([*results, {**about, **found}], indent=1) + "\n")


if __name__ == "__main__":
    main()
