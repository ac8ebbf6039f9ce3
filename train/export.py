"""Writes the adapter of a run, in the formats of other libraries, when the run is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax import LlamaConfig
from llama_jax.weights.adapters import RUN_ADAPTER_DIR
from llama_jax.weights.derived import Head
from llama_jax.weights.run_adapters import BASE_MODEL, CONTEXT, context_fields, portable_path
from llama_jax.weights.write.adapters import save_adapter

from .config.run import RunConfig
from .trainable import TrainableSpec


def export_adapter(
    run: RunConfig, run_dir: Path, model: LlamaConfig, spec: TrainableSpec, trainable: Any, step: int
) -> None:
    """Writes the adapter after a step, gathered from all processes, and its head into the run's directory.

    Does nothing if all weights are trained. Also called for a run that is complete, as a run may be killed
    before its adapter is written.
    """
    if spec.adapter is None:
        return
    if jax.process_count() > 1:
        trainable = multihost_utils.process_allgather(trainable, tiled=True)
    if jax.process_index() > 0:
        return
    head = None
    if model.labels:
        head = Head(np.asarray(trainable["score"]["kernel"]).T, model.labels)
    base_model, relative = portable_path(run.model.init_from, run_dir)
    origin: dict[str, Any] = {"step": step, BASE_MODEL: relative}
    if run.model.extends_context:
        origin[CONTEXT] = context_fields(model)
    save_adapter(
        run_dir / RUN_ADAPTER_DIR,
        spec.adapter,
        {"layers": trainable["layers"]},
        model,
        base_model=base_model,
        replace=True,
        head=head,
        origin=origin,
    )
