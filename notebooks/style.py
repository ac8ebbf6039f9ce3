"""The notebooks' plot style: a color-blind-safe palette, and shared helpers."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

# Okabe and Ito's color-blind-safe palette.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY, YELLOW)
SHADES = "cividis"  # sequential
SIDES = "PuOr"  # diverging


def use() -> None:
    """Sets the style of all figures in this process."""
    plt.rcParams.update(
        {
            "axes.grid": False,
            "axes.prop_cycle": plt.cycler(color=CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "figure.constrained_layout.use": True,
            "savefig.pad_inches": 0.2,  # rotated tick labels may reach beyond the figure
            "figure.dpi": 110,
            "font.size": 9,
            "image.cmap": SHADES,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
    )


def panels(columns: int, rows: int = 1, *, height: float = 2.8, width: float = 10.0, **rest: Any) -> Any:
    """A grid of axes as wide as a page; an array of axes, or one."""
    return plt.subplots(rows, columns, figsize=(width, height * rows), **rest)[1]


def heat(axes: Axes, values: Any, *, label: str, colorbar: bool = True, **rest: Any) -> AxesImage:
    """Draws a matrix as an image with a color bar."""
    image = axes.imshow(np.asarray(values), interpolation="nearest", **{"aspect": "auto", **rest})
    axes.spines[:].set_visible(False)
    if colorbar:
        axes.figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    return image


def visible(text: str) -> str:
    """A token as a tick label: visible spaces and newlines, at most 12 characters."""
    text = text.replace("\n", "↵").replace("\t", "→")
    text = "·" + text[1:] if text.startswith(" ") and text.strip() else text.replace(" ", "␣")
    if len(text) == 1 and text in string.punctuation:
        text = f"“{text}”"  # alone a period is hard to see
    text = text.replace("$", r"\$")
    return text if len(text) <= 12 else text[:11] + "…"


def token_ticks(axes: Axes, pieces: Sequence[str], *, x: bool = True, y: bool = False) -> None:
    """Labels the ticks of the axes with tokens."""
    names = [visible(piece) for piece in pieces]
    if x:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    if y:
        axes.set_yticks(range(len(names)), names, fontsize=7)


def ink(value: float) -> str:
    """White or black, whichever is readable on a shade from 0 to 1."""
    return "white" if value < 0.55 else "black"


def nbytes(size: float) -> str:
    """A human-readable number of bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
