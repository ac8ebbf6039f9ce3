"""A model run over one text a layer at a time, each layer's weights there only while they are needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import rope
from llama_jax.attention import AttentionMask, attention
from llama_jax.config import LlamaConfig
from llama_jax.layers import Block, rms_norm, unembed
from llama_jax.weights.names import LEAVES, Leaf

Tensor = np.ndarray


class Run(Protocol):
    """A run over a text of T tokens, fed with tensors as Hugging Face lays them out.

    Each step returns the residual stream after it, f32 [T, D].
    """

    def embed(self, table: Tensor) -> np.ndarray:
        """Looks the tokens up in the embedding table [V, D]."""

    def layer(self, tensors: Mapping[Leaf, Tensor]) -> np.ndarray:
        """Takes the stream through the next layer."""

    def logits(self, norm: Tensor, output: Tensor) -> np.ndarray:
        """Ends the run: the final norm [D] and the output projection [V, D] give the logits, f32 [T, V]."""


class Stream:
    """A run by llama_jax: what `forward` does, from the same parts.

    Args:
      config: the model.
      tokens: int [T].
      dtype: to compute in, as `forward` has it.
    """

    def __init__(self, config: LlamaConfig, tokens: np.ndarray, dtype: np.dtype[Any]) -> None:
        self._config, self._tokens, self._dtype = config, tokens, dtype
        self._x = jnp.zeros(())

    def embed(self, table: Tensor) -> np.ndarray:
        self._x = jnp.asarray(table[self._tokens][None], self._dtype)
        return self._stream()

    def layer(self, tensors: Mapping[Leaf, Tensor]) -> np.ndarray:
        self._x = _layer(self._config, {leaf.path: tensor for leaf, tensor in tensors.items()}, self._x)
        return self._stream()

    def logits(self, norm: Tensor, output: Tensor) -> np.ndarray:
        return np.asarray(_logits(self._config, norm, output, self._x)[0])

    def _stream(self) -> np.ndarray:
        return np.asarray(self._x[0], np.float32)


@functools.partial(jax.jit, static_argnames="config")
def _layer(config: LlamaConfig, stored: dict[tuple[str, ...], jax.Array], x: jax.Array) -> jax.Array:
    """One block over x [1, T, D]; its weights become leaves of `params` in here, where XLA need not copy."""
    order = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    where = AttentionMask(order, order)
    out, _ = Block(config).apply(
        {"params": _tree(config, stored, x.dtype)},
        x,
        rope.rotary(config, order),
        lambda q, k, v: (attention(q, k, v, where), None),
    )
    return out


def _tree(config: LlamaConfig, stored: dict[tuple[str, ...], jax.Array], dtype: jnp.dtype) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf in LEAVES:
        if not leaf.per_layer:
            continue
        _, module, name = leaf.path
        array = stored[leaf.path]
        array = array.T if "->" in leaf.axes else array
        tree.setdefault(module, {})[name] = array.reshape(leaf.shape(config)).astype(dtype)
    return tree


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: LlamaConfig, norm: jax.Array, output: jax.Array, x: jax.Array) -> jax.Array:
    x = rms_norm(x, norm.astype(x.dtype), eps=config.rms_norm_eps)
    return unembed(x, {"embed": {"embedding": output.astype(x.dtype)}})
