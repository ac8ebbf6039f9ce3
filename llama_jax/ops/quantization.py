"""Weight-only quantization: int8 with a scale per output, 4 bits with a scale and minimum per group, or NF4.

Decoding one sequence reads every weight once per token, so it is limited by memory bandwidth; int8 weights
are a quarter of the bytes of f32. A frozen base under trained adapters takes little memory as NF4 (QLoRA,
arXiv 2305.14314). A quantized weight replaces its matrix in the parameter tree, stacked or not, and the model
runs unchanged; activations, norms and accumulation keep their precision.
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
GROUP_SIZE = 32  # inputs that share a scale in 4 bits, as in GGUF's Q4_1
NF4_BLOCK_SIZE = 64  # inputs that share a scale in NF4, as in QLoRA

# The code book of NF4: quantiles of the normal distribution scaled to [-1, 1] (QLoRA, appendix E).
_NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# Up to this many rows (B T) XLA:CPU computes an int8 product faster than it dequantizes the weights.
_MAX_INT8_ROWS = 16

# The dimensions of each matrix that a product contracts: its inputs. Norms are not quantized.
CONTRACTED = {
    "embedding": (1,),
    "kernel": (0,),
    **dict.fromkeys(("wq", "wk", "wv", "w_gate", "w_up", "w_down"), (0,)),
    "wo": (0, 1),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "minimum"),
    meta_fields=("shape", "contracted", "dtype", "bits"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix in 8 or 4 bits.

    Attributes:
      values: 8 bits: int8 [O, I]. 4 bits: uint8 [O, I / 32, 16], with the first 16 values of a group in the
        low four bits and the other 16 in the high ones. NF4: uint8 [O, I / 64, 32], packed likewise.
      scale: 8 bits: f32 [O, 1]; a weight is values * scale. 4 bits: f16 [O, I / 32]; a weight is
        values * scale + minimum. NF4: f32 [O, I / 64]; a weight is NF4[values] * scale.
      minimum: f16 [O, I / 32] in 4 bits, else None.
      shape: the shape of the original matrix.
      contracted: the dimensions of `shape` that are inputs.
      dtype: the compute dtype.
      bits: the argument of `quantize`.
    """

    values: jax.Array
    scale: jax.Array
    minimum: jax.Array | None
    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    dtype: jnp.dtype
    bits: Bits

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def reshape(self, *shape: int) -> Quantized:
        """The same matrix with its inputs or outputs split or merged."""
        count = math.prod(self.shape[axis] for axis in self.contracted)
        inputs = tuple(range(next(i for i in range(1, len(shape) + 1) if math.prod(shape[:i]) == count)))
        return dataclasses.replace(self, shape=shape, contracted=inputs)

    def gather(self, weight_spec: P) -> Quantized:
        """Gathered over `fsdp` and `context`; see `sharding.gather`."""
        outputs, inputs = self._axes(weight_spec)
        scale_spec = P(outputs, inputs if self.bits != 8 else None)
        values_spec = P(outputs, inputs, *(None,) * (self.values.ndim - 2))
        return dataclasses.replace(
            self,
            values=sharding.gather(self.values, values_spec),
            scale=sharding.gather(self.scale, scale_spec),
            minimum=None if self.minimum is None else sharding.gather(self.minimum, scale_spec),
        )

    def _axes(self, weight_spec: P) -> tuple[Any, Any]:
        """The mesh axes of the outputs and of the inputs."""
        outputs = [axis for axis in range(len(weight_spec)) if axis not in self.contracted]
        return weight_spec[outputs[0]], weight_spec[self.contracted[0]]

    def take_rows(self, ids: jax.Array, out_spec: P | None) -> jax.Array:
        """Rows `ids` int [...] of an 8-bit or NF4 matrix [O, I]: [..., I]; NaN for an id outside [0, O)."""

        def take(x: jax.Array, fill: float) -> jax.Array:
            rank = ids.ndim + x.ndim - 1
            spec = None if out_spec is None else P(*out_spec, *(None,) * (rank - len(out_spec)))
            rows = x.at[ids]
            return rows.get(out_sharding=spec, mode="fill", fill_value=fill, wrap_negative_indices=False)

        values, scale = take(self.values, 0), take(self.scale, jnp.nan)
        if self.bits == 8:
            return (values.astype(jnp.float32) * scale).astype(self.dtype)
        return _dequantize_nf4(values, scale).astype(self.dtype).reshape(*ids.shape, -1)

    def dequantize(self) -> jax.Array:
        """[O, I] in the compute dtype."""
        if self.bits == 8:
            return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)
        if self.bits == "nf4":
            blocks = _dequantize_nf4(self.values, self.scale)
            return blocks.astype(self.dtype).reshape(self.values.shape[0], -1)
        assert self.minimum is not None
        groups = _unpack(self.values).astype(jnp.float32)
        scale, minimum = (x[..., None].astype(jnp.float32) for x in (self.scale, self.minimum))
        return (groups * scale + minimum).astype(self.dtype).reshape(groups.shape[0], -1)

    def product(self, x: jax.Array, out_spec: P | None) -> jax.Array:
        """x [B, T, I] times the matrix: f32 [B, T, O]."""
        product = functools.partial(_dequantized_product, out_spec=out_spec)
        if out_spec is not None:
            return product(x, self)
        few_rows = self.bits == 8 and x.shape[0] * x.shape[1] <= _MAX_INT8_ROWS
        on_cpu = _int8_product if few_rows else _late_product
        return jax.lax.platform_dependent(x, self, cpu=on_cpu, default=product)


