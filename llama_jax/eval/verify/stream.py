"""Runs a model on one text layer by layer, with only one layer's weights in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import rope
from llama_jax.attention import AttentionMask, attention
from llama_jax.config import LayerKind, LlamaConfig
from llama_jax.layers import Block, rms_norm, unembed
from llama_jax.weights.names import Leaf, leaves

Tensor = np.ndarray


class Run(Protocol):
    """A forward pass over T tokens whose weights are passed in step by step, in Hugging Face's layout.

    Each step returns the residual stream after it, f32 [T, D].
    """

    def embed(self, table: Tensor) -> np.ndarray:
        """Embeds the tokens with the embedding table [V, D]."""

    def layer(self, tensors: Mapping[Leaf, Tensor]) -> np.ndarray:
        """Applies the next layer."""

    def logits(self, norm: Tensor, output: Tensor) -> np.ndarray:
        """Applies the final norm [D] and the output projection [V, D]; returns the logits, f32 [T, V]."""


class LayerwiseRun:
    """The forward pass of llama_jax, equal to `forward`.

    Args:
      config: the model's configuration.
      tokens: int [T].
      dtype: dtype of the computation, as for `forward`.
    """

    def __init__(self, config: LlamaConfig, tokens: np.ndarray, dtype: np.dtype[Any]) -> None:
        self._config, self._tokens, self._dtype = config, tokens, dtype
        self._x = jnp.zeros(())
        self._layers = iter(config.layer_kinds)

    def embed(self, table: Tensor) -> np.ndarray:
        self._x = jnp.asarray(table[self._tokens][None], self._dtype)
        self._layers = iter(self._config.layer_kinds)
        return self._residual()

    def layer(self, tensors: Mapping[Leaf, Tensor]) -> np.ndarray:
        stored = {_key(leaf): tensor for leaf, tensor in tensors.items()}
        self._x = _layer(self._config, next(self._layers), stored, self._x)
        return self._residual()

    def logits(self, norm: Tensor, output: Tensor) -> np.ndarray:
        return np.asarray(_logits(self._config, norm, output, self._x)[0])

    def _residual(self) -> np.ndarray:
        return np.asarray(self._x[0], np.float32)


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _layer(
    config: LlamaConfig, kind: LayerKind, stored: dict[tuple[str, ...], jax.Array], x: jax.Array
) -> jax.Array:
    """One block on x [1, T, D]; the weights' layout is converted under jit, where XLA can avoid copies."""
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    mask = AttentionMask(positions, positions)
    out, _ = Block(config).apply(
        {"params": _block_params(config, stored, x.dtype)},
        x,
        rope.rotary(config, positions) if kind.rope else None,
        lambda q, k, v: (attention(q, k, v, mask, window=kind.window), None),
    )
    return out


def _block_params(
    config: LlamaConfig, stored: dict[tuple[str, ...], jax.Array], dtype: jnp.dtype
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf in leaves(config):
        if not leaf.per_layer:
            continue
        _, module, name = leaf.path
        array = stored[_key(leaf)]
        array = array.T if "->" in leaf.axes and array.ndim == 2 else array
        array = array.reshape(leaf.shape(config)).astype(dtype)
        if leaf.expert is None:
            tree.setdefault(module, {})[name] = array
        else:
            tree.setdefault(module, {}).setdefault(name, []).append(array)
    return {
        module: {name: jnp.stack(x) if isinstance(x, list) else x for name, x in parts.items()}
        for module, parts in tree.items()
    }


def _key(leaf: Leaf) -> tuple[str, ...]:
    return leaf.path if leaf.expert is None else (*leaf.path, str(leaf.expert))


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: LlamaConfig, norm: jax.Array, output: jax.Array, x: jax.Array) -> jax.Array:
    x = rms_norm(x, norm.astype(x.dtype), eps=config.rms_norm_eps)
    return unembed(x, {"embed": {"embedding": output.astype(x.dtype)}})
