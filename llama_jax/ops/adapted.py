"""Adapters as the forward pass sees them: leaves that take a matrix's place in the parameter tree.

`llama_jax.adapters` makes, attaches and takes them apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops.quantization import SUMMED, Quantized

Activation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
# Every matrix that can have an adapter: where it is, and what Hugging Face calls it.
PROJECTIONS: Mapping[str, tuple[str, str]] = {
    "wq": ("attention", "q_proj"),
    "wk": ("attention", "k_proj"),
    "wv": ("attention", "v_proj"),
    "wo": ("attention", "o_proj"),
    "w_gate": ("feed_forward", "gate_proj"),
    "w_up": ("feed_forward", "up_proj"),
    "w_down": ("feed_forward", "down_proj"),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "a", "b", "scale", "magnitude", "rows"),
    meta_fields=("name",),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix W with an adapter: W + scale a b, in the matrix's place in the parameter tree.

    Attributes:
      base: W, as the model knows it, or quantised.
      a: f32 [I, r].
      b: f32 [r, O].
      scale: f32 [].
      magnitude: f32 [O], the norms of the outputs' weights (DoRA), or None.
      rows: int32 [B], which of several adapters each row of a batch has; `a`, `b` and `scale` then have a
        leading dimension of adapters. None: one for all.
      name: the matrix's, one of `PROJECTIONS`.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None
    rows: jax.Array | None = None
    name: str = ""

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def reshape(self, *shape: int) -> Adapted:
        """The same matrix with its inputs or outputs named as one dimension or several."""
        return dataclasses.replace(self, base=self.base.reshape(*shape))

    def norms(self) -> jax.Array:
        """f32 [O]: the norm of each output's weights in W + scale a b, without a gradient, as DoRA has it."""
        weight, a, b = jax.lax.stop_gradient((inputs_by_outputs(self.base, self.a.shape[0]), self.a, self.b))
        delta = jnp.einsum("ir,ro->io", a, b, preferred_element_type=jnp.float32)
        return jnp.linalg.norm(weight + self.scale * delta, axis=0)


def specs(name: str) -> tuple[P, P]:
    """How `a` [I, r] and `b` [r, O] of a matrix lie over a mesh: as its inputs and outputs do."""
    stored = sharding.LAYER_SPECS[PROJECTIONS[name][0]][name]
    summed = SUMMED[name]
    outputs = next(axis for axis in range(len(stored)) if axis not in summed)
    return P(stored[summed[0]], None), P(None, stored[outputs])


def inputs_by_outputs(weight: Any, inputs: int) -> jax.Array:
    """f32 [I, O] of one layer's matrix, whose inputs come first."""
    if isinstance(weight, Quantized):
        return weight.dense().astype(jnp.float32).T
    return weight.astype(jnp.float32).reshape(inputs, -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("down", "down_bias", "up", "up_bias"),
    meta_fields=("activation",),
)
@dataclasses.dataclass(frozen=True)
class Network:
    """One adapter, as it stands in the parameter tree; with a leading layer axis where layers are stacked.

    Attributes:
      down: f32 [D, M].
      down_bias: f32 [M].
      up: f32 [M, D].
      up_bias: f32 [D].
      activation: between the two.
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    activation: Activation = "silu"

    @property
    def function(self) -> Callable[[jax.Array], jax.Array]:
        return _ACTIVATIONS[self.activation]
