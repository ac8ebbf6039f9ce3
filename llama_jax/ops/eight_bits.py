"""Training with products in eight bits: forward and backward in int8, or in fp8.

Every product y = x W of a layer has operands of 8 bits with f32 scales: a scale per token of x (a row), per
output of W, and per row of a gradient. The largest element of what shares a scale is mapped to the largest
number of the dtype, so nothing is clipped. int8 products are summed in int32, fp8 ones in f32, and multiplied
by the scales in f32. With x = s_x X and W = S s_W, quantized along what the product contracts,

    y = s_x (X S) s_W        d_x = s (q(d_y s_W) S^T)        d_W = (X^T q(d_y s_x)) s'

where q quantizes a gradient by its rows for d_x, and by its columns for d_W: a scale of the contracted
dimension cannot leave the sum, so it is multiplied into the gradient, and x and W are quantized only once.
With scales per tensor, x, W and d_y have one scale each, and d_y too is quantized once, for both products; of
several slices each has its own. One outlier then costs all others their precision.
Gradients pass rounding as if it were the identity (the straight-through estimator, arXiv 1308.3432). fp8 is
e4m3 for x and W and e5m2 for gradients (arXiv 2209.05433). Embedding, output, norms, attention's scores,
biases and adapters keep the compute dtype.

This is the scheme of qwix's `dot_general_qt`, with which tests compare it. qwix is not called: a `custom_vjp`
of its own would gather weights in 16 bits, hold them for the backward pass and sum their gradients whole.
Here weights are quantized as shards, so that the mesh moves 8 bits; a product has an explicit sharding; and
the gradient of a weight is reduce-scattered as in `ops.linear`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops import spmd
from llama_jax.ops.adapted import PROJECTIONS, Adapted
from llama_jax.ops.eight_bit_operands import Operand, along, product, quantize
from llama_jax.ops.layouts import row_major

EightBitDtype = Literal["int8", "fp8"]
Scales = Literal["channel", "tensor"]

# Of x and W, and of gradients.
_DTYPES: Mapping[str, tuple[Any, Any]] = {
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weight", "key"), meta_fields=("products", "scales")
)
@dataclasses.dataclass(frozen=True)
class EightBitWeight:
    """A matrix whose products, and theirs in the backward pass, are computed in eight bits.

    Attributes:
      weight: the matrix, in its own dtype; its gradient has it too.
      key: gradients are rounded stochastically by it; None: to nearest.
      products: `int8` or `fp8`.
      scales: one for each row of an operand (`channel`), or for all of it (`tensor`).
    """

    weight: jax.Array
    key: jax.Array | None
    products: EightBitDtype
    scales: Scales = "channel"

    @property
    def dtype(self) -> jnp.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def quantize(self, x: jax.Array, contracted: Sequence[int], dtype: Any, key: Any = None) -> Operand:
        """x, an operand of one of this weight's products, quantized along what that contracts."""
        axes = range(x.ndim) if self.scales == "tensor" else contracted
        return quantize(x, tuple(axes), dtype, key)


def eight_bit_products(
    params: Any, products: EightBitDtype, key: jax.Array | None = None, scales: Scales = "channel"
) -> Any:
    """Parameters whose layers compute in eight bits: call it inside of what is differentiated.

        loss = lambda params: next_token_loss(config, eight_bit_products(params, "int8"), tokens).mean

    Args:
      params: the parameter tree, layers stacked or not; the base of a LoRA adapter is computed in eight bits.
      products: `int8` or `fp8`.
      key: a key from `jax.random.key`, another in each step, for stochastic rounding of gradients.
      scales: per `channel` or per `tensor`.

    Returns:
      The tree, with an `EightBitWeight` in the place of each of a layer's seven matrices.

    Raises:
      ConfigError: for other `products` or `scales`; for weights that are quantized already, or adapters of
        DoRA.
    """
    if products not in _DTYPES:
        raise ConfigError(f"products are {products!r}; they can be in {' or '.join(_DTYPES)}")
    if scales not in get_args(Scales):
        raise ConfigError(f"scales are {scales!r}; they can be per {' or per '.join(get_args(Scales))}")
    layers = params["layers"]
    stacked = isinstance(layers, Mapping)
    keys = None
    if key is not None:
        count = jax.tree.leaves(layers)[0].shape[0] if stacked else len(layers)
        if sharding.manual_size("data") > 1:
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        keys = jax.random.split(key, (count, len(PROJECTIONS)))

    def wrap(tree: Any, keys: jax.Array | None) -> Any:
        tree = dict(tree)
        if "router" in tree["feed_forward"]:
            raise ConfigError(
                f"products of experts cannot be computed in {products}: leave out train.quantization, or "
                "train a model without experts"
            )
        for index, (name, (sublayer, _)) in enumerate(PROJECTIONS.items()):
            weight = tree[sublayer][name]
            wrapped = EightBitWeight(weight, None if keys is None else keys[..., index], products, scales)
            tree[sublayer] = {**tree[sublayer], name: _wrap(wrapped, name)}
        return tree

    if stacked:
        return {**params, "layers": wrap(layers, keys)}
    per_layer = (None,) * len(layers) if keys is None else keys
    return {**params, "layers": tuple(wrap(*pair) for pair in zip(layers, per_layer, strict=True))}


