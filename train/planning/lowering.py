"""The step of a run, lowered for a TPU slice from abstract arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.meshes import AXES, make_mesh
from llama_jax.plan.topology import Topology
from llama_jax.sharding import check_batch, check_mesh, use_mesh

from ..config.run import RunConfig
from ..devices import run_mesh
from ..step import build_step
from .shape import spec_of


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step that can be compiled.

    Attributes:
      lowered: a `jax.stages.Lowered`.
      mesh: of the slice's devices.
      state: the abstract `TrainState`, whose leaves are the program's first parameters.
      frozen: abstract parameters that the step reads and does not change; None for none.
    """

    lowered: Any
    mesh: Mesh
    state: Any
    frozen: Any


def lower_step(run: RunConfig, model: LlamaConfig, topology: Topology) -> LoweredStep:
    """Lowers the step of a run.

    Raises:
      ConfigError: if mesh, batch or model do not fit the slice.
      InputError: if there is no such slice.
    """
    devices = topology.devices()
    mesh = run_mesh(run.mesh, devices) or make_mesh(dict.fromkeys(AXES, 1), devices=devices)
    check_mesh(model, mesh)
    with use_mesh(mesh):
        check_batch(run.train.global_batch_size // run.train.gradient_accumulation_steps)
    spec = spec_of(run, model)
    if spec.value_model is not None:
        check_mesh(spec.value_model, mesh)
    step, state, batch, frozen = build_step(run, model, mesh, "tpu", spec)
    with use_mesh(mesh):
        return LoweredStep(step.lower(state, batch, frozen), mesh, state, frozen)
