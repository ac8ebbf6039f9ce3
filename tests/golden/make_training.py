"""Writes the golden loss curve with torch and transformers: `python -m tests.golden.make_training`.

Run by hand in an environment with the `parity` extra when the run in `training.py` changes, and commit
what it wrote.
"""

from __future__ import annotations

import json
import math

import torch
import transformers

from tests.golden import training
from tests.parity import hf


def reference_curve() -> dict[str, list[float]]:
    """The `loss`es and `grad_norm`s of the run, by transformers' model and torch's AdamW and clipping."""
    o = training.OPTIMIZER
    torch.manual_seed(0)
    model = hf.model(training.MODEL, training.params()).train()
    named = dict(model.named_parameters())
    norms = [p for name, p in named.items() if "norm" in name]
    others = [p for name, p in named.items() if "norm" not in name]
    groups = [{"params": others, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _fraction_of_peak)
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for tokens, lengths in training.batches():
        ids = torch.tensor(tokens, dtype=torch.int64)
        padding = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]
        logits = model(ids, use_cache=False).logits[:, :-1]
        targets = ids.masked_fill(padding, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        optimizer.step()
        schedule.step()
        curve["loss"].append(loss.item())
        curve["grad_norm"].append(norm.item())
    return curve


def _fraction_of_peak(step: int) -> float:
    """Linear warm-up that begins at peak / warmup, then a cosine down to `min_lr_ratio`."""
    o, steps = training.OPTIMIZER, training.TRAIN.steps
    if step < o.warmup_steps:
        return (step + 1) / o.warmup_steps
    turn = math.pi * (step - o.warmup_steps) / (steps - o.warmup_steps)
    return o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(turn)) / 2


def main() -> None:
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    curve = reference_curve()
    print(", ".join(f"{name} {values[0]:.3f} -> {values[-1]:.3f}" for name, values in curve.items()))
    training.CURVE.write_text(json.dumps(curve, indent=1) + "\n")


if __name__ == "__main__":
    main()
