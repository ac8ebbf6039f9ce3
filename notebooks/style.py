"""How the notebooks draw: colours that people of every colour vision can tell apart, and shared helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

# Okabe and Ito's palette, which people of every colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY, YELLOW)
SHADES = "cividis"  # from little to much
SIDES = "PuOr"  # from one sign to the other


def use() -> None:
    """Makes every figure of this process one of the house."""
    plt.rcParams.update(
        {
            "axes.grid": False,
            "axes.prop_cycle": plt.cycler(color=CYCLE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 9,
            "image.cmap": SHADES,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
    )


def panels(columns: int, rows: int = 1, *, height: float = 2.8, width: float = 10.0, **rest: Any) -> Any:
    """Axes in a grid as wide as a page; an array of them, or one."""
    return plt.subplots(rows, columns, figsize=(width, height * rows), **rest)[1]


def heat(axes: Axes, values: Any, *, label: str, colorbar: bool = True, **rest: Any) -> AxesImage:
    """A matrix as a picture with its scale."""
    image = axes.imshow(np.asarray(values), interpolation="nearest", **{"aspect": "auto", **rest})
    axes.spines[:].set_visible(False)
    if colorbar:
        axes.figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.02)
    return image


def visible(text: str) -> str:
    """A token as a tick label: its spaces and line ends shown, and no longer than its neighbours can bear."""
    text = text.replace("\n", "↵").replace("\t", "→")
    text = "·" + text[1:] if text.startswith(" ") else text
    text = text.replace("$", r"\$")
    return text if len(text) <= 12 else text[:11] + "…"


def token_ticks(axes: Axes, pieces: Sequence[str], *, x: bool = True, y: bool = False) -> None:
    """Writes tokens beside the axes, one a place."""
    names = [visible(piece) for piece in pieces]
    if x:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    if y:
        axes.set_yticks(range(len(names)), names, fontsize=7)


def ink(value: float) -> str:
    """White or black, whichever reads on a shade from 0 to 1."""
    return "white" if value < 0.55 else "black"


def nbytes(size: float) -> str:
    """A number of bytes as people say it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