def quantize(params: Any, bits: Bits = 8) -> Any:
    """Quantizes every matrix of a parameter tree, each weight to its nearest representable value.

    Of a mixture of experts each expert's matrices are quantized alike, and the router is not.

    With 4 bits, the embedding table and the output matrix have 8. The key and value matrices of grouped-query
    attention with at most half as many outputs as inputs are not quantized: they are small, and rounding
    them costs the most accuracy. With NF4, every matrix has 4 bits: it is the base for adapters, which are
    trained on top of the rounding.

    Args:
      params: the parameter tree, stacked or not, sharded or not. Its dtype is the result's compute dtype.
      bits: 8, about a quarter of the bytes of f32; 4 (5 with scales and minimums), in groups of 32 inputs; or
        `nf4` (4.5 with scales), in blocks of 64 inputs, which needs the package qwix.

    Returns:
      The same tree with `Quantized` matrices, for `forward`, `generate` and so on. They have no gradient.

    Raises:
      InputError: for another value of `bits`, parameters that are already quantized, a matrix whose inputs do
        not divide into groups, or NF4 without qwix installed.
    """
    if bits not in get_args(Bits):
        raise InputError(f"bits is {bits!r}; it must be 8, 4 or 'nf4'")

    def quantize_tree(tree: Any, lead: int) -> Any:
        if isinstance(tree, tuple):
            return tuple(quantize_tree(layer, 0) for layer in tree)
        lead += "router" in tree  # a mixture of experts: each has matrices of its own
        return {
            name: leaf
            if name == "score"  # a classifier's head is small
            else quantize_tree(leaf, lead + (name == "layers"))
            if isinstance(leaf, Mapping | tuple)
            else _quantize_matrix(name, leaf, bits, lead)
            for name, leaf in tree.items()
        }

    return quantize_tree(params, 0)


