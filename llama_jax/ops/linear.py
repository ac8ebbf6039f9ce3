"""Matrix products of activations with weights, and SwiGLU: accumulated in f32, with a backward pass to match.

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
from llama_jax.ops.products import dot, one_row, weight_gradient
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
    if x.shape[0] * x.shape[1] == 1 and jax.default_backend() == "cpu":
        return one_row(equation, x, weight, layout)
    return dot(equation, x, weight, layout)


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
    d_weight = _stored_gradient(stored, left, x, result, d_out, right)
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


def through(network: Network, y: jax.Array, *, custom_vjp: bool = False) -> jax.Array:
    """y + f(y down + down_bias) up + up_bias, [B, T, D] in y's dtype, biases and f in f32."""
    linear = functools.partial(project, custom_vjp=custom_vjp, out=sharding.ACT_BTD)
    inner = linear("btd,dm->btm", y, network.down, stored=sharding.BOTTLENECK_DOWN_DM)
    inner = network.function(inner.astype(jnp.float32) + network.down_bias)
    change = linear("btm,md->btd", inner.astype(y.dtype), network.up, stored=sharding.BOTTLENECK_UP_MD)
    return (y.astype(jnp.float32) + change.astype(jnp.float32) + network.up_bias).astype(y.dtype)


def _stored_gradient(
    stored: P, x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str
) -> jax.Array:
    """`weight_gradient` over every device's rows, summed in f32 into the weight's own layout."""
    axes = sharding.explicit_axes()

    def local(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = spmd.pvary_all(x, y)
        gradient = weight_gradient(x_dims, x, y_dims, y, out_dims)
        return spmd.reduce_scatter_grad(gradient, stored.index("fsdp") if "fsdp" in stored else None, axes)

    return spmd.shard_map_or_call(local, (sharding.layout_of(x), sharding.layout_of(y)), stored)(x, y)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in f32, in gate's dtype (arXiv 2002.05202)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_down(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> jax.Array:
    """w_down (silu(gate) * up) for training: [B, T, F] by [F, D] -> [B, T, D]; keeps gate and up alone.

    On a TPU, XLA fuses SiLU into the products around it, which then run at half their speed. The barriers
    have it computed alone: once forwards, and once backwards together with both gradients.
    """
    return _swiglu_down(*spmd.pvary_all(gate, up, w_down))


@jax.custom_vjp
def _swiglu_down(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> jax.Array:
    gate, up = jax.lax.optimization_barrier((gate, up))
    y = jax.lax.optimization_barrier(swiglu(gate, up))
    return project("btf,fd->btd", y, w_down, stored=sharding.DOWN_FD, out=sharding.ACT_BTD)


def _swiglu_down_forward(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> Any:
    return _swiglu_down(gate, up, w_down), (gate, up, w_down)


def _swiglu_down_backward(saved: Any, d_out: jax.Array) -> Any:
    gate, up, w_down = saved
    dtype, whole = gate.dtype, sharding.gather(w_down.astype(gate.dtype), sharding.DOWN_FD)
    d_y = dot("btd,fd->btf", d_out, whole, sharding.layout_of(gate)).astype(dtype)
    gate, up, d_y = (a.astype(jnp.float32) for a in (gate, up, jax.lax.optimization_barrier(d_y)))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate, d_up, y = jax.lax.optimization_barrier(
        tuple(a.astype(dtype) for a in (d_y * up * (sigmoid + silu * (1 - sigmoid)), d_y * silu, silu * up))
    )
    d_down = _stored_gradient(sharding.DOWN_FD, "btf", y, "btd", d_out, "fd")
    return d_gate, d_up, d_down.astype(w_down.dtype)


_swiglu_down.defvjp(_swiglu_down_forward, _swiglu_down_backward)
