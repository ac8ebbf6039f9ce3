"""Compiles a lowered step, and reads a `StepPlan` off the program."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.plan import collectives, hlo, parts
from llama_jax.plan.chips import CHIPS, GIB
from llama_jax.plan.flops import flops_by_attention
from llama_jax.plan.parts import Shapes
from llama_jax.plan.program import Program, read_program
from llama_jax.plan.result import Memory, StepPlan
from llama_jax.plan.topology import Topology
from llama_jax.plan.weights import parameters_per_chip

from ..config.run import RunConfig
from ..devices import compute_dtype
from ..teacher import teacher_config
from .errors import OutOfMemory
from .lowering import LoweredStep
from .shape import reward_models_of, spec_of

_LARGEST = 40  # operations in `details`
_HLO_NAMES = {"bfloat16": "bf16", "float32": "f32"}
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def compile_step(step: LoweredStep, run: RunConfig) -> Any:
    """The step as a `jax.stages.Compiled`.

    Raises:
      OutOfMemory: if it needs more memory than a chip has.
      InputError: if the compiler refuses it for another reason.
    """
    try:
        return step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(str(error), run) from None


def refusal(message: str, run: RunConfig) -> InputError:
    """The error for a compiler's message."""
    steps = 2 * run.train.gradient_accumulation_steps
    advice = f"try --train.gradient_accumulation_steps {steps}, --train.remat full, or a larger slice"
    program_total = r"Used ([\d.]+\w) of ([\d.]+\w) hbm\. Exceeded hbm capacity by ([\d.]+\w)"
    if found := re.search(program_total, message):
        needs = f"{found[1]} of HBM per chip, which has {found[2]}: {found[3]} too much"
        return OutOfMemory(
            f"the step needs {needs}; {advice}", needed=_bytes(found[1]), capacity=_bytes(found[2])
        )
    temporaries = r"temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)"
    if found := re.search(temporaries, message):
        needs = f"{found[1]} of HBM per chip in addition to its state, and a chip has {found[2]}"
        return OutOfMemory(
            f"the step needs {needs}; {advice}", needed=_bytes(found[1]), capacity=_bytes(found[2])
        )
    lines = message.strip().splitlines()
    return InputError(f"the TPU compiler refused the step: {lines[0][:300] if lines else 'without a reason'}")


