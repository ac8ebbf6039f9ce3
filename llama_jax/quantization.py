"""Weight-only quantisation for decoding: int8 with a scale an output, or 4 bits with two numbers a group.

Decoding one row reads every weight once a token, so its speed is that of memory: int8 weights are a quarter
of f32's bytes. A quantised weight takes its matrix's place in the parameter tree, stacked or not, and the
model runs as before; activations, norms and accumulation keep their precision.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import InputError

Bits = Literal[4, 8]
GROUP = 32  # inputs that share a scale in 4 bits, as in GGUF's Q4_1
# Up to so many rows XLA:CPU multiplies int8 faster than it can widen the weights.
_FEW_ROWS = 16

# Which dimensions of each matrix a product sums over. Norms are not quantised.
_SUMMED = {
    "embedding": (1,),
    "kernel": (0,),
    **dict.fromkeys(("wq", "wk", "wv", "w_gate", "w_up", "w_down"), (0,)),
    "wo": (0, 1),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "least"),
    meta_fields=("shape", "summed", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in 8 or 4 bits.

    Attributes:
      values: int8 [O, I], outputs by inputs; or in 4 bits uint8 [O, I / 32, 16], a group's first 16 values in
        the low halves and its others in the high ones.
      scale: f32 [O, 1]: a weight is values * scale; in 4 bits f16 [O, I / 32]: values * scale + least.
      least: f16 [O, I / 32], or None in 8 bits.
      shape: the matrix's own, as the model knows it.
      summed: the dimensions of `shape` that are inputs.
      dtype: what to compute in.
    """

    values: jax.Array
    scale: jax.Array
    least: jax.Array | None
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def reshape(self, *shape: int) -> Quantized:
        """The same matrix with its outputs, or its inputs, named as one dimension or several."""
        count = math.prod(self.shape[axis] for axis in self.summed)
        inputs = tuple(range(next(i for i in range(1, len(shape) + 1) if math.prod(shape[:i]) == count)))
        return dataclasses.replace(self, shape=shape, summed=inputs)

    def gather(self, stored: P) -> Quantized:
        """Gathered over `fsdp`; see `sharding.gather`."""
        out, into = self._spec(stored)
        group = P(out, into if self.least is not None else None)
        return dataclasses.replace(
            self,
            values=sharding.gather(self.values, P(out, into, *(None,) * (self.values.ndim - 2))),
            scale=sharding.gather(self.scale, group),
            least=None if self.least is None else sharding.gather(self.least, group),
        )

    def _spec(self, stored: P) -> tuple[Any, Any]:
        """The mesh axes over which outputs and inputs lie."""
        outputs = [axis for axis in range(len(stored)) if axis not in self.summed]
        return stored[outputs[0]], stored[self.summed[0]]

    def rows(self, ids: jax.Array, out: P | None) -> jax.Array:
        """Outputs `ids` int [...] of an int8 matrix, [..., I] in the compute dtype; NaN outside it."""

        def take(x: jax.Array, fill: float) -> jax.Array:
            at = x.at[ids]
            return at.get(out_sharding=out, mode="fill", fill_value=fill, wrap_negative_indices=False)

        return (take(self.values, 0).astype(jnp.float32) * take(self.scale, jnp.nan)).astype(self.dtype)

    def dense(self) -> jax.Array:
        """[O, I] in the compute dtype."""
        if self.least is None:
            return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)
        groups = jnp.concatenate([self.values & 15, self.values >> 4], axis=-1).astype(jnp.float32)
        scale, least = (x[..., None].astype(jnp.float32) for x in (self.scale, self.least))
        return (groups * scale + least).astype(self.dtype).reshape(groups.shape[0], -1)

    def product(self, x: jax.Array, layout: P | None) -> jax.Array:
        """x [B, T, I] by the matrix, f32 [B, T, O]."""
        many = functools.partial(_dense_product, layout=layout)
        if self.least is not None or layout is not None or x.shape[0] * x.shape[1] > _FEW_ROWS:
            return many(x, self)
        return jax.lax.platform_dependent(x, self, cpu=_int8_product, default=many)


def quantize(params: Any, bits: Bits = 8) -> Any:
    """Parameters with every matrix quantised, each weight rounded to the nearest value that it can have.

    In 4 bits the embedding table and the output matrix keep 8; and the key and value matrices of grouped
    heads, if they have at most half as many outputs as inputs, are left as they are: they are few, and it is
    there that rounding costs most.

    Args:
      params: the parameter tree, stacked or not, laid out over a mesh or not; the compute dtype of the
        result is theirs.
      bits: 8, about a quarter of f32's bytes; or 4 (5 with the scales), in groups of 32 inputs.

    Returns:
      The same tree with `Quantized` matrices, for `forward`, `generate` and their kin. No gradient goes
      through them.

    Raises:
      InputError: for another number of bits, parameters that are quantised already, or in 4 bits a matrix
        whose inputs do not divide into groups.
    """
    if bits not in (4, 8):
        raise InputError(f"bits is {bits!r}; it must be 8 or 4")

    def walk(tree: Any, stacked: bool) -> Any:
        if isinstance(tree, tuple):
            return tuple(walk(layer, False) for layer in tree)
        return {
            name: walk(leaf, stacked or name == "layers")
            if isinstance(leaf, Mapping | tuple)
            else _quantized(name, leaf, bits, stacked)
            for name, leaf in tree.items()
        }

    return walk(params, False)


