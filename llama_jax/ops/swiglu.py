"""SwiGLU (arXiv 2002.05202) and the projection that follows it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.ops import eight_bits, spmd
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.eight_bits import EightBitWeight
from llama_jax.ops.linear import project, sharded_weight_gradient
from llama_jax.ops.products import dot
from llama_jax.ops.quantization import Quantized

_EQUATION = "btf,fd->btd"


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in f32, in gate's dtype (arXiv 2002.05202)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_down(
    gate: jax.Array,
    up: jax.Array,
    w_down: jax.Array | Quantized | Adapted | EightBitWeight,
    *,
    custom_vjp: bool = False,
) -> jax.Array:
    """(silu(gate) * up) w_down.

    Work-around for XLA:TPU (JAX 0.12.0.1) with `custom_vjp`: XLA fuses SiLU into the products before and
    after it, which then run at half their speed. Barriers make it a computation of its own, once in the
    forward pass and once, with both gradients, in the backward pass. Only `gate` and `up` are kept for it.

    Args:
      gate: [B, T, F].
      up: [B, T, F].
      w_down: [F, D].
      custom_vjp: use the custom backward pass; a quantized or adapted weight has none, and one that is
        computed in eight bits has always one.

    Returns:
      [B, T, D] in gate's dtype.
    """
    if isinstance(w_down, EightBitWeight):
        return _swiglu_down_eight_bits(*spmd.pvary_like((gate, up, w_down)))
    if custom_vjp and isinstance(w_down, jax.Array):
        return _swiglu_down(*spmd.pvary_all(gate, up, w_down))
    return _down(swiglu(gate, up), w_down, custom_vjp)


def _down(y: jax.Array, w_down: jax.Array | Quantized | Adapted, custom_vjp: bool = False) -> jax.Array:
    specs = {"weight_spec": sharding.DOWN_FD, "out_spec": sharding.ACT_BTD}
    return project(_EQUATION, y, w_down, **specs, custom_vjp=custom_vjp)


@jax.custom_vjp
def _swiglu_down(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> jax.Array:
    gate, up = jax.lax.optimization_barrier((gate, up))
    return _down(jax.lax.optimization_barrier(swiglu(gate, up)), w_down, custom_vjp=True)


def _swiglu_down_forward(gate: jax.Array, up: jax.Array, w_down: jax.Array) -> Any:
    return _swiglu_down(gate, up, w_down), (gate, up, w_down)


def _swiglu_down_backward(residuals: Any, d_out: jax.Array) -> Any:
    gate, up, w_down = residuals
    d_out = sharding.gather_sequence(d_out)
    dtype, gathered = gate.dtype, sharding.gather(w_down.astype(gate.dtype), sharding.DOWN_FD)
    d_y = dot("btd,fd->btf", d_out, gathered, sharding.spec_of(gate)).astype(dtype)
    gate, up, d_y = (a.astype(jnp.float32) for a in (gate, up, jax.lax.optimization_barrier(d_y)))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate, d_up, y = jax.lax.optimization_barrier(
        tuple(a.astype(dtype) for a in (d_y * up * (sigmoid + silu * (1 - sigmoid)), d_y * silu, silu * up))
    )
    d_down = sharded_weight_gradient(sharding.DOWN_FD, "btf", y, "btd", d_out, "fd")
    return d_gate, d_up, d_down.astype(w_down.dtype)


_swiglu_down.defvjp(_swiglu_down_forward, _swiglu_down_backward)


@jax.custom_vjp
def _swiglu_down_eight_bits(gate: jax.Array, up: jax.Array, w_down: EightBitWeight) -> jax.Array:
    """`swiglu_down` in eight bits; the product's own backward pass would keep its input too."""
    rows, specs = eight_bits.quantized_rows(_EQUATION, swiglu(gate, up), w_down), [sharding.DOWN_FD]
    return eight_bits.forward([_EQUATION], specs, sharding.ACT_BTD, rows, [w_down], gate.dtype)[0]


def _eight_bits_forward(gate: jax.Array, up: jax.Array, w_down: EightBitWeight) -> Any:
    return _swiglu_down_eight_bits(gate, up, w_down), (gate, up, w_down)


def _eight_bits_backward(residuals: Any, d_out: jax.Array) -> Any:
    gate, up, w_down = residuals
    y, swiglu_vjp = jax.vjp(swiglu, gate, up)
    rows = eight_bits.quantized_rows(_EQUATION, y, w_down)
    d_y, d_down = eight_bits.backward([_EQUATION], [sharding.DOWN_FD], rows, [w_down], [d_out])
    # No barrier: the gradients of gate and up are computed where they are quantized.
    return *swiglu_vjp(d_y), eight_bits.cotangents([w_down], d_down)[0]


_swiglu_down_eight_bits.defvjp(_eight_bits_forward, _eight_bits_backward)
