"""`llama-jax plan CONFIG --search`: the best mesh, remat policy, microbatches and flags, as a TOML."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.console import terminal
from llama_jax.plan.table import budget, duration, seconds_text
from llama_jax.storage.atomic import write_atomically

if TYPE_CHECKING:
    from llama_jax.plan.topology import Topology
    from llama_jax.train.config.run import RunConfig
    from llama_jax.train.planning.search import SearchResult, Tried


def search_and_print(args: argparse.Namespace, run: RunConfig, model: Any, topology: Topology) -> None:
    """Searches as `args` ask for, prints what was found, and writes it."""
    from llama_jax.train.planning.search import search

    result = search(
        run,
        model,
        topology,
        top=args.top or 3,
        timeout=args.timeout,
        compiled=not args.fast,
        use_cache=not args.no_cache,
        progress=terminal.note,
    )
    text = None if result.best is None else result.toml()
    if args.out and text is not None:
        write_atomically(Path(args.out), text)
    if args.json:
        output.print_json(_as_json(args, result))
    else:
        _print(args, result)
        if text is not None and not args.out:
            print(text)
    if args.out and text is not None:
        terminal.note(f"written: {args.out}; llama-jax train {args.out} trains with it")


def _print(args: argparse.Namespace, result: SearchResult) -> None:
    ranking = result.ranking
    shown = list(result.tried) or ([result.best] if result.best else [])
    rows = [_row(one, "best" if one is result.best else "") for one in shown]
    if result.given is not None:
        rows.append(_row(result.given, "as given" + (", best" if result.given is result.best else "")))
    header = ("settings", "", "a step", "MFU", "HBM per chip", "arithmetic", "refused")
    output.print_table(rows, header, right=(2, 3, 4, 5))
    print(
        f"{ranking.considered:,} candidates, {ranking.too_large:,} of them too large, in "
        f"{duration(result.seconds)}."
    )
    if result.best is None:
        print("Nothing fits on this slice: take a larger one.")
    elif (price := budget(result.best.plan, args.tokens, args.price)).dollars is not None:
        print(f"The best trains the run in {price.days:,.1f} days, for ${price.dollars:,.0f}.")
    for note in result.notes:
        terminal.note(note)


def _row(one: Tried, kind: str) -> tuple[str, ...]:
    plan = one.compiled
    by_arithmetic = seconds_text(one.candidate.plan.step_seconds)
    if plan is None:
        return (one.candidate.name, kind, "", "", "", by_arithmetic, one.reason)
    size = terminal.human_bytes(plan.memory.peak)
    step = seconds_text(plan.step_seconds)
    return (one.candidate.name, kind, step, f"{plan.mfu:.1%}", size, by_arithmetic, "")


def _as_json(args: argparse.Namespace, result: SearchResult) -> dict[str, Any]:
    def plain(one: Tried | None) -> dict[str, Any] | None:
        if one is None:
            return None
        inputs, plan = one.candidate.inputs, one.plan
        return {
            "mesh": dict(inputs.mesh),
            "remat": inputs.remat,
            "gradient_accumulation_steps": inputs.accumulation,
            "compiler_flags": dict(one.flags),
            "source": plan.source,
            "step_seconds": plan.step_seconds,
            "mfu": plan.mfu,
            "peak_bytes": plan.memory.peak,
            "reason": one.reason,
        }

    return {
        "config": args.config,
        "best": plain(result.best),
        "given": plain(result.given),
        "tried": [plain(one) for one in result.tried],
        "considered": result.ranking.considered,
        "too_large": result.ranking.too_large,
        "seconds": result.seconds,
        "notes": list(result.notes),
        "run": None
        if result.best is None
        else dataclasses.asdict(budget(result.best.plan, args.tokens, args.price)),
    }
