"""Compiles a config's training step for a TPU slice without one: memory, cycles, collectives.

`python -m benchmarks.tpu_compile configs/llama2_7b.toml --topology v5p:2x2x1 [--json] [--section.key VALUE]`
needs `libtpu` and no TPU: every array is abstract, and the compiler is the TPU's. `--shape llama2_70b`
replaces the shape of pretrained weights that are not on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tpu_hlo
from benchmarks.tpu_topology import CHIPS, Topology
from llama_jax.cli import output
from llama_jax.console import terminal
from llama_jax.errors import ConfigError, InputError, LlamaJaxError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not query a TPU VM's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers may run in parallel, since no device is opened
}


# Number of [T, T] x [T, H] products in each of splash attention's kernels, by kernel name.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
KERNEL_SHARE_OF_PEAK = 0.5


def lower_step(run: Any, model: Any, topology: Topology) -> tuple[Any, int]:
    """Lowers the step of a `RunConfig` that trains a `LlamaConfig`.

    Returns:
      The step, a `jax.stages.Lowered`, and how many arrays its state has.

    Raises:
      ConfigError: if mesh, batch or model do not fit the slice.
    """
    import jax

    from llama_jax.sharding import AXES, check_batch, check_mesh, make_mesh, use_mesh
    from llama_jax.train.devices import run_mesh
    from llama_jax.train.step import build_step

    devices = topology.devices()
    mesh = run_mesh(run.mesh, devices) or make_mesh(dict.fromkeys(AXES, 1), devices=devices)
    check_mesh(model, mesh)
    with use_mesh(mesh):
        check_batch(run.train.global_batch_size // run.train.gradient_accumulation_steps)
    step, state, batch, frozen = build_step(run, model, mesh, "tpu")
    with use_mesh(mesh):
        return step.lower(state, batch, frozen), len(jax.tree.leaves(state))


def compile_step(run: Any, model: Any, topology: Topology) -> tuple[Any, int, float]:
    """`lower_step`, compiled.

    Returns:
      The compiled step, how many arrays its state has, and the seconds it took.

    Raises:
      ConfigError: if mesh, batch or model do not fit the slice.
      InputError: if the step needs more memory than a chip has.
    """
    import jax

    start = time.perf_counter()
    lowered, leaves = lower_step(run, model, topology)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(_explain(str(error), run)) from None
    return compiled, leaves, time.perf_counter() - start


def with_rows_per_chip(run: Any, topology: Topology) -> Any:
    """The run with its batch size scaled to a slice other than `mesh.topology`.

    The number of sequences per chip stays the same, so that one config can be compared across slices.
    """
    if not run.mesh.topology:
        return run
    chips, written_for = math.prod(topology.sides), math.prod(Topology.parse(run.mesh.topology).sides)
    batch_size = max(run.train.global_batch_size * chips // written_for, 1)
    if batch_size == run.train.global_batch_size:
        return run
    terminal.note(
        f"batch of {batch_size} sequences: as many per chip as {run.train.global_batch_size} on "
        f"{run.mesh.topology}; --train.global_batch_size overrides it"
    )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, global_batch_size=batch_size))


def model_of(run: Any, shape: str | None) -> Any:
    """The configuration of the model that a run trains; `shape` is a preset to use for `model.init_from`.

    Raises:
      ConfigError: for an unknown shape, or one that is given without `model.init_from`.
      CheckpointError: if the weights are not on this machine, and no shape is given.
    """
    from llama_jax.train.config.run import ModelConfig
    from llama_jax.train.initialization import with_labels

    if shape is None and run.model.init_from:
        from llama_jax.text.pretrained import open_model

        return with_labels(run, open_model(run.model.init_from).config)
    if shape is not None and not run.model.init_from:
        raise ConfigError(f"--shape is {shape!r} and model.init_from is not set: set model.preset instead")
    model_config = run.model if shape is None else ModelConfig(preset=shape)
    return with_labels(run, model_config.build(run.tokenizer.vocab_size or None))


def _explain(message: str, run: Any) -> str:
    """One line for a compiler error."""
    steps = 2 * run.train.gradient_accumulation_steps
    advice = f"try --train.gradient_accumulation_steps {steps}, --train.remat full, or a larger slice"
    program_total = r"Used ([\d.]+\w) of ([\d.]+\w) hbm\. Exceeded hbm capacity by ([\d.]+\w)"
    if found := re.search(program_total, message):
        needs = f"{found[1]} of HBM per chip, which has {found[2]}: {found[3]} too much"
        return f"the step needs {needs}; {advice}"
    temporaries = r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)"
    if found := re.search(temporaries, message):
        needs = f"{found[1]} of HBM per chip in addition to its state, and a chip has {found[2]}"
        return f"the step needs {needs}; {advice}"
    lines = message.strip().splitlines()
    return f"the TPU compiler refused the step: {lines[0][:300] if lines else 'without a reason'}"


def report(compiled: Any, leaves: int, run: Any, model: Any, topology: Topology) -> dict[str, Any]:
    """The cost of the compiled step in bytes, cycles and seconds.

    `seconds` is the compiler's cycle count at the chip's clock rate, plus the attention kernels, which the
    compiler does not estimate, at half of peak FLOP/s. It excludes waiting for collectives:
    `collective_seconds` is a lower bound on the time that the links are busy, which may overlap with
    computation.
    """
    from llama_jax.train.metrics.flops import flops_per_token
    from llama_jax.train.trainable import TrainableSpec

    trainable_spec = TrainableSpec.from_config(run, "tpu")
    module = tpu_hlo.parse(compiled.as_text())
    memory = compiled.memory_analysis()
    found = tpu_hlo.summed(tpu_hlo.collectives(module))
    chips, chip = math.prod(topology.sides), CHIPS.get(topology.kind)
    tokens = run.train.global_batch_size * run.train.seq_len
    rows = run.train.global_batch_size // run.train.gradient_accumulation_steps / chips
    result: dict[str, Any] = {
        "topology": topology.name,
        "chips": chips,
        "tokens_per_step": tokens,
        "peak_hbm_bytes": memory.peak_memory_in_bytes,
        "state_bytes": memory.argument_size_in_bytes,
        "estimated_cycles": tpu_hlo.estimated_cycles(module),
        "collectives": [{k: v for k, v in dataclasses.asdict(c).items() if k != "name"} for c in found],
        "collective_bytes": sum(_moved(one) for one in found),
        "f32_parameter_gathers": sum(c.times for c in found if is_f32_parameter_gather(c)),
        "positions": int(rows * run.train.seq_len),
        "logits_positions": _logits_positions(module, model, run),
        "state_arrays": leaves,
        "donated_arrays": len(tpu_hlo.donated(module) & set(range(leaves))),
    }
    square = rows * model.num_attention_heads * run.train.seq_len**2 * model.head_dim  # causal: half of 2 x
    kernels = square * _kernel_products(module)
    which = {"frozen": trainable_spec.adapter is not None, "reference": trainable_spec.reference}
    per_token = {
        kind: flops_per_token(model, run.train.seq_len, causal=kind, **which) for kind in (True, False)
    }
    result |= {
        "model_flops": per_token[True] * tokens,
        "model_flops_full_attention": per_token[False] * tokens,
    }
    if chip is None:
        return result
    seconds = result["estimated_cycles"] / chip.clock_hz
    seconds += kernels / (KERNEL_SHARE_OF_PEAK * chip.peak_flops)
    links = chip.link_bytes * sum(side > 1 for side in topology.sides) / (1 if topology.wraps else 2)
    peak = seconds * chips * chip.peak_flops
    return result | {
        "seconds": seconds,
        "collective_seconds": result["collective_bytes"] / links if links else 0.0,
        "mfu": result["model_flops"] / peak,
        "mfu_full_attention": result["model_flops_full_attention"] / peak,
        "tokens_per_second_per_chip": tokens / chips / seconds,
    }


def _moved(one: tpu_hlo.Collective) -> int:
    """Minimum number of bytes that each device receives in a step."""
    share = 1.0 if one.group is None else (one.group - 1) / one.group
    return int(one.bytes * one.times * share * (2 if one.kind == "all-reduce" else 1))


def _logits_positions(module: tpu_hlo.Module, model: Any, run: Any) -> int:
    """Maximum number of positions whose logits exist at the same time; `positions` means all of [B, T, V].

    An array of shape hidden_size x vocab_size is the output projection.
    """
    sizes = tpu_hlo.beside(module, model.vocab_size // run.mesh.tensor)
    return max(sizes - {model.hidden_size}, default=0)


def is_f32_parameter_gather(one: tpu_hlo.Collective) -> bool:
    """Whether this all-gathers more than a megabyte of f32 values: a weight, not a statistic."""
    return one.kind == "all-gather" and one.dtype == "f32" and one.bytes > 1_000_000


def _kernel_products(module: tpu_hlo.Module) -> int:
    found = 0
    for instruction, times in tpu_hlo.executed(module):
        if instruction.opcode == "custom-call" and "splash" in instruction.name:
            found += times * sum(n for part, n in KERNEL_PRODUCTS.items() if f"_{part}_" in instruction.name)
    return found


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
    if "seconds" in result:
        rows += [
            ("seconds per step", f"{result['seconds']:.2f} with attention at half of peak; no waiting"),
            (
                "links busy",
                f"{result['collective_seconds']:.2f} s, {size(result['collective_bytes'])} per chip",
            ),
            (
                "MFU estimate",
                f"{result['mfu']:.1%} causal, {result['mfu_full_attention']:.1%} full attention",
            ),
            ("tokens/s per chip", f"{result['tokens_per_second_per_chip']:,.0f}"),
        ]
    rows += [
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
    os.environ.update(ENVIRONMENT)
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

        run = load_config(args.config, overrides)
        name = args.topology or run.mesh.topology
        if not name:
            raise ConfigError(
                "no slice to compile for; use --topology, such as v5p:4x4x4, or set mesh.topology"
            )
        topology = Topology.parse(name)
        if not any(argument.startswith("--train.global_batch_size") for argument in overrides):
            run = with_rows_per_chip(run, topology)
        model = model_of(run, args.shape)
        with terminal.spinner(f"compiling for {topology.name} ..."):
            compiled, leaves, seconds = compile_step(run, model, topology)
            result = {
                "config": args.config,
                **report(compiled, leaves, run, model, topology),
                "compile_seconds": seconds,
            }
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
