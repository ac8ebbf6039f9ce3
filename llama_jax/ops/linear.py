"""Products of activations with weights, accumulated in f32, with a custom backward pass.

JAX differentiates a bf16 product with an f32 result into two products with f32 cotangents, which are slow on
every backend. `custom_vjp=True` computes them in the compute dtype with f32 accumulation instead, and gathers
a sharded weight again rather than keep it. A `custom_vjp` has no forward-mode derivative (`jax.jvp`,
`jax.hessian`); the default form has one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import eight_bits, spmd
from llama_jax.ops.adapted import Adapted, BottleneckWeights, adapter_specs
from llama_jax.ops.eight_bits import EightBitWeight
from llama_jax.ops.products import dot, matvec, weight_gradient
from llama_jax.ops.quantization import Quantized


def contract(
    equation: str, x: jax.Array, weight: jax.Array | Quantized, *, weight_spec: P, out_spec: P
) -> jax.Array:
    """einsum of an activation [B, T, ...] with a weight, computed in x's dtype, accumulated in f32.

    Args:
      equation: the einsum; its letters are the shapes.
      x: the activation, in the compute dtype.
      weight: the parameter, which is cast to the compute dtype and then gathered; or quantized.
      weight_spec: the partition spec of the weight, from the table in `sharding`.
      out_spec: that of the result.

    Returns:
      f32 [B, T, ...].
    """
    spec = _result_spec(x, out_spec)
    x = x if _is_sequence_parallel(spec) else sharding.gather_sequence(x)
    if isinstance(weight, Quantized):
        merged_spec = None if spec is None else P(*spec[:3])
        result = weight.gather(weight_spec).product(x.reshape(*x.shape[:2], -1), merged_spec)
        outputs = [size for axis, size in enumerate(weight.shape) if axis not in weight.contracted]
        return result.reshape(*x.shape[:2], *outputs)
    weight = sharding.gather(weight.astype(x.dtype), weight_spec)
    product = matvec if x.shape[0] * x.shape[1] == 1 else dot
    return product(equation, x, weight, spec)


def _result_spec(x: jax.Array, out_spec: P) -> P | None:
    """`out_spec` for a product of x [B, T, ...], without the axes that do not divide B and T."""
    return sharding.out_sharding(out_spec, x.shape[:2] + (0,) * (len(out_spec) - 2))


def _is_sequence_parallel(spec: P | None) -> bool:
    return spec is not None and "tensor" in sharding.axes_of(spec[1])


def project(
    equation: str,
    x: jax.Array,
    weight: jax.Array | Quantized | Adapted | EightBitWeight,
    *,
    weight_spec: P,
    out_spec: P,
    custom_vjp: bool = False,
) -> jax.Array:
    """`contract`, rounded to x's dtype; the weight may have an adapter, or be computed in eight bits."""
    if isinstance(weight, EightBitWeight):
        return eight_bits.project([(equation, weight, weight_spec)], x, out_spec)[0]
    if isinstance(weight, Adapted):
        return _project_adapted(
            equation, x, weight, weight_spec=weight_spec, out_spec=out_spec, custom_vjp=custom_vjp
        )
    if custom_vjp:
        if sharding.is_sequence_parallel(x) and not _is_sequence_parallel(_result_spec(x, out_spec)):
            return project_all(x, [(equation, weight, weight_spec)], out_spec=out_spec, custom_vjp=True)[0]
        if isinstance(weight, Quantized):
            return _project_frozen(equation, weight_spec, out_spec, x, weight)
        return _project(equation, weight_spec, out_spec, *spmd.pvary_all(x, weight))
    return contract(equation, x, weight, weight_spec=weight_spec, out_spec=out_spec).astype(x.dtype)


