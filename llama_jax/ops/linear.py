"""Products of activations with weights, accumulated in f32, with a custom backward pass.

Automatic differentiation of a bf16 product hands its two backward products f32 cotangents, which no
backend likes. `custom_vjp=True` forms them in the compute dtype with f32 accumulation instead, and gathers
a sharded weight again rather than keeping it. It is a `custom_vjp`, which forward-mode differentiation
(`jax.jvp`, `jax.hessian`) refuses; `autodiff` has no such limit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.adapted import Adapted, Network, specs
from llama_jax.ops.products import dot, matvec, weight_gradient
from llama_jax.ops.quantization import Quantized


def contract(equation: str, x: jax.Array, weight: jax.Array | Quantized, *, stored: P, out: P) -> jax.Array:
    """einsum of an activation [B, T, ...] with a weight, computed in x's dtype, accumulated in f32.

    Args:
      equation: the einsum; its letters are the shapes.
      x: the activation, in the compute dtype.
      weight: the parameter, cast to the compute dtype and then gathered over `fsdp`; or quantised.
      stored: the weight's row of the sharding table.
      out: the result's row.

    Returns:
      f32 [B, T, ...].
    """
    layout = sharding.out_sharding(out, x.shape[:2] + (0,) * (len(out) - 2))
    if isinstance(weight, Quantized):
        flat = None if layout is None else P(*layout[:3])
        result = weight.gather(stored).product(x.reshape(*x.shape[:2], -1), flat)
        outputs = [size for axis, size in enumerate(weight.shape) if axis not in weight.summed]
        return result.reshape(*x.shape[:2], *outputs)
    weight = sharding.gather(weight.astype(x.dtype), stored)
    product = matvec if x.shape[0] * x.shape[1] == 1 else dot
    return product(equation, x, weight, layout)


def project(
    equation: str,
    x: jax.Array,
    weight: jax.Array | Quantized | Adapted,
    *,
    stored: P,
    out: P,
    custom_vjp: bool = False,
) -> jax.Array:
    """`contract`, rounded to x's dtype; of a weight with an adapter too."""
    if isinstance(weight, Adapted):
        return _project_adapted(equation, x, weight, stored=stored, out=out, custom_vjp=custom_vjp)
    if custom_vjp:
        if isinstance(weight, Quantized):
            return _project_frozen(equation, stored, out, x, weight)
        return _project(equation, stored, out, *spmd.pvary_all(x, weight))
    return contract(equation, x, weight, stored=stored, out=out).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(equation: str, stored: P, out: P, x: jax.Array, weight: jax.Array) -> jax.Array:
    return contract(equation, x, weight, stored=stored, out=out).astype(x.dtype)


def _project_forward(equation: str, stored: P, out: P, x: jax.Array, weight: jax.Array) -> Any:
    return _project(equation, stored, out, x, weight), (x, weight)


def _project_backward(equation: str, stored: P, out: P, saved: Any, d_out: jax.Array) -> Any:
    x, weight = saved
    operands, result = equation.split("->")
    left, right = operands.split(",")
    whole = sharding.gather(weight.astype(x.dtype), stored)
    d_x = dot(f"{result},{right}->{left}", d_out, whole, sharding.layout_of(x))
    d_weight = weight_gradient_as_stored(stored, left, x, result, d_out, right)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project_frozen(equation: str, stored: P, out: P, x: jax.Array, weight: Quantized) -> jax.Array:
    return contract(equation, x, weight, stored=stored, out=out).astype(x.dtype)


def _project_frozen_forward(equation: str, stored: P, out: P, x: jax.Array, weight: Quantized) -> Any:
    return _project_frozen(equation, stored, out, x, weight), (x, weight)


def _project_frozen_backward(equation: str, stored: P, out: P, saved: Any, d_out: jax.Array) -> Any:
    """A quantised weight is frozen: the gradient of x alone, by way of the weight in the compute dtype."""
    x, weight = saved
    flat = d_out.reshape(*d_out.shape[:2], -1)
    layout = sharding.layout_of(x)
    spec = None if layout is None else P(*layout[:3])
    d_x = dot("bto,oi->bti", flat, weight.gather(stored).dense().astype(x.dtype), spec)
    return d_x.reshape(x.shape).astype(x.dtype), None


