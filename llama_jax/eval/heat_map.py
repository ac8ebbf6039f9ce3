"""Heat maps of what a model finds in long texts, depth over length: as PNG, and as a page of its own."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Mapping, Sequence

from llama_jax.errors import InputError

Table = Sequence[Sequence[float]]  # [lengths][depths], from 0 to 1

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #5b6570; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #15181c; --soft: #9aa4ae; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background:
  var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { color: var(--soft); margin: .2rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; color: var(--soft); padding-top: .3rem; }
th { color: var(--soft); font-weight: 500; padding: .2rem .5rem; text-align: right; }
td { color: #111; min-width: 3.2rem; padding: .35rem .5rem; text-align: center; border-radius: .2rem; }
"""


def check_plots() -> None:
    """Checks before long work that `png` can draw.

    Raises:
      InputError: without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("heat maps need matplotlib: pip install 'llama-jax[plot]'; or leave out --out")


def png(maps: Mapping[str, Table], lengths: Sequence[int], depths: Sequence[float], label: str) -> bytes:
    """The maps side by side as one image.

    Args:
      maps: a table for each title.
      lengths: of the texts, in tokens.
      depths: from 0, the beginning, to 1.
      label: what the colors mean.

    Raises:
      InputError: as `check_plots`.
    """
    check_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 + 2.9 * max(len(maps), 1.5), 3.6), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, (title, table) in zip(axes, maps.items(), strict=True):
        by_depth = list(zip(*table, strict=True))
        image = axis.imshow(by_depth, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_title(title)
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("depth")
    figure.colorbar(image, ax=axes, label=label)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def page(
    maps: Mapping[str, Table],
    lengths: Sequence[int],
    depths: Sequence[float],
    label: str,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """The maps as tables on an HTML page, which loads nothing from anywhere; arguments as for `png`."""
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    for name, table in maps.items():
        head = "".join(f'<th scope="col">{length:,}</th>' for length in lengths)
        rows = "".join(
            f'<tr><th scope="row">{depth:.0%}</th>{"".join(map(_cell, shares))}</tr>'
            for depth, shares in zip(depths, zip(*table, strict=True), strict=True)
        )
        body.append(
            f'<h2>{html.escape(name)}</h2><div class="wide"><table><caption>{html.escape(label)}: depth by '
            f"length in tokens</caption><tr><th>depth</th>{head}</tr>{rows}</table></div>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _cell(share: float) -> str:
    """A cell from red to green, of a lightness on which black is readable."""
    return f'<td style="background:hsl({120 * share:.0f} 65% 62%)">{share:.0%}</td>'
