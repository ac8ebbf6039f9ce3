"""The facts of a run that its step's cost depends on."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from llama_jax import LlamaConfig, adapters, init
from llama_jax.errors import ConfigError
from llama_jax.meshes import ALL_AXES, mesh_sizes
from llama_jax.ops import int8_sum
from llama_jax.ops.compiler_flags import LIBTPU_FLAGS
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.topology import Topology

from ..config.run import RunConfig
from ..devices import check_quantization, compute_dtype
from ..teacher import teacher_config
from .shape import reward_models_of, spec_of

_GRADIENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": int8_sum.BYTES}
SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Bytes of a frozen base weight: NF4 has an f32 scale for 64 weights, int8 one for each output.
_BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5625}
# Bytes of optimizer state per trained parameter. Muon's matrices, nearly all parameters, have one moment;
# Adafactor's are factored into rows and columns.
_OPTIMIZER_BYTES = {"adamw": 8.0, "lion": 4.0, "muon": 4.0, "adafactor": 0.1}


def step_inputs(
    run: RunConfig, model: LlamaConfig, topology: Topology, *, compiler_flags: Mapping[str, str] = {}
) -> StepInputs:
    """The inputs of `llama_jax.plan.estimate.estimate` for a run.

    Args:
      run: the run's configuration.
      model: the model that it trains.
      topology: the slices that it is planned for.
      compiler_flags: values of libtpu's flags by name, beside those that every run sets.

    Raises:
      ConfigError: if the mesh does not fit the slices, or the batch the mesh.
      CheckpointError: if the teacher of a distillation cannot be read.
    """
    flags = {**LIBTPU_FLAGS.get(topology.kind, {}), **compiler_flags}
    if (chip := CHIPS.get(topology.kind)) is None:
        raise ConfigError(f"chip {topology.kind!r} is unknown; plan for {', '.join(CHIPS)}")
    check_quantization(run.train, f"TPU {topology.kind}", has_fp8=chip.fp8_speed > 0)
    train, spec = run.train, spec_of(run, model)
    given = {name: getattr(run.mesh, name) for name in ALL_AXES}
    whole_copy = spec.reference and spec.adapter is None
    mesh = mesh_sizes(given, topology.chips * chip.devices)
    run.mesh.residual_parts(mesh["data"])  # raises
    return StepInputs(
        model=model,
        topology=topology,
        mesh=mesh,
        global_batch_size=train.global_batch_size,
        seq_len=train.seq_len,
        steps=train.steps,
        accumulation=train.gradient_accumulation_steps,
        remat=train.remat,
        loss_chunks=train.loss_chunks,
        compute_bytes=compute_dtype(train, "tpu").itemsize,
        optimizer_bytes=_OPTIMIZER_BYTES[run.optimizer.name],
        quantization=train.quantization,
        gradient_bytes=_GRADIENT_BYTES[run.mesh.gradient_dtype],
        trained=None if spec.adapter is None else adapter_size(spec.adapter, model),
        base_bytes=_BASE_BYTES[spec.base],
        reference=run.runs_reference,
        reference_bytes=4.0 if whole_copy else 0.0,
        ema=spec.uses_ema,
        value_model=spec.value_model,
        value_trained=None
        if spec.adapter is None or spec.value_model is None
        else adapter_size(spec.adapter, spec.value_model),
        teacher=teacher_config(run),
        beside=reward_models_of(run, model),
        scoped_vmem_kib=int(flags.get(SCOPED_VMEM, 0)),
    )


def adapter_size(settings: adapters.Settings, model: LlamaConfig) -> int:
    """The number of an adapter's parameters, from shapes alone."""

    def make() -> object:
        key = jax.random.key(0)
        return adapters.init(settings, model, init(model, key), key)

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make)))
