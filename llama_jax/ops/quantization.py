"""Weight-only quantisation: int8 with a scale an output, 4 bits with two numbers a group, or NF4.

Decoding one row reads every weight once a token, so its speed is that of memory: int8 weights are a quarter
of f32's bytes. A frozen base under trained adapters takes little memory as NF4 (QLoRA, arXiv 2305.14314). A
quantised weight takes its matrix's place in the parameter tree, stacked or not, and the model runs as
before; activations, norms and accumulation keep their precision.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import InputError

Bits = Literal[4, 8, "nf4"]
GROUP = 32  # inputs that share a scale in 4 bits, as in GGUF's Q4_1
BLOCK = 64  # inputs that share a scale in NF4, as in QLoRA

# The 16 values of NormalFloat, quantiles of the normal distribution scaled to [-1, 1] (QLoRA, appendix E).
_NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# Up to so many rows XLA:CPU multiplies int8 faster than it can widen the weights.
_FEW_ROWS = 16

# Which dimensions of each matrix a product sums over. Norms are not quantised.
SUMMED = {
    "embedding": (1,),
    "kernel": (0,),
    **dict.fromkeys(("wq", "wk", "wv", "w_gate", "w_up", "w_down"), (0,)),
    "wo": (0, 1),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "least"),
    meta_fields=("shape", "summed", "dtype", "form"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in 8 or 4 bits.

    Attributes:
      values: int8 [O, I], outputs by inputs; or in 4 bits uint8 [O, I / 32, 16], a group's first 16 values in
        the low halves and its others in the high ones; in NF4 uint8 [O, I / 64, 32] likewise.
      scale: f32 [O, 1]: a weight is values * scale; in 4 bits f16 [O, I / 32]: values * scale + least; in
        NF4 f32 [O, I / 64]: NormalFloat[values] * scale.
      least: f16 [O, I / 32] in 4 bits, else None.
      shape: the matrix's own, as the model knows it.
      summed: the dimensions of `shape` that are inputs.
      dtype: what to compute in.
      form: the `bits` of `quantize`.
    """

    values: jax.Array
    scale: jax.Array
    least: jax.Array | None
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    dtype: jnp.dtype
    form: Bits

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
        group = P(out, into if self.form != 8 else None)
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
        """Outputs `ids` int [...] of an int8 or NF4 matrix, [..., I] in the compute dtype; NaN outside it."""

        def take(x: jax.Array, fill: float) -> jax.Array:
            spec = None if out is None else P(*out, *(None,) * (ids.ndim + x.ndim - 1 - len(out)))
            at = x.at[ids]
            return at.get(out_sharding=spec, mode="fill", fill_value=fill, wrap_negative_indices=False)

        values, scale = take(self.values, 0), take(self.scale, jnp.nan)
        if self.form == 8:
            return (values.astype(jnp.float32) * scale).astype(self.dtype)
        return _normal_floats(values, scale).astype(self.dtype).reshape(*ids.shape, -1)

    def dense(self) -> jax.Array:
        """[O, I] in the compute dtype."""
        if self.form == 8:
            return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)
        if self.form == "nf4":
            return (
                _normal_floats(self.values, self.scale).astype(self.dtype).reshape(self.values.shape[0], -1)
            )
        assert self.least is not None
        groups = _unpacked(self.values).astype(jnp.float32)
        scale, least = (x[..., None].astype(jnp.float32) for x in (self.scale, self.least))
        return (groups * scale + least).astype(self.dtype).reshape(groups.shape[0], -1)

    def product(self, x: jax.Array, layout: P | None) -> jax.Array:
        """x [B, T, I] by the matrix, f32 [B, T, O]."""
        product = functools.partial(_dense_product, layout=layout)
        if layout is not None:
            return product(x, self)
        few = self.form == 8 and x.shape[0] * x.shape[1] <= _FEW_ROWS
        return jax.lax.platform_dependent(
            x, self, cpu=_int8_product if few else _late_product, default=product
        )


def quantize(params: Any, bits: Bits = 8) -> Any:
    """Parameters with every matrix quantised, each weight rounded to the nearest value that it can have.

    In 4 bits the embedding table and the output matrix keep 8; and the key and value matrices of grouped
    heads, if they have at most half as many outputs as inputs, are left as they are: they are few, and it is
    there that rounding costs most. In NF4 every matrix has 4 bits: a base for adapters, which learn to make
    up for it.

    Args:
      params: the parameter tree, stacked or not, laid out over a mesh or not; the compute dtype of the
        result is theirs.
      bits: 8, about a quarter of f32's bytes; 4 (5 with the scales), in groups of 32 inputs; or `nf4`
        (4.5), in blocks of 64, which needs the package qwix.

    Returns:
      The same tree with `Quantized` matrices, for `forward`, `generate` and their kin. No gradient goes
      through them.

    Raises:
      InputError: for another number of bits, parameters that are quantised already, in 4 bits a matrix
        whose inputs do not divide into groups, or where qwix is not installed.
    """
    if bits not in get_args(Bits):
        raise InputError(f"bits is {bits!r}; it must be 8, 4 or 'nf4'")

    def walk(tree: Any, stacked: bool) -> Any:
        if isinstance(tree, tuple):
            return tuple(walk(layer, False) for layer in tree)
        return {
            name: leaf
            if name == "score"  # a classifier's head is small
            else walk(leaf, stacked or name == "layers")
            if isinstance(leaf, Mapping | tuple)
            else _quantized(name, leaf, bits, stacked)
            for name, leaf in tree.items()
        }

    return walk(params, False)