def _quantize_matrix(name: str, weight: Any, bits: Bits, lead: int) -> Any:
    """The matrix quantized; it has this number of leading dimensions, of layers and experts."""
    if name not in CONTRACTED:
        return weight
    if isinstance(weight, Quantized):
        raise InputError(f"{name} is already quantized; quantize the original parameters")
    contracted = CONTRACTED[name]
    shape = weight.shape[lead:]
    inputs = math.prod(shape[axis] for axis in contracted)
    if bits == 4 and name in ("wk", "wv") and 2 * math.prod(shape[1:]) <= inputs:
        return weight
    if bits == 4 and name in ("embedding", "kernel"):
        bits = 8
    if bits != 8:
        group_size = GROUP_SIZE if bits == 4 else NF4_BLOCK_SIZE
        _check_groups(name, inputs, group_size, sharding.spec_of(weight), contracted, lead)
    convert: Any = {8: _to_8_bits, 4: _to_4_bits, "nf4": _to_nf4}[bits]
    for _ in range(lead):
        convert = jax.vmap(convert, (0, None))
    values, scale, minimum = convert(weight, contracted)
    return Quantized(values, scale, minimum, shape, contracted, weight.dtype, bits)


def _check_groups(
    name: str, inputs: int, group_size: int, spec: P | None, contracted: tuple[int, ...], lead: int
) -> None:
    if inputs % group_size:
        raise InputError(
            f"{name} has {inputs} inputs, not a multiple of {group_size}; quantize to 8 bits instead"
        )
    sizes = sharding.explicit_axes()
    used = () if spec is None else sharding.axes_of(spec[contracted[0] + lead])
    used = tuple(axis for axis in used if sizes[axis] > 1)
    groups, size = inputs // group_size, math.prod(sizes[axis] for axis in used)
    if groups % size:
        fits = [str(n) for n in range(1, max(sizes.values()) + 1) if groups % n == 0]
        raise InputError(
            f"{name}: its {inputs} inputs are {groups} groups of {group_size}, which do not divide over mesh "
            f"axis {' x '.join(used)} of size {size} (sizes that would: {', '.join(fits)}); or use 8 bits"
        )


