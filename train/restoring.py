"""The state of a run's newest checkpoint, as the settings of this start have it."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from llama_jax.weights.runs import StepMetadata

from .checkpoints.checkpoints import Checkpoints, Restored
from .config.optimizer import OptimizerConfig
from .state import TrainState, residual_parts, with_ema, with_residual


def restore_state(
    checkpoints: Checkpoints,
    abstract: TrainState,
    optimizer: OptimizerConfig,
    mesh: Mesh | None,
    started: StepMetadata | None,
) -> Restored | None:
    """The newest intact checkpoint; where the optimizer's settings allow it, its state as they are now.

    Args:
      checkpoints: those of the run.
      abstract: the state of this start.
      optimizer: its settings.
      mesh: its mesh.
      started: the record of the run; None if it has none.

    Raises:
      CheckpointError: if every step is damaged, or the step is of another model or optimizer.
    """
    if started is None:
        return checkpoints.restore(abstract)
    saved = started.run.get("settings", {})
    had_ema = saved.get("optimizer.ema_decay", optimizer.ema_decay) > 0
    refrozen = saved.get("optimizer.freeze", list(optimizer.freeze)) != list(optimizer.freeze)
    parts = residual_parts(abstract)

    def may_differ(name: str) -> bool:
        return name.startswith("residual.") or (refrozen and name.startswith("opt_state."))

    restored = checkpoints.restore(
        with_ema(abstract, had_ema),
        may_differ,
        lambda state, saved_parts: with_residual(state, saved_parts, mesh) if parts else state,
    )
    if restored is None:
        return None
    state = with_residual(with_ema(restored.state, optimizer.ema_decay > 0), parts, mesh)
    return dataclasses.replace(restored, state=state)
