"""Adapters as leaves of the parameter tree, where the forward pass finds them.

`llama_jax.adapters` initializes, inserts and removes them.
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
from llama_jax.ops.quantization import CONTRACTED, Quantized

Activation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}
# Every matrix that can have an adapter: its sublayer, and its name in Hugging Face models.
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
    """A matrix W with a low-rank adapter: W + scale a b (LoRA, arXiv 2106.09685).

    In a mixture of experts `base`, `a` and `b` have a leading dimension E: an adapter for each expert.

    Attributes:
      base: W, in its own shape, or quantized.
      a: f32 [I, r].
      b: f32 [r, O].
      scale: f32 [].
      magnitude: f32 [O], the norm of each output's weights (DoRA, arXiv 2402.09353), or None.
      rows: int32 [B], the adapter of each batch row; `a`, `b` and `scale` then have a leading dimension of
        adapters. None: one adapter for all rows.
      name: the name of the matrix in `PROJECTIONS`.
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
        """The same matrix with its inputs or outputs split or merged."""
        return dataclasses.replace(self, base=self.base.reshape(*shape))

    def norms(self) -> jax.Array:
        """f32 [O]: the norm of each output's weights in W + scale a b, without a gradient, as in DoRA."""
        weight, a, b = jax.lax.stop_gradient((inputs_by_outputs(self.base, self.a.shape[0]), self.a, self.b))
        delta = jnp.einsum("ir,ro->io", a, b, preferred_element_type=jnp.float32)
        return jnp.linalg.norm(weight + self.scale * delta, axis=0)


def adapter_specs(name: str) -> tuple[P, P]:
    """Partition specs of `a` [I, r] and `b` [r, O]: those of the inputs and outputs of the matrix."""
    weight_spec = sharding.MATRIX_SPECS[name]
    contracted = CONTRACTED[name]
    outputs = next(axis for axis in range(len(weight_spec)) if axis not in contracted)
    return P(weight_spec[contracted[0]], None), P(None, weight_spec[outputs])


def expert_adapter_specs(weight_spec: P) -> tuple[P, P]:
    """Partition specs of `a` [E, I, r] and `b` [E, r, O] for experts' matrices [E, I, O] of this spec."""
    expert, inputs, outputs = weight_spec
    return P(expert, inputs, None), P(expert, None, outputs)


def inputs_by_outputs(weight: Any, inputs: int) -> jax.Array:
    """One layer's matrix as f32 [I, O]; its first dimensions are the inputs."""
    if isinstance(weight, Quantized):
        return weight.dequantize().astype(jnp.float32).T
    return weight.astype(jnp.float32).reshape(inputs, -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("down", "down_bias", "up", "up_bias"),
    meta_fields=("activation",),
)
@dataclasses.dataclass(frozen=True)
class BottleneckWeights:
    """A bottleneck adapter (arXiv 1902.00751); its leaves have a leading layer axis where layers are stacked.

    Attributes:
      down: f32 [D, M].
      down_bias: f32 [M].
      up: f32 [M, D].
      up_bias: f32 [D].
      activation: the name of the activation function between the two projections.
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    activation: Activation = "silu"

    @property
    def activation_function(self) -> Callable[[jax.Array], jax.Array]:
        return _ACTIVATIONS[self.activation]
