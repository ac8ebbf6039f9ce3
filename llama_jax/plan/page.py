"""A plan as one self-contained HTML page: memory and time as bars, tables, the largest operations."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from llama_jax.console.terminal import human_bytes
from llama_jax.plan.explain import explain
from llama_jax.plan.result import StepPlan
from llama_jax.plan.table import MEMORY_PARTS, Budget, Table, seconds_text, tables

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #5b6570; --c0:
  #3b6fb6; --c1: #d07a2d; --c2: #4b9a6a; --c3: #a9527e; --c4: #7d6bb5; --c5: #8c8f94; --c6: #c0a23a; --c7:
  #5aa3b0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #15181c; --line: #343a41; --soft:
  #9aa4ae; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background:
  var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { color: var(--soft); margin: .2rem 0 0; }
.bad { color: var(--bad); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem;
  margin-top: 1.2rem; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); }
svg { display: block; width: 100%; height: 2.2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .5rem 0 0; padding: 0; list-style:
  none; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .4em;
  }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
.number { text-align: right; }
li { margin: .25rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""


def page(plan: StepPlan, cost: Budget, title: str) -> str:
    """The page; it loads nothing from anywhere.

    Args:
      plan: what to show.
      cost: of the run.
      title: such as the name of the config.
    """
    memory, how = (
        plan.memory,
        "compiled by the TPU compiler" if plan.source == "compiled" else "by arithmetic",
    )
    held = [(name, getattr(memory, name), human_bytes(getattr(memory, name))) for name in MEMORY_PARTS]
    whole = max(memory.capacity, memory.peak)
    shown = sum(size for _, size, _ in held)
    if shown > memory.peak:  # not all parts exist at the peak
        held = [(name, size * memory.peak / shown, text) for name, size, text in held]
    spent = [(part.name, part.seconds, seconds_text(part.seconds)) for part in plan.parts]
    spent += [
        ("waiting for collectives", plan.exposed_seconds, seconds_text(plan.exposed_seconds)),
        ("launches", plan.launch_seconds, seconds_text(plan.launch_seconds)),
    ]
    over = memory.peak - memory.capacity
    fits = "" if memory.fits else f'<p class="bad">Does not fit: {human_bytes(over)} a chip too much.</p>'
    body = [
        f"<h1>{html.escape(title)} on {html.escape(plan.topology)}</h1>",
        f'<p class="lead">{plan.chips} chips, {plan.tokens_per_step:,} tokens a step; {how}</p>',
        fits,
        _tiles(plan, cost),
        f"<h2>HBM of a chip: {human_bytes(memory.peak)} of {human_bytes(memory.capacity)}</h2>",
        _bar(held, whole, mark=memory.capacity / whole),
        f"<h2>Time of a step: {seconds_text(plan.step_seconds)}</h2>",
        _bar(spent, plan.step_seconds),
        *(_table(Table(t.header, t.rows, t.right)) for t in map(_without_bars, tables(plan, cost))),
        "<h2>What binds it</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in explain(plan)) + "</ul>",
        _operations(plan),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Plan of {html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def _tiles(plan: StepPlan, cost: Budget) -> str:
    days = f"{cost.days:,.1f} days" if cost.days >= 1 else f"{cost.days * 24:.1f} hours"
    tiles = [
        (f"{plan.mfu:.1%}", "MFU, causal attention"),
        (seconds_text(plan.step_seconds), "a step"),
        (f"{plan.tokens_per_second / plan.chips:,.0f}", "tokens/s a chip"),
        (days, f"for {cost.tokens:.3g} tokens"),
        (f"{cost.chip_hours:,.0f}", "chip-hours"),
    ]
    if cost.dollars is not None:
        tiles.append((f"${cost.dollars:,.0f}", f"at ${cost.price:g} an hour and chip"))
    cells = (f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _bar(parts: Sequence[tuple[str, float, str]], whole: float, mark: float | None = None) -> str:
    """One stacked bar with its legend; `mark` is a share of its length."""
    x, boxes, legend = 0.0, [], []
    shown = [(name, size, text) for name, size, text in parts if size > 0]
    for place, (name, size, text) in enumerate(shown):
        color, width = f"var(--c{place % 8})", 1000 * size / whole
        label = html.escape(f"{name}: {text}")
        boxes.append(
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="22" style="fill:{color}">'
            f"<title>{label}</title></rect>"
        )
        legend.append(f'<li><i style="background:{color}"></i>{label}</li>')
        x += width
    if mark is not None:
        boxes.append(
            f'<rect x="{1000 * mark - 1:.2f}" y="0" width="2" height="24" style="fill:var(--ink)">'
            "<title>capacity</title></rect>"
        )
    names = ", ".join(f"{name} {text}" for name, _, text in shown)
    return (
        f'<svg viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" aria-label="{html.escape(names)}">'
        f'<rect width="1000" height="22" style="fill:var(--line)"></rect>{"".join(boxes)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul>'
    )


def _without_bars(table: Table) -> Table:
    """The table without a last column of bars, which the page draws."""
    if any("█" in row[-1] for row in table.rows):
        return Table(table.header[:-1], [row[:-1] for row in table.rows], table.right)
    return table


def _table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        shown = (
            f"<{tag}{' class=number' if place in table.right else ''}>{html.escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    rows = "".join(row(cells, "td") for cells in table.rows)
    title = html.escape(table.header[0].capitalize())
    return f'<h2>{title}</h2><div class="wide"><table>{row(table.header, "th")}{rows}</table></div>'


def _operations(plan: StepPlan) -> str:
    """The compiled program's largest operations, where there is one."""
    operations = plan.details.get("operations")
    if not isinstance(operations, (list, tuple)) or not operations:
        return ""
    columns = ("name", "part", "source", "times")
    rows = [
        (*(str(one[name]) for name in columns), seconds_text(float(one["seconds"]))) for one in operations
    ]
    header = ("largest operations", "part", "from", "times", "in all")
    return _table(Table(header, rows, right=(3, 4)))