def project_all(
    x: jax.Array,
    matrices: Sequence[tuple[str, jax.Array | Quantized | Adapted | EightBitWeight, P]],
    *,
    out_spec: P,
    custom_vjp: bool = False,
) -> tuple[jax.Array, ...]:
    """`project` of one x by several weights: (equation, weight, weight_spec) of each.

    Where `tensor` shards the sequence of x, and then the outputs of all weights, x is gathered once for all
    of them, and the sum of their gradients of x is reduce-scattered once. `custom_vjp` keeps the shard of x,
    and gathers it again in the backward pass.
    """
    project_one = functools.partial(project, out_spec=out_spec, custom_vjp=custom_vjp)
    bases = tuple(weight.base if isinstance(weight, Adapted) else weight for _, weight, _ in matrices)
    in_eight_bits = isinstance(bases[0], EightBitWeight)
    if not in_eight_bits and not sharding.is_sequence_parallel(x):
        return tuple(
            project_one(equation, x, weight, weight_spec=spec) for equation, weight, spec in matrices
        )
    equations, weights, specs = zip(*matrices, strict=True)
    if in_eight_bits:
        products = eight_bits.project(list(zip(equations, bases, specs, strict=True)), x, out_spec)  # type: ignore[arg-type]
    elif custom_vjp:
        products = _project_all(equations, specs, out_spec, *spmd.pvary_like((x, bases)))
    else:
        whole = sharding.gather_sequence(x)
        products = tuple(
            project_one(equation, whole, base, weight_spec=spec)
            for equation, base, spec in zip(equations, bases, specs, strict=True)
        )
    return tuple(
        _add_adapter(y, x, weight, out_spec=out_spec, custom_vjp=custom_vjp)
        if isinstance(weight, Adapted)
        else y
        for y, weight in zip(products, weights, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project_all(
    equations: tuple[str, ...], weight_specs: tuple[P, ...], out_spec: P, x: jax.Array, weights: Any
) -> tuple[jax.Array, ...]:
    whole = sharding.gather_sequence(x)
    return tuple(
        contract(equation, whole, weight, weight_spec=spec, out_spec=out_spec).astype(x.dtype)
        for equation, weight, spec in zip(equations, weights, weight_specs, strict=True)
    )


def _project_all_forward(
    equations: tuple[str, ...], weight_specs: tuple[P, ...], out_spec: P, x: jax.Array, weights: Any
) -> Any:
    return _project_all(equations, weight_specs, out_spec, x, weights), (x, weights)


def _project_all_backward(
    equations: tuple[str, ...], weight_specs: tuple[P, ...], out_spec: P, residuals: Any, d_outs: Any
) -> Any:
    x, weights = residuals
    whole = sharding.gather_sequence(x)
    terms: list[tuple[str, jax.Array, jax.Array]] = []
    d_weights: list[jax.Array | None] = []
    for equation, spec, weight, d_out in zip(equations, weight_specs, weights, d_outs, strict=True):
        operands, result = equation.split("->")
        left, right = operands.split(",")
        if isinstance(weight, Quantized):  # frozen
            matrix = weight.gather(spec).dequantize().astype(x.dtype)
            terms.append(("bto,oi->bti", d_out.reshape(*d_out.shape[:2], -1), matrix))
            d_weights.append(None)
            continue
        terms.append((f"{result},{right}->{left}", d_out, sharding.gather(weight.astype(x.dtype), spec)))
        d_weight = sharded_weight_gradient(spec, left, whole, result, d_out, right)
        d_weights.append(d_weight.astype(weight.dtype))
    return scattered_sum(terms, sharding.spec_of(x), x.dtype), tuple(d_weights)


_project_all.defvjp(_project_all_forward, _project_all_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: jax.Array) -> jax.Array:
    spec = _result_spec(x, out_spec)
    if _is_sequence_parallel(spec) and not sharding.is_sequence_parallel(x):
        gathered = sharding.gather(weight.astype(x.dtype), weight_spec)
        return scattered_sum([(equation, x, gathered)], spec, x.dtype)
    return contract(equation, x, weight, weight_spec=weight_spec, out_spec=out_spec).astype(x.dtype)


def _project_forward(equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: jax.Array) -> Any:
    return _project(equation, weight_spec, out_spec, x, weight), (x, weight)


def _project_backward(
    equation: str, weight_spec: P, out_spec: P, residuals: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    operands, result = equation.split("->")
    left, right = operands.split(",")
    d_out = d_out if sharding.is_sequence_parallel(x) else sharding.gather_sequence(d_out)
    gathered = sharding.gather(weight.astype(x.dtype), weight_spec)
    d_x = dot(f"{result},{right}->{left}", d_out, gathered, sharding.spec_of(x))
    d_weight = sharded_weight_gradient(weight_spec, left, x, result, d_out, right)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project_frozen(equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: Quantized) -> jax.Array:
    return contract(equation, x, weight, weight_spec=weight_spec, out_spec=out_spec).astype(x.dtype)


def _project_frozen_forward(
    equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: Quantized
) -> Any:
    return _project_frozen(equation, weight_spec, out_spec, x, weight), (x, weight)


def _project_frozen_backward(
    equation: str, weight_spec: P, out_spec: P, residuals: Any, d_out: jax.Array
) -> tuple[jax.Array, None]:
    """The gradient of x alone: a quantized weight is frozen. It is dequantized to the compute dtype."""
    x, weight = residuals
    d_out = d_out if sharding.is_sequence_parallel(x) else sharding.gather_sequence(d_out)
    d_merged = d_out.reshape(*d_out.shape[:2], -1)
    spec = sharding.spec_of(x)
    merged_spec = None if spec is None else P(*spec[:3])
    matrix = weight.gather(weight_spec).dequantize().astype(x.dtype)
    d_x = dot("bto,oi->bti", d_merged, matrix, merged_spec)
    return d_x.reshape(x.shape).astype(x.dtype), None


_project_frozen.defvjp(_project_frozen_forward, _project_frozen_backward)


def _project_adapted(
    equation: str, x: jax.Array, weight: Adapted, *, weight_spec: P, out_spec: P, custom_vjp: bool
) -> jax.Array:
    y = project(equation, x, weight.base, weight_spec=weight_spec, out_spec=out_spec, custom_vjp=custom_vjp)
    return _add_adapter(y, x, weight, out_spec=out_spec, custom_vjp=custom_vjp)


def _add_adapter(y: jax.Array, x: jax.Array, weight: Adapted, *, out_spec: P, custom_vjp: bool) -> jax.Array:
    """y + scale (x a) b for y = x W, in that order; then the magnitudes of DoRA."""
    linear = functools.partial(project, custom_vjp=custom_vjp)
    merged = x.reshape(*x.shape[:2], -1)
    a_spec, b_spec = adapter_specs(weight.name)
    # Of a sequence-parallel x, not x is gathered but its product with `a`.
    length = sharding.SEQUENCE if sharding.is_sequence_parallel(x) else out_spec[1]
    rank_spec, output_spec = P(out_spec[0], length, None), P(*out_spec[:3])
    if weight.rows is None:
        inner = linear("bti,ir->btr", merged, weight.a, weight_spec=a_spec, out_spec=rank_spec)
        update = linear("btr,ro->bto", inner, weight.b, weight_spec=b_spec, out_spec=output_spec)
        delta = weight.scale * update.astype(jnp.float32)
    else:
        # Beam search and num_return_sequences repeat the rows of the request.
        rows = jnp.repeat(weight.rows, x.shape[0] // weight.rows.shape[0])
        out_sharding = functools.partial(sharding.out_sharding, shape=(*x.shape[:2], 0))
        a, b = (
            sharding.gather(w.astype(x.dtype), P(None, *spec))
            for w, spec in ((weight.a, a_spec), (weight.b, b_spec))
        )
        a, b = a[rows], b[rows]
        inner = dot("bti,bir->btr", merged, a, out_sharding(rank_spec)).astype(x.dtype)
        scale = weight.scale[rows][:, None, None]
        delta = scale * dot("btr,bro->bto", inner, b, out_sharding(output_spec))
    total = y.astype(jnp.float32) + delta.reshape(y.shape)
    if weight.magnitude is not None:
        ratio = sharding.constrain(weight.magnitude / weight.norms(), P(out_spec[2]))
        total = total * ratio.reshape(y.shape[2:])
    return total.astype(x.dtype)


def project_heads(
    heads: jax.Array, wo: jax.Array | Quantized | Adapted | EightBitWeight, *, custom_vjp: bool = False
) -> jax.Array:
    """Attention's output projection: [B, T, N, H] by wo [N, H, D] -> [B, T, D].

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): it transposes a weight whose two leading dimensions are
    contracted, here at every token. As a matrix [N H, D] it is read without a copy. With `custom_vjp`, for
    training, the heads stay apart: on TPU the kernel's [B, N, T, H] is then not rearranged in memory.
    """
    linear = functools.partial(project, out_spec=sharding.ACT_BTD, custom_vjp=custom_vjp)
    if custom_vjp or isinstance(wo, EightBitWeight):
        return linear("btnh,nhd->btd", heads, wo, weight_spec=sharding.WO_NHD)
    n, h, d = wo.shape
    merged, matrix = heads.reshape(*heads.shape[:2], n * h), wo.reshape(n * h, d)
    return linear("btf,fd->btd", merged, matrix, weight_spec=sharding.DOWN_FD)


def apply_bottleneck(weights: BottleneckWeights, y: jax.Array, *, custom_vjp: bool = False) -> jax.Array:
    """y + f(y down + down_bias) up + up_bias: [B, T, D] in y's dtype; biases and f in f32."""
    linear = functools.partial(project, custom_vjp=custom_vjp, out_spec=sharding.ACT_BTD)
    inner = linear("btd,dm->btm", y, weights.down, weight_spec=sharding.BOTTLENECK_DOWN_DM)
    inner = weights.activation_function(inner.astype(jnp.float32) + weights.down_bias)
    update = linear("btm,md->btd", inner.astype(y.dtype), weights.up, weight_spec=sharding.BOTTLENECK_UP_MD)
    return (y.astype(jnp.float32) + update.astype(jnp.float32) + weights.up_bias).astype(y.dtype)


def scattered_sum(
    products: Sequence[tuple[str, jax.Array, jax.Array]], out_spec: P | None, dtype: jnp.dtype
) -> jax.Array:
    """The sum of products (equation, a, b) whose contracted dimensions `tensor` shards, [B, T, D] in `dtype`.

    Each device rounds its part of the sum to `dtype`; the parts are reduce-scattered along T.
    """
    equations = [equation for equation, _, _ in products]
    operands = [operand for _, *pair in products for operand in pair]

    def local(*operands: jax.Array) -> jax.Array:
        operands = spmd.pvary_all(*operands)
        pairs = zip(equations, operands[::2], operands[1::2], strict=True)
        part = functools.reduce(jnp.add, (dot(equation, a, b) for equation, a, b in pairs))
        return jax.lax.psum_scatter(part.astype(dtype), "tensor", scatter_dimension=1, tiled=True)

    in_specs = tuple(map(sharding.spec_of, operands))
    return spmd.shard_map_or_call(local, in_specs, out_spec)(*operands)


def sharded_weight_gradient(
    weight_spec: P, x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str
) -> jax.Array:
    """`weight_gradient` summed in f32 over the batch rows of all devices, sharded as the weight is."""
    axes = sharding.explicit_axes()
    dimension = weight_spec.index(sharding.PARAMS) if sharding.PARAMS in weight_spec else None
    over_tensor = sharding.is_sequence_parallel(x) and sharding.is_sequence_parallel(y)

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = spmd.pvary_all(x, y)
        gradient = weight_gradient(x_dims, x, y_dims, y, out_dims)
        return spmd.reduce_scatter_grad(gradient, dimension, axes, over_tensor=over_tensor)

    in_specs = sharding.spec_of(x), sharding.spec_of(y)
    return spmd.shard_map_or_call(local, in_specs, weight_spec)(x, y)
