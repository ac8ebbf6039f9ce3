"""Rematerialization policies: which activations of a layer are saved for its backward pass.

What each keeps, in bytes, and what it recomputes: docs/training.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from llama_jax.ops.cudnn_attention import saves_residuals

Remat = Literal[
    "none", "save_dots", "save_projections", "save_dots_except_mlp", "attention", "full", "offload"
]

# Names that `checkpoint_name` gives to what the backward pass reads: attention's output with its log-sum-exp,
# the outputs of projections, and `residual`, the sum with the output of the projection after attention.
_ATTENTION = ("attention_out", "splash_residuals")
_NAMES: dict[Remat, tuple[str, ...]] = {
    "save_dots": ("q", "k", "v", *_ATTENTION, "residual", "gate", "up"),
    "save_projections": ("q", "k", *_ATTENTION, "gate", "up"),
    "save_dots_except_mlp": ("q", "k", "v", *_ATTENTION, "residual"),
    "attention": _ATTENTION,
}
_POLICIES: dict[str, Any] = {
    name: jax.checkpoint_policies.save_from_both_policies(
        saves_residuals, jax.checkpoint_policies.save_only_these_names(*names)
    )
    for name, names in _NAMES.items()
} | {
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_NAMES["save_projections"]),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialize(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`step` with a backward pass that recomputes what the policy does not save."""
    if remat == "none":
        return step
    return jax.checkpoint(step, policy=_POLICIES[remat], prevent_cse=False)
