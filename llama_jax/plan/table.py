"""A plan as tables of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llama_jax.console.terminal import human_bytes
from llama_jax.plan.prices import chip_hour_dollars
from llama_jax.plan.result import Memory, StepPlan

BAR_WIDTH = 24
MEMORY_PARTS = ("parameters", "optimizer", "gradients", "activations", "logits", "temporaries")
BOUNDS = {
    "mxu": "matrix units",
    "hbm": "HBM bandwidth",
    "ici": "links within a slice",
    "dcn": "network between slices",
    "latency": "latency",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under column names; the columns of `right` are numbers."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    right: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a whole run costs.

    Attributes:
      tokens: to train on.
      steps: for that many tokens.
      days: of steps alone, without evaluation, checkpoints and restarts.
      chip_hours: of all chips.
      dollars: None without a price.
      price: dollars per chip and hour.
      price_source: where the price is from.
    """

    tokens: float
    steps: int
    days: float
    chip_hours: float
    dollars: float | None
    price: float | None
    price_source: str


def budget(plan: StepPlan, tokens: float | None = None, price: float | None = None) -> Budget:
    """The cost of all steps of the run, or of `tokens`, at the listed price of a chip-hour or at `price`."""
    steps = plan.steps if tokens is None else max(round(tokens / plan.tokens_per_step), 1)
    seconds = steps * plan.step_seconds
    chip_hours = seconds * plan.chips / 3600
    each, source = chip_hour_dollars(plan.chip, price)
    return Budget(
        tokens=steps * plan.tokens_per_step,
        steps=steps,
        days=seconds / 86400,
        chip_hours=chip_hours,
        dollars=None if each is None else each * chip_hours,
        price=each,
        price_source=source,
    )


def bar(value: float, whole: float, width: int = BAR_WIDTH) -> str:
    """A bar of eighths of a character, `width` characters long where `value` is `whole`."""
    eighths = round(8 * width * min(max(value / whole, 0), 1)) if whole else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")


def memory_table(memory: Memory) -> Table:
    """HBM of a chip by part, the peak and the capacity."""
    whole = max(memory.capacity, memory.peak)
    sizes = [(name, getattr(memory, name)) for name in MEMORY_PARTS]
    rows = [(name, human_bytes(size), bar(size, whole)) for name, size in sizes if size]
    rows += [
        ("peak", human_bytes(memory.peak), bar(memory.peak, whole)),
        ("capacity", human_bytes(memory.capacity), bar(memory.capacity, whole)),
    ]
    return Table(("HBM per chip", "", ""), rows, right=(1,))


def time_table(plan: StepPlan) -> Table:
    """Seconds of a step by part, and what bounds each."""
    whole = plan.step_seconds
    parts = [(part.name, part.seconds, BOUNDS[part.bound]) for part in plan.parts]
    parts += [("waiting for collectives", plan.exposed_seconds, ""), ("launches", plan.launch_seconds, "")]
    rows = [
        (name, seconds_text(seconds), f"{seconds / whole:.1%}", bound, bar(seconds, whole))
        for name, seconds, bound in parts
        if seconds
    ]
    rows.append(("a step", seconds_text(whole), "", "", ""))
    return Table(("time", "", "share", "bound by", ""), rows, right=(1, 2))


def traffic_table(plan: StepPlan) -> Table:
    """Collectives by mesh axis."""
    rows = [
        (
            f"{one.kind} over {one.axes}",
            one.network.upper(),
            human_bytes(one.bytes),
            seconds_text(one.seconds),
            seconds_text(one.exposed_seconds),
        )
        for one in plan.traffic
    ]
    return Table(
        ("collectives of a step", "network", "per chip", "busy", "waited for"), rows, right=(2, 3, 4)
    )


def summary_table(plan: StepPlan, cost: Budget) -> Table:
    """Speed, utilization, and the cost of the run."""
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    how = "compiled" if plan.source == "compiled" else "by arithmetic"
    state = "fits" if plan.memory.fits else "DOES NOT FIT"
    rows = [
        ("slice", f"{plan.topology}, {plan.chips} chips; mesh: {mesh}; {how}"),
        ("memory", f"{human_bytes(plan.memory.peak)} of {human_bytes(plan.memory.capacity)} a chip: {state}"),
        ("step", f"{seconds_text(plan.step_seconds)} for {plan.tokens_per_step:,} tokens"),
        (
            "tokens/s",
            f"{plan.tokens_per_second / plan.chips:,.0f} a chip, {plan.tokens_per_second:,.0f} in all",
        ),
        (
            "MFU",
            f"{plan.mfu:.1%} causal, {plan.mfu_full_attention:.1%} full attention; "
            f"{plan.mfu_without_waiting:.1%} causal if nothing waited",
        ),
        ("run", f"{cost.steps:,} steps, {_count(cost.tokens)} tokens: {_days(cost.days)}"),
    ]
    dollars = cost.price_source
    if cost.dollars is not None:
        dollars = f"${cost.dollars:,.0f} at ${cost.price:g} an hour ({cost.price_source})"
    rows.append(("cost", f"{cost.chip_hours:,.0f} chip-hours; {dollars}"))
    return Table(("plan", ""), rows)


def tables(plan: StepPlan, cost: Budget) -> Sequence[Table]:
    """All tables of a plan, the summary last."""
    shown = [memory_table(plan.memory), time_table(plan)]
    if plan.traffic:
        shown.append(traffic_table(plan))
    return [*shown, summary_table(plan, cost)]


def seconds_text(seconds: float) -> str:
    """Seconds with a unit."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 or seconds == 0 else f"{seconds * 1e6:.0f} us"


def duration(seconds: float) -> str:
    """A duration of minutes or seconds."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