def _wrap(wrapped: EightBitWeight, name: str) -> Any:
    """The weight in eight bits; within an adapter, if it has one."""
    weight: Any = wrapped.weight
    if isinstance(weight, Adapted) and weight.magnitude is None:
        base = _wrap(dataclasses.replace(wrapped, weight=weight.base), name)
        return dataclasses.replace(weight, base=base)
    if not isinstance(weight, jax.Array):
        kind = "has an adapter of DoRA" if isinstance(weight, Adapted) else "is quantized already"
        raise ConfigError(f"{name} {kind}: its products cannot be computed in {wrapped.products}")
    return wrapped


def project(
    matrices: Sequence[tuple[str, EightBitWeight, P]], x: jax.Array, out_spec: P
) -> tuple[jax.Array, ...]:
    """`linear.project_all`: x [B, T, ...] by several weights, forward and backward in eight bits."""
    equations, weights, specs = zip(*matrices, strict=True)
    return _project(equations, specs, out_spec, *spmd.pvary_like((x, weights)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(
    equations: tuple[str, ...],
    weight_specs: tuple[P, ...],
    out_spec: P,
    x: jax.Array,
    weights: tuple[EightBitWeight, ...],
) -> tuple[jax.Array, ...]:
    rows = quantized_rows(equations[0], x, weights[0])
    return forward(equations, weight_specs, out_spec, rows, weights, x.dtype)


def forward(
    equations: Sequence[str],
    weight_specs: Sequence[P],
    out_spec: P,
    rows: Operand,
    weights: Sequence[EightBitWeight],
    dtype: jnp.dtype,
) -> tuple[jax.Array, ...]:
    """The products of `quantized_rows` with weights, in `dtype`."""
    spec = sharding.out_sharding(out_spec, rows.values.shape[:2] + (0,) * (len(out_spec) - 2))
    scatter = spec is not None and "tensor" in sharding.axes_of(spec[1])
    whole = _gather_rows(rows)
    results = []
    for equation, weight_spec, weight in zip(equations, weight_specs, weights, strict=True):
        matrix = _quantized_matrix(equation, weight, weight_spec)
        if scatter:
            result = _scattered_sum([(equation, whole, matrix)], spec, dtype)
        else:
            result = product(equation, whole, matrix, spec)
        results.append(result.astype(dtype))
    return tuple(results)


def backward(
    equations: Sequence[str],
    weight_specs: Sequence[P],
    rows: Operand,
    weights: Sequence[EightBitWeight],
    d_outs: Sequence[jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The gradients of what `rows` was quantized from, in the dtype of `d_outs`, and of the weights."""
    x, dtype = rows.values, d_outs[0].dtype
    rows = _gather_rows(rows)
    matrices, gradients = [], []
    for equation, spec, weight, d_out in zip(equations, weight_specs, weights, d_outs, strict=True):
        left, right, result = equation.replace("->", ",").split(",")
        matrices.append(matrix := _quantized_matrix(equation, weight, spec))
        gradient_dtype = _DTYPES[weight.products][1]
        keys = (None, None) if weight.key is None else jax.random.split(weight.key)
        d_out = sharding.gather_sequence(d_out).astype(jnp.float32)
        shared = [axis for axis, letter in enumerate(result) if letter in left]
        outputs = [axis for axis in range(len(result)) if axis not in shared]
        factors = along(matrix.scale, right, result), along(rows.scale, left, result)
        if weight.scales == "tensor":
            once = weight.quantize(d_out, outputs, gradient_dtype, keys[0])
            by_rows, by_columns = (Operand(once.values, once.scale * factor) for factor in factors)
        else:
            by_rows = quantize(d_out * factors[0], outputs, gradient_dtype, keys[0])
            by_columns = quantize(d_out * factors[1], shared, gradient_dtype, keys[1])
        gradients.append((by_rows, by_columns))
    # All at once, so that a gradient is read once for all that is made of it.
    gradients = jax.lax.optimization_barrier(gradients)
    transposed = _tokens_last(rows.values)
    terms: list[tuple[str, Operand, jax.Array]] = []
    d_weights = []
    for equation, spec, weight, matrix, (by_rows, by_columns) in zip(
        equations, weight_specs, weights, matrices, gradients, strict=True
    ):
        left, right, result = equation.replace("->", ",").split(",")
        terms.append((f"{result},{right}->{left}", by_rows, matrix.values))
        equation = f"{left[2:]}t,t{result[2:]}->{right}"
        d_weights.append(_weight_gradient(equation, spec, transposed, by_columns).astype(weight.dtype))
    if sharding.is_sequence_parallel(x):
        d_x = _scattered_sum(terms, sharding.spec_of(x), dtype)
    else:
        d_x = functools.reduce(jnp.add, (product(*term, sharding.spec_of(x)) for term in terms))
    return d_x.astype(dtype), tuple(d_weights)


def _project_forward(
    equations: tuple[str, ...], weight_specs: tuple[P, ...], out_spec: P, x: jax.Array, weights: Any
) -> Any:
    rows = quantized_rows(equations[0], x, weights[0])
    return forward(equations, weight_specs, out_spec, rows, weights, x.dtype), (rows, weights)


def _project_backward(
    equations: tuple[str, ...], weight_specs: tuple[P, ...], out_spec: P, residuals: Any, d_outs: Any
) -> Any:
    rows, weights = residuals  # not x: fewer bytes, and it is not quantized again
    d_x, d_weights = backward(equations, weight_specs, rows, weights, d_outs)
    return d_x, cotangents(weights, d_weights)


def cotangents(weights: Sequence[EightBitWeight], d_weights: Sequence[jax.Array]) -> tuple[Any, ...]:
    """The gradients of weights as those of `EightBitWeight`s; a key has none."""
    pairs = zip(weights, d_weights, strict=True)
    return tuple(dataclasses.replace(weight, weight=gradient, key=None) for weight, gradient in pairs)


_project.defvjp(_project_forward, _project_backward)


def quantized_rows(equation: str, x: jax.Array, weight: EightBitWeight) -> Operand:
    """x, quantized by tokens."""
    left, result = equation.split(",")[0], equation.split("->")[1]
    contracted = [axis for axis, letter in enumerate(left) if letter not in result]
    return jax.lax.optimization_barrier(weight.quantize(x, contracted, _DTYPES[weight.products][0]))


def _gather_rows(rows: Operand) -> Operand:
    """Gathered over `tensor`, where that shards the sequence."""
    return Operand(*(sharding.gather_sequence(array) for array in rows))


def _tokens_last(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [..., B T], also in memory.

    Work-around for XLA:TPU (JAX 0.12.0.1): where its left operand is contracted over another dimension than
    the last in memory, a product in eight bits runs at half of its rate. The layout of x is constrained too:
    otherwise all that x is computed from would get the transposed one.
    """
    spec = sharding.spec_of(x)

    def local(x: jax.Array) -> jax.Array:
        rows = jax.lax.optimization_barrier(row_major(x.reshape(x.shape[0] * x.shape[1], -1)))
        columns = jax.lax.optimization_barrier(row_major(rows.T))
        return columns.reshape(*x.shape[2:], -1)

    tokens = () if spec is None else (*sharding.axes_of(spec[0]), *sharding.axes_of(spec[1]))
    out_spec = None if spec is None else P(*spec[2:], tokens or None)
    return spmd.shard_map_or_call(local, (spec,), out_spec)(x)


def _quantized_matrix(equation: str, weight: EightBitWeight, spec: P) -> Operand:
    """The weight, quantized by outputs as shards, then gathered over `fsdp` and `context`."""
    right, result = equation.split(",")[1].split("->")
    contracted = [axis for axis, letter in enumerate(right) if letter not in result]
    operand = weight.quantize(weight.weight, contracted, _DTYPES[weight.products][0])
    values, scale = jax.lax.optimization_barrier(operand)
    sizes = zip(spec, scale.shape, weight.shape, strict=True)
    scale_spec = P(*(entry if size == whole else None for entry, size, whole in sizes))
    return Operand(sharding.gather(values, spec), sharding.gather(scale, scale_spec))


def _scattered_sum(
    products: Sequence[tuple[str, Operand, Operand | jax.Array]], out_spec: P | None, dtype: jnp.dtype
) -> jax.Array:
    """`linear.scattered_sum`: the sum of products whose contracted dimensions `tensor` shards."""
    equations = [equation for equation, _, _ in products]
    operands = tuple(tuple(pair) for _, *pair in products)

    def local(*operands: Any) -> jax.Array:
        operands = spmd.pvary_like(operands)
        terms = (product(equation, *pair) for equation, pair in zip(equations, operands, strict=True))
        part = functools.reduce(jnp.add, terms)
        return jax.lax.psum_scatter(part.astype(dtype), "tensor", scatter_dimension=1, tiled=True)

    in_specs = jax.tree.map(sharding.spec_of, operands)
    return spmd.shard_map_or_call(local, in_specs, out_spec)(*operands)


def _weight_gradient(equation: str, weight_spec: P, x: jax.Array, d_out: Operand) -> jax.Array:
    """`linear.sharded_weight_gradient`: summed in f32 over all devices, sharded as the weight is.

    x is of `_tokens_last`, d_out [B, T, ...].
    """
    axes = sharding.explicit_axes()
    dimension = weight_spec.index(sharding.PARAMS) if sharding.PARAMS in weight_spec else None

    def local(x: jax.Array, d_out: Operand) -> jax.Array:
        x, d_out = spmd.pvary_like((x, d_out))
        d_out = Operand(*(array.reshape(-1, *array.shape[2:]) for array in d_out))
        return spmd.reduce_scatter_grad(product(equation, x, d_out), dimension, axes)

    in_specs = jax.tree.map(sharding.spec_of, (x, d_out))
    return spmd.shard_map_or_call(local, in_specs, weight_spec)(x, d_out)