_project_frozen.defvjp(_project_frozen_forward, _project_frozen_backward)


def _project_adapted(
    equation: str, x: jax.Array, weight: Adapted, *, stored: P, out: P, custom_vjp: bool
) -> jax.Array:
    """x W + scale (x a) b, in that order; DoRA's magnitudes last."""
    y = project(equation, x, weight.base, stored=stored, out=out, custom_vjp=custom_vjp)
    flat = x.reshape(*x.shape[:2], -1)
    a_spec, b_spec = specs(weight.name)
    low, wide = P(*out[:2], None), P(*out[:3])
    if weight.rows is None:
        linear = functools.partial(project, custom_vjp=custom_vjp)
        inner = linear("bti,ir->btr", flat, weight.a, stored=a_spec, out=low)
        delta = weight.scale * linear("btr,ro->bto", inner, weight.b, stored=b_spec, out=wide).astype(
            jnp.float32
        )
    else:
        # BeamSearchOutput and returned sequences repeat the rows that a request began with.
        rows = jnp.repeat(weight.rows, x.shape[0] // weight.rows.shape[0])
        layout = functools.partial(sharding.out_sharding, shape=(*x.shape[:2], 0))
        a, b = (
            sharding.gather(w.astype(x.dtype), P(None, *spec))
            for w, spec in ((weight.a, a_spec), (weight.b, b_spec))
        )
        a, b = a[rows], b[rows]
        inner = dot("bti,bir->btr", flat, a, layout(low)).astype(x.dtype)
        delta = weight.scale[rows][:, None, None] * dot("btr,bro->bto", inner, b, layout(wide))
    total = y.astype(jnp.float32) + delta.reshape(y.shape)
    if weight.magnitude is not None:
        ratio = sharding.constrain(weight.magnitude / weight.norms(), P(out[2]))
        total = total * ratio.reshape(y.shape[2:])
    return total.astype(x.dtype)


def project_heads(
    heads: jax.Array, wo: jax.Array | Quantized | Adapted, *, custom_vjp: bool = False
) -> jax.Array:
    """Attention's output projection: [B, T, N, H] by wo [N, H, D] -> [B, T, D].

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): it transposes a weight whose two leading dimensions are
    contracted, here at every token. As a matrix [N H, D] it is read where it is. With `custom_vjp`, for
    training, the heads stay apart: on TPU the kernel's [B, N, T, H] is then not rearranged in memory.
    """
    linear = functools.partial(project, out=sharding.ACT_BTD, custom_vjp=custom_vjp)
    if custom_vjp:
        return linear("btnh,nhd->btd", heads, wo, stored=sharding.WO_NHD)
    n, h, d = wo.shape
    heads, wo = heads.reshape(*heads.shape[:2], n * h), wo.reshape(n * h, d)
    return linear("btf,fd->btd", heads, wo, stored=sharding.DOWN_FD)


def through(network: Network, y: jax.Array, *, custom_vjp: bool = False) -> jax.Array:
    """y + f(y down + down_bias) up + up_bias, [B, T, D] in y's dtype, biases and f in f32."""
    linear = functools.partial(project, custom_vjp=custom_vjp, out=sharding.ACT_BTD)
    inner = linear("btd,dm->btm", y, network.down, stored=sharding.BOTTLENECK_DOWN_DM)
    inner = network.function(inner.astype(jnp.float32) + network.down_bias)
    change = linear("btm,md->btd", inner.astype(y.dtype), network.up, stored=sharding.BOTTLENECK_UP_MD)
    return (y.astype(jnp.float32) + change.astype(jnp.float32) + network.up_bias).astype(y.dtype)


def weight_gradient_as_stored(
    stored: P, x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str
) -> jax.Array:
    """`weight_gradient` over every device's rows, summed in f32 into the weight's own layout."""
    axes = sharding.explicit_axes()

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = spmd.pvary_all(x, y)
        gradient = weight_gradient(x_dims, x, y_dims, y, out_dims)
        return spmd.reduce_scatter_grad(gradient, stored.index("fsdp") if "fsdp" in stored else None, axes)

    return spmd.shard_map_or_call(local, (sharding.layout_of(x), sharding.layout_of(y)), stored)(x, y)
