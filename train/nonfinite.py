"""Reports which parameters and gradients are not finite on a batch, for the dump of a run that diverged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig

from .config.run import RunConfig
from .objectives import make_loss_fn
from .trainable import Frozen, TrainableSpec


def make_find_nonfinite(
    run: RunConfig, model: LlamaConfig, platform: str, spec: TrainableSpec, frozen: Frozen
) -> Callable[[Any, Any], dict[str, Any]]:
    """Makes the function of trainable parameters and a batch that counts values that are not finite."""
    loss_fn = spec.wrap(make_loss_fn(run, model, platform))

    def total_loss(trainable: Any, frozen: Frozen, batch: Any) -> jax.Array:
        return loss_fn(trainable, frozen, batch).total

    def find_nonfinite(trainable: Any, batch: Any) -> dict[str, Any]:
        grads = jax.jit(jax.grad(total_loss))(trainable, frozen, batch)
        report = {}
        for name, tree in (("parameters", trainable), ("gradients", grads)):
            counts = {
                jax.tree_util.keystr(path, simple=True, separator="."): int(jnp.sum(~jnp.isfinite(leaf)))
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }
            report[f"not_finite_in_{name}"] = {path: count for path, count in counts.items() if count}
        return report

    return find_nonfinite