def _bytes(text: str) -> float:
    """`95.74G` as bytes."""
    return float(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else float(text)


def read_plan(
    compiled: Any, step: LoweredStep, run: RunConfig, model: LlamaConfig, topology: Topology
) -> StepPlan:
    """The cost of a compiled step.

    Args:
      compiled: of `compile_step`.
      step: what was compiled.
      run: the run's configuration.
      model: the model that it trains.
      topology: the slices.
    """
    chip, mesh = CHIPS[topology.kind], dict(step.mesh.shape)
    program = read_program(
        compiled.as_text(),
        mesh,
        _places(step.mesh, topology),
        topology,
        Shapes.of(model, mesh["tensor"], run.train.seq_len),
        _HLO_NAMES[compute_dtype(run.train, "tpu").name],
    )
    tokens = run.train.global_batch_size * run.train.seq_len
    spec = spec_of(run, model)
    flops = flops_by_attention(
        model,
        run.train.seq_len,
        frozen=spec.adapter is not None,
        reference=run.runs_reference,
        teacher=teacher_config(run),
        value_model=spec.value_model,
    )
    return StepPlan(
        source="compiled",
        topology=topology.name,
        chips=topology.chips,
        mesh=mesh,
        tokens_per_step=tokens,
        steps=run.train.steps,
        memory=_memory(program.module, compiled, step, run, model, topology),
        parts=parts.summed(program.operations, chip),
        traffic=program.traffic,
        launch_seconds=program.launch_seconds,
        peak_flops=chip.peak_flops,
        model_flops=flops["causal"] * tokens,
        model_flops_full_attention=flops["full"] * tokens,
        notes=_notes(topology, model),
        details=_details(program, compiled, step, run, model, topology),
    )


def _places(mesh: Mesh, topology: Topology) -> list[tuple[int, ...]]:
    """Slice, coordinates and core of each device."""
    return [
        (
            getattr(device, "slice_index", None) or 0,
            *device.coords[: len(topology.sides)],
            device.core_on_chip,
        )
        for device in mesh.devices.flat
    ]


def _memory(
    module: hlo.Module,
    compiled: Any,
    step: LoweredStep,
    run: RunConfig,
    model: LlamaConfig,
    topology: Topology,
) -> Memory:
    """HBM of a chip: the state by its shapes, the rest by the program's."""
    chip, mesh = CHIPS[topology.kind], dict(step.mesh.shape)
    state = step.state
    trained = shard_bytes(state.params)
    resident = sum(parameters_per_chip(one, mesh) for one in reward_models_of(run, model))
    beside = compute_dtype(run.train, "tpu").itemsize * resident
    parameters = trained + shard_bytes(state.moved) + shard_bytes(step.frozen) + beside
    everything = shard_bytes(state)
    optimizer = everything - trained - shard_bytes(state.moved)
    # The sums over microbatches, and those of the one that is computed.
    gradients = trained * (2 if run.train.gradient_accumulation_steps > 1 else 1)
    kept = shard_shapes((state.params, step.frozen))
    activations = saved_bytes(module, model.num_hidden_layers, kept)
    positions = logits_positions(module, model, mesh["tensor"])
    logit_bytes = 4 + compute_dtype(run.train, "tpu").itemsize  # and the gradient's
    logits = logit_bytes * positions * model.vocab_size / mesh["tensor"]
    peak = float(compiled.memory_analysis().peak_memory_in_bytes) + beside
    known = parameters + optimizer + gradients + activations + logits
    return Memory(
        parameters=parameters * chip.devices,
        optimizer=optimizer * chip.devices,
        gradients=gradients * chip.devices,
        activations=activations * chip.devices,
        logits=logits * chip.devices,
        temporaries=max(peak - known, 0.0) * chip.devices,
        peak=peak * chip.devices,
        capacity=chip.hbm_bytes,
    )


def shard_bytes(tree: Any) -> float:
    """The bytes of one device's shards of abstract arrays."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf)
            for leaf in jax.tree.leaves(tree)
        )
    )


def _itemsize(leaf: Any) -> float:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8.0
    return 0.5 if leaf.dtype in ("int4", "uint4") else float(leaf.dtype.itemsize)


def shard_shapes(tree: Any) -> set[tuple[int, ...]]:
    """The sorted dimensions of one device's shards of abstract arrays, and of the whole arrays."""
    leaves = jax.tree.leaves(tree)
    return {
        tuple(sorted(shape))
        for leaf in leaves
        for shape in (leaf.sharding.shard_shape(leaf.shape), leaf.shape)
    }


def saved_bytes(module: hlo.Module, layers: int, kept: set[tuple[int, ...]]) -> float:
    """Bytes that a loop over the layers carries for the backward pass: its stacks that are no parameters."""
    return max(
        (
            sum(
                math.prod(dims) * hlo.ITEM_BYTES.get(dtype, 1)
                for dtype, dims in one.arrays
                if len(dims) > 2 and dims[0] == layers and tuple(sorted(dims)) not in kept
            )
            for one, _ in hlo.executed(module)
            if one.opcode == "while" and hlo.trip_count(module, one) == layers
        ),
        default=0.0,
    )


def logits_positions(module: hlo.Module, model: LlamaConfig, tensor: int) -> int:
    """Maximum number of positions whose logits exist at the same time on a device.

    An array of shape hidden_size x vocab_size is the output projection.
    """
    sizes = hlo.beside(module, model.vocab_size // tensor)
    return max(sizes - {model.hidden_size}, default=0)


def is_f32_parameter_gather(one: collectives.Collective) -> bool:
    """Whether this all-gathers more than a megabyte of f32 values: a weight, not a statistic."""
    return one.kind == "all-gather" and one.dtype == "f32" and one.bytes > 1_000_000


def _notes(topology: Topology, model: LlamaConfig) -> tuple[str, ...]:
    chip = CHIPS[topology.kind]
    source = chip.kernel_source or "an assumption"
    notes = [
        f"Attention kernels are taken at {chip.kernel_share:.0%} of peak ({source}); all else is the "
        "compiler's own estimate.",
        "Not modelled: input from the host, checkpoints, evaluation, stragglers.",
    ]
    if model.num_experts:
        notes.append(
            f"Products of experts (XLA's ragged-dot kernel) are taken at {parts.GROUPED_SHARE:.0%} of peak, "
            "an assumption."
        )
    if topology.slices > 1:
        notes.append(
            "The compiler takes the links of several slices for open chains and gathers weights by summing; "
            "the time of gathers is given. Other traffic between slices is not modelled."
        )
    return tuple(notes)


def _details(
    program: Program,
    compiled: Any,
    step: LoweredStep,
    run: RunConfig,
    model: LlamaConfig,
    topology: Topology,
) -> dict[str, object]:
    """Laws of the program, and its largest operations."""
    module, found, computed = program.module, program.collectives, program.operations
    leaves = len(jax.tree.leaves(step.state))
    mesh = dict(step.mesh.shape)
    rows = run.train.global_batch_size / run.train.gradient_accumulation_steps / math.prod(mesh.values())
    memory = compiled.memory_analysis()
    largest = sorted(computed, key=lambda one: -one.seconds * one.times)[:_LARGEST]
    return {
        "estimated_cycles": hlo.estimated_cycles(module),
        "state_bytes": memory.argument_size_in_bytes,
        "collectives": [
            {k: v for k, v in dataclasses.asdict(c).items() if k not in ("name", "groups", "pairs")}
            for c in collectives.summed(found)
        ],
        "collective_bytes": sum(one.moved for one in found),
        "asynchronous_share": collectives.asynchronous_share(found),
        "dcn_bytes": collectives.sent_between_slices(module),
        "f32_parameter_gathers": sum(one.times for one in found if is_f32_parameter_gather(one)),
        "positions": int(rows * run.train.seq_len),
        "logits_positions": logits_positions(module, model, mesh["tensor"]),
        "state_arrays": leaves,
        "donated_arrays": len(hlo.donated(module) & set(range(leaves))),
        "operations": [
            {
                "name": one.instruction.name,
                "source": parts.source(one.instruction),
                "part": one.part,
                "times": one.times,
                "seconds": one.seconds * one.times,
                "flops": one.flops * one.times,
            }
            for one in largest
        ],
    }