def _output_input_matrix(weight: jax.Array, contracted: tuple[int, ...]) -> jax.Array:
    """f32 [O, I]."""
    outputs = tuple(axis for axis in range(weight.ndim) if axis not in contracted)
    count = math.prod(weight.shape[axis] for axis in outputs)
    return weight.transpose(*outputs, *contracted).reshape(count, -1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _to_8_bits(weight: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    matrix = _output_input_matrix(weight, contracted)
    scale = jnp.max(jnp.abs(matrix), axis=1, keepdims=True) / 127
    values = jnp.round(matrix / jnp.where(scale > 0, scale, 1.0))
    return values.astype(jnp.int8), scale, None


@functools.partial(jax.jit, static_argnums=1)
def _to_4_bits(weight: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    matrix = _output_input_matrix(weight, contracted)
    groups = matrix.reshape(matrix.shape[0], -1, GROUP_SIZE)
    # Rounded to f16 first, so that each value is the nearest after dequantization.
    minimum = groups.min(-1).astype(jnp.float16)
    scale = ((groups.max(-1) - minimum.astype(jnp.float32)) / 15).astype(jnp.float16)
    step, base = scale.astype(jnp.float32)[..., None], minimum.astype(jnp.float32)[..., None]
    values = jnp.clip(jnp.round((groups - base) / jnp.where(step > 0, step, 1.0)), 0, 15)
    return _pack(values), scale, minimum


@functools.partial(jax.jit, static_argnums=1)
def _to_nf4(weight: jax.Array, contracted: tuple[int, ...]) -> tuple[jax.Array, jax.Array, None]:
    try:
        qwix: Any = importlib.import_module("qwix")
    except ImportError:
        raise InputError("NF4 needs the package qwix: pip install 'llama-jax[qlora]'") from None
    matrix = _output_input_matrix(weight, contracted)
    quantized = qwix.quantize(matrix, "nf4", channelwise_axes=(0,), tiled_axes={1: NF4_BLOCK_SIZE})
    return _pack(quantized.qvalue.reshape(*quantized.scale.shape, NF4_BLOCK_SIZE)), quantized.scale, None


def _pack(values: jax.Array) -> jax.Array:
    """Packs two 4-bit values into a byte: [..., G] -> uint8 [..., G / 2]."""
    values, half = values.astype(jnp.uint8), values.shape[-1] // 2
    return values[..., :half] | (values[..., half:] << 4)


def _unpack(values: jax.Array) -> jax.Array:
    return jnp.concatenate([values & 15, values >> 4], axis=-1)


def _dequantize_nf4(packed: jax.Array, scale: jax.Array) -> jax.Array:
    """f32 [..., NF4_BLOCK_SIZE] of packed NF4 [..., NF4_BLOCK_SIZE / 2] and scales [...]."""
    codes = _unpack(packed)
    # A binary tree of selects, one bit per level, rather than a gather: elementwise, it keeps any sharding.
    values: list[Any] = [jnp.float32(value) for value in _NF4_VALUES]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, values[i + 1], values[i]) for i in range(0, len(values), 2)]
    return values[0] * scale[..., None]


def _dequantized_product(x: jax.Array, weight: Quantized, *, out_spec: P | None) -> jax.Array:
    """A product with the matrix in the compute dtype; in 8 bits the scales are applied to the result."""
    int8 = weight.bits == 8
    matrix = weight.values.astype(x.dtype) if int8 else weight.dequantize().astype(x.dtype)
    out = jnp.einsum("bti,oi->bto", x, matrix, preferred_element_type=jnp.float32, out_sharding=out_spec)
    return out * weight.scale[:, 0] if int8 else out


def _late_product(x: jax.Array, weight: Quantized) -> jax.Array:
    """`_dequantized_product` of a matrix that is not dequantized before x is computed.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1), which dequantizes the matrices of all layers as early as
    it can, before a loop over tokens too, so that the whole model is in memory in f32.
    """
    values = _depend_on(weight.values, jax.lax.stop_gradient(x[(0,) * x.ndim]))
    return _dequantized_product(x, dataclasses.replace(weight, values=values), out_spec=None)


@jax.custom_batching.custom_vmap
def _depend_on(values: jax.Array, scalar: jax.Array) -> jax.Array:
    """`values` unchanged, with a data dependence on a scalar that XLA does not simplify away."""
    without_sign = jax.lax.bitcast_convert_type(scalar.astype(jnp.float32), jnp.uint32) & 0x7FFFFFFF
    return values ^ (without_sign >> 31).astype(values.dtype)


@_depend_on.def_vmap
def _depend_on_batched(
    size: int, batched: Any, values: jax.Array, scalar: jax.Array
) -> tuple[jax.Array, bool]:
    """Under `vmap` over x alone, the matrix is not batched."""
    values_batched, scalar_batched = batched
    if values_batched:
        scalar = scalar if scalar_batched else jnp.broadcast_to(scalar, (size,))
        return jax.vmap(_depend_on.fun)(values, scalar), True
    return _depend_on(values, scalar[0]), False


@jax.custom_jvp
def _int8_product(x: jax.Array, weight: Quantized) -> jax.Array:
    """An integer product: x as 127 steps, and the remainder of each step as 254 more.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1), which converts the weights to int32 for a product of one
    row. Two rows run as int8, so that x has 16 bits at the cost of 8.
    """
    shape = x.shape[:2]
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    steps = x / jnp.where(step > 0, step, 1.0)
    coarse = jnp.round(steps)
    both = jnp.stack([coarse, jnp.round((steps - coarse) * 254)]).astype(jnp.int8)
    both = both.reshape(-1, x.shape[-1])
    sums = jnp.einsum("ri,oi->ro", both, weight.values, preferred_element_type=jnp.int32)
    sums = sums.reshape(2, *shape, -1).astype(jnp.float32)
    return (sums[0] + sums[1] / 254) * step * weight.scale[:, 0]


@_int8_product.defjvp
def _int8_product_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is that of the product: rounding x has none."""
    x, weight = primals
    return _int8_product(x, weight), _dequantized_product(tangents[0], weight, out_spec=None)