def _quantized(name: str, weight: Any, bits: Bits, stacked: bool) -> Any:
    if name not in _SUMMED:
        return weight
    if isinstance(weight, Quantized):
        raise InputError(f"{name} is quantised already; quantise the original parameters")
    summed = _SUMMED[name]
    shape = weight.shape[stacked:]
    inputs = math.prod(shape[axis] for axis in summed)
    if name in ("wk", "wv") and 2 * math.prod(shape[1:]) <= inputs:
        return weight
    small = bits == 4 and name not in ("embedding", "kernel")
    if small and inputs % GROUP:
        raise InputError(f"{name} has {inputs} inputs, no multiple of {GROUP}; quantise to 8 bits instead")
    if small:
        _check_groups(name, inputs, sharding.layout_of(weight), summed[0] + stacked)
    convert = _to_4_bits if small else _to_8_bits
    values, scale, least = (jax.vmap(convert, (0, None)) if stacked else convert)(weight, summed)
    return Quantized(values, scale, least, shape, summed, weight.dtype)


def _check_groups(name: str, inputs: int, layout: P | None, axis: int) -> None:
    entry: Any = None if layout is None else layout[axis]
    for mesh_axis in entry if isinstance(entry, tuple) else filter(None, (entry,)):
        size = sharding.explicit_axes()[mesh_axis]
        if (inputs // GROUP) % size:
            raise InputError(
                f"{name} has {inputs // GROUP} groups of {GROUP} inputs, which do not divide over mesh axis "
                f"{mesh_axis} of size {size}; quantise to 8 bits instead"
            )


def _outputs_by_inputs(weight: jax.Array, summed: tuple[int, ...]) -> jax.Array:
    """f32 [O, I]."""
    outputs = tuple(axis for axis in range(weight.ndim) if axis not in summed)
    count = math.prod(weight.shape[axis] for axis in outputs)
    return weight.transpose(*outputs, *summed).reshape(count, -1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _to_8_bits(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    matrix = _outputs_by_inputs(weight, summed)
    scale = jnp.max(jnp.abs(matrix), axis=1, keepdims=True) / 127
    values = jnp.round(matrix / jnp.where(scale > 0, scale, 1.0))
    return values.astype(jnp.int8), scale, None


@functools.partial(jax.jit, static_argnums=1)
def _to_4_bits(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    matrix = _outputs_by_inputs(weight, summed)
    groups = matrix.reshape(matrix.shape[0], -1, GROUP)
    # Rounded before they are used, so that the values are the nearest to what will be read back.
    least = groups.min(-1).astype(jnp.float16)
    scale = ((groups.max(-1) - least.astype(jnp.float32)) / 15).astype(jnp.float16)
    step, base = scale.astype(jnp.float32)[..., None], least.astype(jnp.float32)[..., None]
    values = jnp.clip(jnp.round((groups - base) / jnp.where(step > 0, step, 1.0)), 0, 15)
    values = values.astype(jnp.uint8)
    half = GROUP // 2
    return values[..., :half] | (values[..., half:] << 4), scale, least


def _dense_product(x: jax.Array, weight: Quantized, *, layout: P | None) -> jax.Array:
    """By way of the matrix in the compute dtype, int8's scales left for the sums."""
    eight = weight.least is None
    matrix = weight.values.astype(x.dtype) if eight else weight.dense().astype(x.dtype)
    out = jnp.einsum("bti,oi->bto", x, matrix, preferred_element_type=jnp.float32, out_sharding=layout)
    return out * weight.scale[:, 0] if eight else out


def _int8_product(x: jax.Array, weight: Quantized) -> jax.Array:
    """In whole numbers: each activation as 127 steps, and each step's rest as 254 more.

    That is 16 bits for the price of 8, since XLA:CPU has no product of one row worth the name: two rows
    take no longer.
    """
    shape = x.shape[:2]
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    steps = x / jnp.where(step > 0, step, 1.0)
    coarse = jnp.round(steps)
    both = jnp.stack([coarse, jnp.round((steps - coarse) * 254)]).astype(jnp.int8)
    # One dimension of rows: with several XLA:CPU may not know the product for what it is.
    both = both.reshape(-1, x.shape[-1])
    sums = jnp.einsum("ri,oi->ro", both, weight.values, preferred_element_type=jnp.int32)
    sums = sums.reshape(2, *shape, -1).astype(jnp.float32)
    return (sums[0] + sums[1] / 254) * step * weight.scale[:, 0]
