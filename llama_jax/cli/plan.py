"""`llama-jax plan`: memory, time and cost of a training step on a TPU slice, or of decoding on one."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli import output
from llama_jax.cli.arguments import full_dtype
from llama_jax.cli.plan_decode import plan_decoding
from llama_jax.console import terminal
from llama_jax.console.files import check_writable
from llama_jax.console.parser import Parser, UsageError, parse_float, parse_positive_int
from llama_jax.errors import ConfigError
from llama_jax.storage.atomic import write_atomically

if TYPE_CHECKING:
    from llama_jax.plan.result import StepPlan
    from llama_jax.plan.table import Budget
    from llama_jax.plan.topology import Topology
    from llama_jax.train.config.run import RunConfig

EXAMPLES = """
llama-jax plan llama2_70b                                    # the slice that the config is written for
llama-jax plan llama2_70b --topology v5p-128 --explain       # 64 chips: what binds each part of the step
llama-jax plan llama2_70b --topology v6e:16x16 --fast        # arithmetic alone, in a second: no libtpu
llama-jax plan llama2_70b --topology v5p:4x4x4 --slices 2 --html plan.html
llama-jax plan llama2_7b --topology v5e-256 --search --out best.toml
llama-jax plan smollm2-135m --decode --topology v5e:2x2 --batch 32 --context 2048
"""
SUMMARY = """\
Plan a training step for a TPU slice that you do not have: HBM of a chip by part, time by part, collectives
by mesh axis and what computation waits for, tokens/s, MFU, days and dollars of the run. The step is compiled
by the real TPU compiler (pip install libtpu), in a process of its own; the answer is kept for the next time.
CONFIG and its settings are those of llama-jax train. Where the batch size is not given, it is scaled to the
chips: as many sequences per chip as on the slice that the config is written for.
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    from llama_jax.train.command import split_settings

    settings, others = split_settings(argv)
    args = _parser().parse(others)
    if args.decode:
        _check_decode(args, settings)
        plan_decoding(args)
        return
    for name in ("batch", "context", "bits", "cache_dtype"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for --decode")
    if args.out and not args.search:
        raise UsageError("--out is for --search, whose winner it is")
    for path in filter(None, (args.html, args.out)):
        check_writable(path)
    run_config, model, topology = _inputs(args, settings)
    if args.search:
        from llama_jax.cli.plan_search import search_and_print

        search_and_print(args, run_config, model, topology)
        return
    plan, alternatives = _plan(args, run_config, model, topology)
    show(plan, args, alternatives)


def _parser() -> Parser:
    parser = Parser("llama-jax plan", SUMMARY, EXAMPLES)
    option = parser.add_argument
    option(
        "config", metavar="CONFIG", help="a run's TOML file or a shipped one's name; with --decode a MODEL"
    )
    option("--topology", metavar="NAME", help="such as v5p:4x4x4 or v5p-128 (default: mesh.topology)")
    option(
        "--slices",
        type=parse_positive_int,
        metavar="N",
        help="slices, along mesh.data (default: mesh.slices)",
    )
    option("--shape", metavar="PRESET", help="shape of model.init_from, if its weights are not here")
    option("--fast", action="store_true", help="by arithmetic alone: no compiler")
    option("--explain", action="store_true", help="say what binds each part, and what would change it")
    option("--html", metavar="FILE", help="also write one self-contained page")
    option("--price", type=_parse_price, metavar="DOLLARS", help="of an hour of a chip (default: list price)")
    option(
        "--tokens", type=_parse_tokens, metavar="N", help="budget, as in 2e12 or 2T (default: train.steps)"
    )
    option("--search", action="store_true", help="search meshes, remat policies, microbatches, VMEM limits")
    option("--top", type=parse_positive_int, metavar="N", help="candidates to compile (default: 3)")
    option("--out", metavar="FILE", help="write the config that --search finds")
    option("--no-cache", action="store_true", help="compile again, though nothing has changed")
    option("--timeout", type=parse_positive_int, metavar="SECONDS", help="of a compile, or of the search")
    option("--decode", action="store_true", help="plan prefill and decoding of a MODEL, or of a preset")
    option(
        "--batch", type=parse_positive_int, metavar="B", help="with --decode: sequences (default: a table)"
    )
    option(
        "--context", type=parse_positive_int, metavar="S", help="with --decode: tokens (default: the model's)"
    )
    option(
        "--bits", type=parse_positive_int, choices=(4, 8, 16), help="with --decode: of weights (default: 16)"
    )
    option(
        "--cache-dtype",
        type=full_dtype,
        choices=("bfloat16", "int8", "float8_e4m3fn"),
        help="with --decode; fp8 is float8_e4m3fn (default: bfloat16)",
    )
    option("--mesh", metavar="SIZES", help="with --decode: such as tensor=4 (default: tensor over all chips)")
    parser.add_json()
    parser.set_defaults(batch_note="")
    return parser


def _check_decode(args: argparse.Namespace, settings: Sequence[str]) -> None:
    for name in ("search", "shape", "html", "out", "top", "tokens"):
        if getattr(args, name):
            raise UsageError(f"--{name} plans training; it does not go with --decode")
    if settings:
        raise UsageError(
            f"{settings[0]} is a setting of training; --decode takes a MODEL and its own options"
        )
    if not args.topology:
        raise UsageError("--decode needs --topology, such as v5e:2x2")


def _inputs(args: argparse.Namespace, settings: Sequence[str]) -> tuple[RunConfig, Any, Topology]:
    """The run, its model, and the slices to plan for."""
    from llama_jax.plan.topology import Topology
    from llama_jax.train.command import check_packages, find_config
    from llama_jax.train.config.read import load_config
    from llama_jax.train.planning import model_of, with_rows_per_chip

    check_packages()
    run_config = load_config(find_config(args.config), settings)
    name = args.topology or run_config.mesh.topology
    if not name:
        raise ConfigError("no slice to plan for; give --topology, such as v5p:4x4x4, or set mesh.topology")
    topology = dataclasses.replace(Topology.parse(name), slices=args.slices or run_config.mesh.slices)
    train = run_config.train
    if args.tokens is None:
        args.tokens = train.steps * train.global_batch_size * train.seq_len
    if not any(one.startswith("--train.global_batch_size") for one in settings):
        run_config = with_rows_per_chip(run_config, topology)
    scaled = run_config.train.global_batch_size
    if scaled != train.global_batch_size:
        args.batch_note = (
            f"batch of {scaled} sequences: as many per chip as {train.global_batch_size} on "
            f"{run_config.mesh.topology}; --train.global_batch_size overrides it"
        )
    if args.slices:
        run_config = _with_slices(run_config, args.slices)
    return run_config, model_of(run_config, args.shape), topology


def _with_slices(run_config: RunConfig, slices: int) -> RunConfig:
    """The run on this many slices, which `data` crosses."""
    mesh = run_config.mesh
    data = mesh.data if mesh.data == -1 or mesh.data % slices == 0 else mesh.data * slices
    return dataclasses.replace(run_config, mesh=dataclasses.replace(mesh, slices=slices, data=data))


def _plan(
    args: argparse.Namespace, run_config: RunConfig, model: Any, topology: Topology
) -> tuple[StepPlan, list[tuple[str, StepPlan]]]:
    """The plan, and, if it does not fit, changes of settings that make it fit, by arithmetic."""
    from llama_jax.plan.alternatives import alternatives
    from llama_jax.plan.estimate import estimate
    from llama_jax.train.planning import CompilerMissing, OutOfMemory, plan_compiled
    from llama_jax.train.planning.inputs import step_inputs

    inputs = step_inputs(run_config, model, topology)
    plan = estimated = estimate(inputs)
    if not args.fast:
        try:
            with terminal.spinner(f"compiling for {topology.name} ..."):
                plan = plan_compiled(
                    run_config, model, topology, timeout=args.timeout, use_cache=not args.no_cache
                )
        except CompilerMissing as error:
            terminal.note(f"note: {error}; planned by arithmetic")
        except OutOfMemory as error:
            peak = error.needed or estimated.memory.peak
            memory = dataclasses.replace(estimated.memory, peak=peak, capacity=error.capacity)
            note = "The compiler refused the step for want of memory: times are by arithmetic."
            plan = dataclasses.replace(estimated, memory=memory, notes=(note, *estimated.notes))
    return plan, [] if plan.memory.fits else alternatives(inputs, plan.memory.capacity)


def show(plan: StepPlan, args: argparse.Namespace, alternatives: Sequence[tuple[str, StepPlan]] = ()) -> None:
    """Prints a plan, as `args` ask for it, and writes its page."""
    from llama_jax.plan.explain import explain
    from llama_jax.plan.page import page
    from llama_jax.plan.table import budget, tables

    cost = budget(plan, args.tokens, args.price)
    if args.html:
        write_atomically(Path(args.html), page(plan, cost, Path(args.config).stem))
    if args.json:
        changes = [{"settings": change, **_numbers(other)} for change, other in alternatives]
        output.print_json(as_json(plan, cost) | {"config": args.config, "alternatives": changes})
        return
    for table in tables(plan, cost):
        output.print_table(table.rows, table.header, table.right)
    if not plan.memory.fits:
        _print_alternatives(plan, alternatives)
    if args.explain:
        print("\n".join(explain(plan)))
    else:
        for note in plan.notes:
            terminal.note(note)
    if args.batch_note:
        terminal.note(args.batch_note)
    if args.html:
        terminal.note(f"written: {args.html}")


def as_json(plan: StepPlan, cost: Budget) -> dict[str, Any]:
    """A plan as one JSON object: its fields, and what follows from them."""
    properties = (
        *("chip", "compute_seconds", "exposed_seconds", "step_seconds", "mfu", "mfu_full_attention"),
        *("mfu_without_waiting", "tokens_per_second"),
    )
    result = dataclasses.asdict(plan) | {name: getattr(plan, name) for name in properties}
    result["memory"]["fits"] = plan.memory.fits
    return result | {"run": dataclasses.asdict(cost)}


def _numbers(plan: StepPlan) -> dict[str, float]:
    return {"peak_bytes": plan.memory.peak, "step_seconds": plan.step_seconds, "mfu": plan.mfu}


def _print_alternatives(plan: StepPlan, alternatives: Sequence[tuple[str, StepPlan]]) -> None:
    size = terminal.human_bytes
    over = plan.memory.peak - plan.memory.capacity
    print(f"The step needs {size(over)} a chip more than there is.", end=" ")
    if not alternatives:
        print("No remat policy, number of microbatches or mesh fits on this slice: take a larger one.")
        return
    print("By arithmetic these fit:\n")
    rows = [
        (change, size(other.memory.peak), f"{other.step_seconds:.2f} s", f"{other.mfu:.1%}")
        for change, other in alternatives
    ]
    output.print_table(rows, ("settings", "HBM per chip", "a step", "MFU"), right=(1, 2, 3))


def _parse_price(text: str) -> float:
    value = parse_float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be dollars, 0 or more")
    return value


def _parse_tokens(text: str) -> float:
    """A number of tokens: 2e12, 2T, 300B, 5M."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    unit = units.get(text[-1:].upper())
    value = parse_float(text[:-1] if unit else text) * (unit or 1)
    if not (math.isfinite(value) and value >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, such as 2e12 or 2T")
    return value
