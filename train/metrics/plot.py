"""Plots a run's training loss and eval_loss."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path

from .report import EVALUATIONS, METRICS, read_records

PLOT = "loss.png"
_FEW = 50  # records


def plot_losses(run_dir: Path, unigram_loss: float) -> Path | None:
    """Plots training loss and eval_loss over steps, with a unigram model's eval_loss as the baseline.

    Args:
      run_dir: the run's directory.
      unigram_loss: the baseline, in nats per token; NaN for none.

    Returns:
      The path of the image; None if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    records = read_records(run_dir / METRICS)
    marker = "." if len(records) <= _FEW else ""  # a line through one point is invisible
    xs, ys = [r["step"] for r in records], [r["loss"] for r in records]
    axes.plot(xs, ys, label="loss", linewidth=1, marker=marker)
    evaluations = [r for r in read_records(run_dir / EVALUATIONS) if r.get("eval_loss") is not None]
    if evaluations:
        steps, losses = zip(*((r["step"], r["eval_loss"]) for r in evaluations), strict=True)
        axes.plot(steps, losses, "o-", label="eval_loss", markersize=4)
    if math.isfinite(unigram_loss):
        axes.axhline(
            unigram_loss, color="gray", linestyle="--", linewidth=1, label="eval_loss of a unigram model"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format=Path(PLOT).suffix[1:])
    (run_dir / PLOT).write_bytes(image.getvalue())
    return run_dir / PLOT
