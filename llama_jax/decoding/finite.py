"""A warning where logits are not finite, with the weights that are the cause."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.decoding.state import GenerateOutput


def checked_tokens(params: Any, out: GenerateOutput) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [B, T] and lengths [B] of an output; warns if its log-probabilities are NaN."""
    warn_if_not_finite(params, out.logprobs)
    return np.asarray(out.tokens), np.asarray(out.lengths)


def warn_if_not_finite(params: Any, logprobs: jax.typing.ArrayLike) -> None:
    """Warns, naming tensors, if log-probabilities are NaN: the tokens mean nothing then.

    Args:
      params: the parameters that they were computed with, which are searched only in that case.
      logprobs: of generated tokens, any shape.
    """
    if not np.isnan(np.asarray(logprobs)).any():
        return
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not bool(jnp.isfinite(leaf).all())
    ]
    if not names:
        problem = "though every weight is: the model's activations overflow; use float32 or bfloat16"
    else:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        problem = f"because {names[0]}{more} in the weights holds NaN or infinity; take a fresh copy of them"
    warnings.warn(f"the logits are not finite, {problem}", stacklevel=3)
