"""Matrix products of activations with weights, and SwiGLU: accumulated in f32, with a backward pass to match.

Automatic differentiation of a bf16 product hands its two backward products f32 cotangents, which no
backend likes. `backward="fast"` forms them in the compute dtype with f32 accumulation instead, and gathers
a sharded weight again rather than keeping it. It is a `custom_vjp`, which forward-mode differentiation
(`jax.jvp`, `jax.hessian`) refuses; `autodiff` has no such limit.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding

Backward = Literal["autodiff", "fast"]


def contract(equation: str, x: jax.Array, weight: jax.Array, *, stored: P, out: P) -> jax.Array:
    """einsum of an activation [B, T, ...] with a weight, computed in x's dtype, accumulated in f32.

    Args:
      equation: the einsum; its letters are the shapes.
      x: the activation, in the compute dtype.
      weight: the parameter, cast to the compute dtype and then gathered over `fsdp`.
      stored: the weight's row of the sharding table.
      out: the result's row.

    Returns:
      f32 [B, T, ...].
    """
    weight = sharding.gather(weight.astype(x.dtype), stored)
    layout = sharding.out_sharding(out, x.shape[:2] + (0,) * (len(out) - 2))
    rows = x.shape[0] * x.shape[1]
    if rows == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA:CPU has a bf16 matmul but no bf16 matvec worth the name: two rows are 2-10x faster than one.
        x = jnp.concatenate([x, x], axis=1)
    result = dot(equation, x, weight, layout)
    return result[:, :1] if rows == 1 else result


def project(
    equation: str, x: jax.Array, weight: jax.Array, *, stored: P, out: P, backward: Backward = "autodiff"
) -> jax.Array:
    """`contract`, rounded to x's dtype."""
    if backward == "fast":
        return _project(equation, stored, out, *sharding.vary_each_alike(x, weight))
    return contract(equation, x, weight, stored=stored, out=out).astype(x.dtype)


def dot(equation: str, a: jax.Array, b: jax.Array, layout: P | None = None) -> jax.Array:
    """einsum accumulated, and returned, in f32: bf16 dots fall off XLA:CPU's fast path without it."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=layout)


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
    d_weight = weight_gradient(left, x, result, d_out, right, layout=sharding.layout_of(weight))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_project.defvjp(_project_forward, _project_backward)


def weight_gradient(
    x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str, *, layout: P | None = None
) -> jax.Array:
    """The product of x and y over the dimensions that `out_dims` leaves out, f32.

    It contracts the leading dimensions of its left side, where XLA:CPU on some processors falls from its
    bf16 path to f32 code, four times slower. There, and on the CPU alone, x is really transposed first:
    XLA would fold a plain transpose back into the product, but not one inside a conditional.
    """
    plain = functools.partial(dot, f"{x_dims},{y_dims}->{out_dims}", layout=layout)
    if x.dtype != jnp.bfloat16 or sharding.explicit_axes():
        return plain(x, y)
    # Batch dimensions first, contracted ones last.
    dims = "".join(d for d in x_dims if d in y_dims and d in out_dims)
    dims += "".join(d for d in x_dims if d not in y_dims) + "".join(d for d in x_dims if d not in out_dims)
    order = tuple(x_dims.index(d) for d in dims)

    def transposed(x: jax.Array, y: jax.Array) -> jax.Array:
        corner = y[(0,) * y.ndim]
        # Always the first branch; the second is there for XLA not to know it, and gives the same.
        x = jax.lax.cond(
            corner == corner,
            lambda x: jnp.transpose(x, order),
            lambda x: jnp.flip(jnp.transpose(jnp.flip(x), order)),
            x,
        )
        # A later transpose must not be folded in either: that product XLA:CPU refuses to run in bf16.
        return jax.lax.optimization_barrier(dot(f"{dims},{y_dims}->{out_dims}", x, y))

    return jax.lax.platform_dependent(x, y, cpu=transposed, default=plain)


def swiglu(gate: jax.Array, up: jax.Array, *, backward: Backward = "autodiff") -> jax.Array:
    """silu(gate) * up in f32, in gate's dtype (arXiv 2002.05202)."""
    if backward == "fast":
        return _swiglu(*sharding.vary_each_alike(gate, up))
    return _swiglu_plain(gate, up)


def _swiglu_plain(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


# On a TPU, XLA fuses SiLU into the products around it, which then run at half their speed: the barriers
# have its result and its gradients written out first.


@jax.custom_vjp
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(_swiglu_plain(gate, up))


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> Any:
    return _swiglu(gate, up), (gate, up)


def _swiglu_backward(saved: Any, d_out: jax.Array) -> Any:
    gate, up, d_out = (a.astype(jnp.float32) for a in (*saved, d_out))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
    return jax.lax.optimization_barrier(
        (d_gate.astype(saved[0].dtype), (d_out * silu).astype(saved[1].dtype))
    )


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
