"""A run's losses as a picture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from .report import EVALUATIONS, METRICS, read_records

PLOT = "loss.png"


def plot_losses(run_dir: Path, unigram: float) -> Path | None:
    """Draws training and held-out loss over steps, with the unigram model's as a line to be below.

    Returns:
      The picture's path; None where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    trained = read_records(run_dir / METRICS)
    axes.plot([r["step"] for r in trained], [r["loss"] for r in trained], label="training", linewidth=1)
    measured = [r for r in read_records(run_dir / EVALUATIONS) if r.get("eval_loss") is not None]
    if measured:
        steps, losses = zip(*((r["step"], r["eval_loss"]) for r in measured), strict=True)
        axes.plot(steps, losses, "o-", label="held out", markersize=4)
    if math.isfinite(unigram):
        axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram model, held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run_dir / PLOT, dpi=150)
    return run_dir / PLOT
