"""Compiles a config's training step for a TPU slice without one: memory, cycles, collectives.

`python -m benchmarks.tpu_compile configs/llama2_7b.toml --topology v5p:2x2x1 [--json] [--section.key VALUE]`
needs `libtpu` and no TPU: every array is abstract, and the compiler is the TPU's. `--shape llama2_70b`
replaces the shape of pretrained weights that are not on this machine. A view of
`llama_jax.train.planning.plan_compiled` with its computation alone, as if nothing were waited for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from llama_jax.cli import output
from llama_jax.console import terminal
from llama_jax.errors import ConfigError, LlamaJaxError
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.parts import ATTENTION
from llama_jax.plan.result import StepPlan
from llama_jax.plan.topology import Topology


def report(plan: StepPlan) -> dict[str, Any]:
    """The cost of the compiled step in bytes, cycles and seconds.

    `seconds` and `mfu` exclude waiting for collectives, with attention kernels at half of peak; `mfu_exposed`
    is the plan's, with waiting.
    """
    kernels = sum(part.seconds for part in plan.parts if part.name == ATTENTION)
    # Whatever share of peak the plan gives attention kernels, half here: so are the figures compared with.
    seconds = plan.compute_seconds + kernels * (CHIPS[plan.chip].kernel_share / 0.5 - 1)
    mfu = plan.model_flops / (seconds * plan.chips * plan.peak_flops)
    return {
        "topology": plan.topology,
        "chips": plan.chips,
        "tokens_per_step": plan.tokens_per_step,
        "peak_hbm_bytes": plan.memory.peak,
        **{name: value for name, value in plan.details.items() if name != "operations"},
        "model_flops": plan.model_flops,
        "model_flops_full_attention": plan.model_flops_full_attention,
        "seconds": seconds,
        "collective_seconds": sum(one.seconds for one in plan.traffic),
        "exposed_seconds": plan.exposed_seconds,
        "mfu": mfu,
        "mfu_full_attention": mfu * plan.model_flops_full_attention / plan.model_flops,
        "mfu_exposed": plan.mfu,
        "tokens_per_second_per_chip": plan.tokens_per_step / plan.chips / seconds,
    }


def print_report(result: dict[str, Any]) -> None:
    """Prints the report as tables."""
    size = terminal.human_bytes
    rows = [
        ("slice", f"{result['topology']}, {result['chips']} chips"),
        ("tokens per step", f"{result['tokens_per_step']:,}"),
        (
            "peak HBM per chip",
            f"{size(result['peak_hbm_bytes'])}, {size(result['state_bytes'])} of which state",
        ),
        ("estimated cycles", f"{result['estimated_cycles']:.3e}"),
    ]
    rows += [
        ("seconds per step", f"{result['seconds']:.2f}, and {result['exposed_seconds']:.2f} of waiting"),
        ("links busy", f"{result['collective_seconds']:.2f} s, {size(result['collective_bytes'])} per chip"),
        ("MFU estimate", f"{result['mfu']:.1%} causal, {result['mfu_full_attention']:.1%} full attention"),
        ("with waiting", f"{result['mfu_exposed']:.1%} causal"),
        ("tokens/s per chip", f"{result['tokens_per_second_per_chip']:,.0f}"),
    ]
    if result["dcn_bytes"]:
        rows.append(("to other slices", f"{size(result['dcn_bytes'])} per chip"))
    rows += [
        (
            "asynchronous",
            f"{result['asynchronous_share']:.1%} of the bytes of all-gathers and reduce-scatters",
        ),
        (
            "logits in memory",
            f"of {result['logits_positions']:,} positions of a microbatch's {result['positions']:,}",
        ),
        ("donated", f"{result['donated_arrays']} of {result['state_arrays']} state arrays"),
        ("f32 weight all-gathers", str(result["f32_parameter_gathers"])),
        ("compile time", f"{result['compile_seconds']:.0f} s"),
    ]
    output.print_table(rows, ("", result["config"]))
    print()
    collectives = [
        (
            c["kind"],
            c["dtype"],
            size(c["bytes"]),
            str(c["group"] or ""),
            str(c["times"]),
            "yes" if c["overlapped"] else "",
        )
        for c in result["collectives"]
    ]
    output.print_table(
        collectives, ("collective", "dtype", "bytes", "devices", "times", "async"), right=(2, 3, 4)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_compile", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="a run's TOML file")
    parser.add_argument(
        "--topology", metavar="NAME", help="such as v5p:4x4x4 or v5p-128 (default: mesh.topology)"
    )
    parser.add_argument(
        "--shape", metavar="PRESET", help="shape of model.init_from, if its weights are not here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    args, overrides = parser.parse_known_args(argv)
    try:
        from llama_jax.train.config.read import load_config
        from llama_jax.train.planning import model_of, plan_compiled, with_rows_per_chip

        run = load_config(args.config, overrides)
        name = args.topology or run.mesh.topology
        if not name:
            raise ConfigError(
                "no slice to compile for; use --topology, such as v5p:4x4x4, or set mesh.topology"
            )
        topology = dataclasses.replace(Topology.parse(name), slices=run.mesh.slices)
        given = run.train.global_batch_size
        if not any(argument.startswith("--train.global_batch_size") for argument in overrides):
            run = with_rows_per_chip(run, topology)
        model = model_of(run, args.shape)
        with terminal.spinner(f"compiling for {topology.name} ..."):
            start = time.perf_counter()
            plan = plan_compiled(run, model, topology)
            seconds = time.perf_counter() - start
        result = {"config": args.config, **report(plan), "compile_seconds": seconds}
        if run.train.global_batch_size != given:
            terminal.note(
                f"batch of {run.train.global_batch_size} sequences: as many per chip as {given} on "
                f"{run.mesh.topology}; --train.global_batch_size overrides it"
            )
    except LlamaJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        if args.json:
            output.print_json(result)
        else:
            print_report(result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
