"""Weight-only quantisation for decoding: int8 or 4 bits, in groups of inputs with numbers of their own.

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
GROUPS = {8: 64, 4: 32}  # inputs that share a scale, and in 4 bits a least value, as in GGUF's Q4_1
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
      values: int8 [I / 64, O, 64], groups of inputs by outputs; or in 4 bits uint8 [I / 32, O, 16], a group's
        first 16 values in the low halves and its others in the high ones.
      scale: f32 [I / 64, O]: a weight is values * scale; in 4 bits f16 [I / 32, O]: values * scale + least.
      least: f16 [I / 32, O], or None in 8 bits.
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
        outputs = [axis for axis in range(len(stored)) if axis not in self.summed]
        spec = stored[self.summed[0]], stored[outputs[0]]
        return dataclasses.replace(
            self,
            values=sharding.gather(self.values, P(*spec, None)),
            scale=sharding.gather(self.scale, P(*spec)),
            least=None if self.least is None else sharding.gather(self.least, P(*spec)),
        )

    def rows(self, ids: jax.Array, out: P | None) -> jax.Array:
        """Outputs `ids` int [B, T] of an int8 matrix, [B, T, I] in the compute dtype; NaN outside it."""
        layout = None if out is None else P(None, *out[:2], None)

        def take(x: jax.Array, fill: float, layout: P | None) -> jax.Array:
            at = x.at[:, ids]
            return at.get(out_sharding=layout, mode="fill", fill_value=fill, wrap_negative_indices=False)

        groups = take(self.values, 0, layout).astype(jnp.float32)
        groups *= take(self.scale, jnp.nan, None if layout is None else P(*layout[:3]))[..., None]
        return jnp.moveaxis(groups, 0, 2).reshape(*ids.shape, -1).astype(self.dtype)

    def dense(self) -> jax.Array:
        """[I / n, O, n] in the compute dtype, n inputs a group."""
        scale = self.scale[..., None].astype(jnp.float32)
        if self.least is None:
            return (self.values.astype(jnp.float32) * scale).astype(self.dtype)
        values = jnp.concatenate([self.values & 15, self.values >> 4], axis=-1).astype(jnp.float32)
        return (values * scale + self.least[..., None].astype(jnp.float32)).astype(self.dtype)

    def product(self, x: jax.Array, layout: P | None) -> jax.Array:
        """x [B, T, I] by the matrix, f32 [B, T, O]."""
        many = functools.partial(_dense_product, layout=layout)
        if self.least is not None or x.shape[0] * x.shape[1] > _FEW_ROWS:
            return many(x, self)
        few = functools.partial(_int8_product, layout=layout)
        return jax.lax.platform_dependent(x, self, cpu=few, default=many)


def quantize(params: Any, bits: Bits = 8) -> Any:
    """Parameters with every matrix quantised, each weight rounded to the nearest value that it can have.

    In 4 bits the embedding table and the output matrix keep 8: they are few in a large model, and it is
    there that rounding costs most.

    Args:
      params: the parameter tree, stacked or not, laid out over a mesh or not; the compute dtype of the
        result is theirs.
      bits: 8, in groups of 64 inputs, about a quarter of f32's bytes; or 4, in groups of 32, about a sixth.

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
    bits = 8 if name in ("embedding", "kernel") else bits
    parts = _parts(sharding.layout_of(weight), summed[0] + stacked)
    if inputs % parts:
        raise InputError(f"{name} has {inputs} inputs, which do not divide over a mesh axis of size {parts}")
    # A group lies on one device. Where 64 inputs do not divide them, a smaller power of two may.
    group = math.gcd(inputs // parts, GROUPS[bits])
    if bits == 4 and group < GROUPS[4]:
        over = f" over {parts} devices" if parts > 1 else ""
        raise InputError(
            f"{name} has {inputs} inputs{over}, no multiple of {GROUPS[4]}; quantise to 8 bits instead"
        )
    layout = sharding.layout_of(weight)
    if layout is not None:
        outputs = next(axis for axis in range(len(shape)) if axis not in summed)
        layout = P(layout[summed[0] + stacked], None, layout[outputs + stacked])
    convert = functools.partial(
        _to_4_bits if bits == 4 else _to_8_bits, summed=summed, group=group, layout=layout
    )
    values, scale, least = (jax.vmap(convert) if stacked else convert)(weight)
    return Quantized(values, scale, least, shape, summed, weight.dtype)


def _parts(layout: P | None, axis: int) -> int:
    """Over how many devices a dimension lies."""
    entry: Any = None if layout is None else layout[axis]
    names = entry if isinstance(entry, tuple) else filter(None, (entry,))
    return math.prod(sharding.explicit_axes()[name] for name in names)


def _in_groups(weight: jax.Array, summed: tuple[int, ...], group: int, layout: P | None) -> jax.Array:
    """f32 [I / n, O, n]."""
    outputs = tuple(axis for axis in range(weight.ndim) if axis not in summed)
    count = math.prod(weight.shape[axis] for axis in outputs)
    inputs = weight.size // count
    matrix = jnp.reshape(
        weight.transpose(*summed, *outputs), (inputs // group, group, count), out_sharding=layout
    )
    return matrix.swapaxes(1, 2).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("summed", "group", "layout"))
def _to_8_bits(
    weight: jax.Array, *, summed: tuple[int, ...], group: int, layout: P | None
) -> tuple[jax.Array, jax.Array, None]:
    groups = _in_groups(weight, summed, group, layout)
    scale = jnp.max(jnp.abs(groups), axis=-1) / 127
    values = jnp.round(groups / jnp.where(scale > 0, scale, 1.0)[..., None])
    return values.astype(jnp.int8), scale, None


@functools.partial(jax.jit, static_argnames=("summed", "group", "layout"))
def _to_4_bits(
    weight: jax.Array, *, summed: tuple[int, ...], group: int, layout: P | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    groups = _in_groups(weight, summed, group, layout)
    # Rounded before they are used, so that the values are the nearest to what will be read back.
    least = groups.min(-1).astype(jnp.float16)
    scale = ((groups.max(-1) - least.astype(jnp.float32)) / 15).astype(jnp.float16)
    step, base = scale.astype(jnp.float32)[..., None], least.astype(jnp.float32)[..., None]
    values = jnp.clip(jnp.round((groups - base) / jnp.where(step > 0, step, 1.0)), 0, 15).astype(jnp.uint8)
    half = group // 2
    return values[..., :half] | (values[..., half:] << 4), scale, least


def _dense_product(x: jax.Array, weight: Quantized, *, layout: P | None) -> jax.Array:
    """By way of the matrix in the compute dtype."""
    groups = weight.dense().astype(x.dtype)
    x = x.reshape(*x.shape[:2], groups.shape[0], -1)
    return jnp.einsum("btgn,gon->bto", x, groups, preferred_element_type=jnp.float32, out_sharding=layout)


def _int8_product(x: jax.Array, weight: Quantized, *, layout: P | None) -> jax.Array:
    """In whole numbers: each activation as 127 steps, and each step's rest as 254 more.

    That is 16 bits for the price of 8, since XLA:CPU has no product of one row worth the name: two rows
    take no longer.
    """
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    steps = x / jnp.where(step > 0, step, 1.0)
    coarse = jnp.round(steps)
    both = jnp.stack([coarse, jnp.round((steps - coarse) * 254)]).astype(jnp.int8)
    both = both.reshape(*both.shape[:3], weight.scale.shape[0], -1)
    into = sharding.layout_of(weight.scale)
    sums = jnp.einsum(
        "cbtgn,gon->gcbto",
        both,
        weight.values,
        preferred_element_type=jnp.int32,
        out_sharding=None if layout is None or into is None else P(into[0], None, *layout),
    ).astype(jnp.float32)
    sums = (sums[:, 0] + sums[:, 1] / 254) * weight.scale[:, None, None]
    return sharding.constrain(sums.sum(0), layout or P()) * step
