"""Products of activations with weights, accumulated in f32, with a custom backward pass.

JAX differentiates a bf16 product with an f32 result into two products with f32 cotangents, which are slow on
every backend. `custom_vjp=True` computes them in the compute dtype with f32 accumulation instead, and gathers
a sharded weight again rather than keep it. A `custom_vjp` has no forward-mode derivative (`jax.jvp`,
`jax.hessian`); the default form has one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.adapted import Adapted, BottleneckWeights, adapter_specs
from llama_jax.ops.products import dot, matvec, weight_gradient
from llama_jax.ops.quantization import Quantized


def contract(
    equation: str, x: jax.Array, weight: jax.Array | Quantized, *, weight_spec: P, out_spec: P
) -> jax.Array:
    """einsum of an activation [B, T, ...] with a weight, computed in x's dtype, accumulated in f32.

    Args:
      equation: the einsum; its letters are the shapes.
      x: the activation, in the compute dtype.
      weight: the parameter, which is cast to the compute dtype and then gathered over `fsdp`; or quantized.
      weight_spec: the partition spec of the weight, from the table in `sharding`.
      out_spec: that of the result.

    Returns:
      f32 [B, T, ...].
    """
    spec = sharding.out_sharding(out_spec, x.shape[:2] + (0,) * (len(out_spec) - 2))
    if isinstance(weight, Quantized):
        merged_spec = None if spec is None else P(*spec[:3])
        result = weight.gather(weight_spec).product(x.reshape(*x.shape[:2], -1), merged_spec)
        outputs = [size for axis, size in enumerate(weight.shape) if axis not in weight.contracted]
        return result.reshape(*x.shape[:2], *outputs)
    weight = sharding.gather(weight.astype(x.dtype), weight_spec)
    product = matvec if x.shape[0] * x.shape[1] == 1 else dot
    return product(equation, x, weight, spec)


def project(
    equation: str,
    x: jax.Array,
    weight: jax.Array | Quantized | Adapted,
    *,
    weight_spec: P,
    out_spec: P,
    custom_vjp: bool = False,
) -> jax.Array:
    """`contract`, rounded to x's dtype; the weight may have an adapter."""
    if isinstance(weight, Adapted):
        return _project_adapted(
            equation, x, weight, weight_spec=weight_spec, out_spec=out_spec, custom_vjp=custom_vjp
        )
    if custom_vjp:
        if isinstance(weight, Quantized):
            return _project_frozen(equation, weight_spec, out_spec, x, weight)
        return _project(equation, weight_spec, out_spec, *spmd.pvary_all(x, weight))
    return contract(equation, x, weight, weight_spec=weight_spec, out_spec=out_spec).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: jax.Array) -> jax.Array:
    return contract(equation, x, weight, weight_spec=weight_spec, out_spec=out_spec).astype(x.dtype)


def _project_forward(equation: str, weight_spec: P, out_spec: P, x: jax.Array, weight: jax.Array) -> Any:
    return _project(equation, weight_spec, out_spec, x, weight), (x, weight)


def _project_backward(
    equation: str, weight_spec: P, out_spec: P, residuals: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    operands, result = equation.split("->")
    left, right = operands.split(",")
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
    """x W + scale (x a) b, in that order; then the magnitudes of DoRA."""
    linear = functools.partial(project, custom_vjp=custom_vjp)
    y = linear(equation, x, weight.base, weight_spec=weight_spec, out_spec=out_spec)
    merged = x.reshape(*x.shape[:2], -1)
    a_spec, b_spec = adapter_specs(weight.name)
    rank_spec, output_spec = P(*out_spec[:2], None), P(*out_spec[:3])
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
    heads: jax.Array, wo: jax.Array | Quantized | Adapted, *, custom_vjp: bool = False
) -> jax.Array:
    """Attention's output projection: [B, T, N, H] by wo [N, H, D] -> [B, T, D].

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): it transposes a weight whose two leading dimensions are
    contracted, here at every token. As a matrix [N H, D] it is read without a copy. With `custom_vjp`, for
    training, the heads stay apart: on TPU the kernel's [B, N, T, H] is then not rearranged in memory.
    """
    linear = functools.partial(project, out_spec=sharding.ACT_BTD, custom_vjp=custom_vjp)
    if custom_vjp:
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


def sharded_weight_gradient(
    weight_spec: P, x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str
) -> jax.Array:
    """`weight_gradient` summed in f32 over the batch rows of all devices, sharded as the weight is."""
    axes = sharding.explicit_axes()
    dimension = weight_spec.index("fsdp") if "fsdp" in weight_spec else None

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = spmd.pvary_all(x, y)
        gradient = weight_gradient(x_dims, x, y_dims, y, out_dims)
        return spmd.reduce_scatter_grad(gradient, dimension, axes)

    in_specs = sharding.spec_of(x), sharding.spec_of(y)
    return spmd.shard_map_or_call(local, in_specs, weight_spec)(x, y)