def _quantized(name: str, weight: Any, bits: Bits, stacked: bool) -> Any:
    if name not in SUMMED:
        return weight
    if isinstance(weight, Quantized):
        raise InputError(f"{name} is quantised already; quantise the original parameters")
    summed = SUMMED[name]
    shape = weight.shape[stacked:]
    inputs = math.prod(shape[axis] for axis in summed)
    if bits == 4 and name in ("wk", "wv") and 2 * math.prod(shape[1:]) <= inputs:
        return weight
    form: Bits = 8 if bits == 4 and name in ("embedding", "kernel") else bits
    if form != 8:
        _check_groups(
            name, inputs, GROUP if form == 4 else BLOCK, sharding.layout_of(weight), summed, stacked
        )
    convert = {8: _to_8_bits, 4: _to_4_bits, "nf4": _to_normal_float}[form]
    values, scale, least = (jax.vmap(convert, (0, None)) if stacked else convert)(weight, summed)
    return Quantized(values, scale, least, shape, summed, weight.dtype, form)


def _check_groups(
    name: str, inputs: int, group: int, layout: P | None, summed: tuple[int, ...], stacked: bool
) -> None:
    if inputs % group:
        raise InputError(f"{name} has {inputs} inputs, no multiple of {group}; quantise to 8 bits instead")
    entry: Any = None if layout is None else layout[summed[0] + stacked]
    for mesh_axis in entry if isinstance(entry, tuple) else filter(None, (entry,)):
        size = sharding.explicit_axes()[mesh_axis]
        groups = inputs // group
        if groups % size:
            fits = [str(n) for n in range(1, max(sharding.explicit_axes().values()) + 1) if groups % n == 0]
            raise InputError(
                f"{name}: its {inputs} inputs are {groups} groups of {group}, which do not divide over mesh "
                f"axis {mesh_axis} of size {size} (sizes that would: {', '.join(fits)}); or take 8 bits"
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
    return _packed(values), scale, least


@functools.partial(jax.jit, static_argnums=1)
def _to_normal_float(weight: jax.Array, summed: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    try:
        qwix: Any = importlib.import_module("qwix")
    except ImportError:
        raise InputError("NF4 needs the package qwix: pip install 'llama-jax[qlora]'") from None
    made = qwix.quantize(
        _outputs_by_inputs(weight, summed), "nf4", channelwise_axes=(0,), tiled_axes={1: BLOCK}
    )
    return _packed(made.qvalue.reshape(*made.scale.shape, BLOCK)), made.scale, None


def _packed(values: jax.Array) -> jax.Array:
    """Two numbers below 16 a byte: [..., G] -> uint8 [..., G / 2]."""
    values, half = values.astype(jnp.uint8), values.shape[-1] // 2
    return values[..., :half] | (values[..., half:] << 4)


def _unpacked(values: jax.Array) -> jax.Array:
    return jnp.concatenate([values & 15, values >> 4], axis=-1)


def _normal_floats(values: jax.Array, scale: jax.Array) -> jax.Array:
    """f32 [..., BLOCK] of packed NF4 [..., BLOCK / 2] and scales [...]."""
    codes = _unpacked(values)
    # A tree of choices, one bit a level, rather than a look-up: it is computed where the codes lie.
    level: list[Any] = [jnp.float32(value) for value in _NORMAL_FLOAT]
    for bit in range(4):
        set_ = (codes >> bit) & 1 == 1
        level = [jnp.where(set_, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0] * scale[..., None]


def _dense_product(x: jax.Array, weight: Quantized, *, layout: P | None) -> jax.Array:
    """By way of the matrix in the compute dtype, int8's scales left for the sums."""
    eight = weight.form == 8
    matrix = weight.values.astype(x.dtype) if eight else weight.dense().astype(x.dtype)
    out = jnp.einsum("bti,oi->bto", x, matrix, preferred_element_type=jnp.float32, out_sharding=layout)
    return out * weight.scale[:, 0] if eight else out


def _late_product(x: jax.Array, weight: Quantized) -> jax.Array:
    """`_dense_product` of a matrix that is not widened before x is known.

    XLA:CPU would widen the matrices of all layers as soon as it can, before a loop over tokens too, and hold
    the whole model in f32.
    """
    values = _after(weight.values, jax.lax.stop_gradient(x[(0,) * x.ndim]))
    return _dense_product(x, dataclasses.replace(weight, values=values), layout=None)


@jax.custom_batching.custom_vmap
def _after(values: jax.Array, number: jax.Array) -> jax.Array:
    """`values`, as they are, but computed from a number: a dependence that XLA does not see through."""
    no_sign = jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.uint32) & 0x7FFFFFFF
    return values ^ (no_sign >> 31).astype(values.dtype)


@_after.def_vmap
def _after_any(size: int, batched: Any, values: jax.Array, number: jax.Array) -> tuple[jax.Array, bool]:
    """Under `vmap` over x alone there is still one matrix."""
    values_batched, number_batched = batched
    if values_batched:
        number = number if number_batched else jnp.broadcast_to(number, (size,))
        return jax.vmap(_after.fun)(values, number), True
    return _after(values, number[0]), False


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
