"""Matrix products accumulated in f32, each in the form that the compiler of the target platform runs fast."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding

# Parts of the contracted dimension in `matvec`: the fastest number, or as fast as any, from [288, 288] to
# [11008, 4096].
_PARTS = 4


def dot(equation: str, a: jax.Array, b: jax.Array, out_sharding: P | None = None) -> jax.Array:
    """einsum accumulated and returned in f32, whatever the dtype of the operands."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def matvec(equation: str, x: jax.Array, weight: jax.Array, out_sharding: P | None = None) -> jax.Array:
    """`dot` of a single row x [1, 1, ...] with a weight: the products of decoding one sequence.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1), which runs a matrix-vector product in a loop of its own
    rather than in its matrix library. bf16: the row is duplicated, which makes it a matrix product, 2 to 10
    times faster. f32: the contracted dimension is split into `_PARTS`, which are read from memory as
    concurrent streams, up to a third faster.
    """
    plain = functools.partial(dot, equation, out_sharding=out_sharding)
    operands, result = equation.split("->")
    left, right = operands.split(",")

    def duplicated(x: jax.Array, weight: jax.Array) -> jax.Array:
        return plain(jnp.concatenate([x, x], axis=1), weight)[:, :1]

    def in_parts(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-1], _PARTS, -1)
        weight = weight.reshape(_PARTS, -1, *weight.shape[1:])
        return dot(f"{left[:-1]}p{left[-1]},p{right}->p{result}", x, weight).sum(0)

    divides = right[0] == left[-1] and weight.shape[0] % _PARTS == 0
    if x.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(x, weight, cpu=duplicated, default=plain)
    if x.dtype == jnp.float32 and divides and not sharding.explicit_axes():
        return jax.lax.platform_dependent(x, weight, cpu=in_parts, default=plain)
    return plain(x, weight)


def query_key_product(q: jax.Array, keys: jax.Array) -> jax.Array:
    """q k^T: [B, K, G, T, H] by [B, K, S, H] -> f32 [B, K, G, T, S].

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): it transposes the right operand of a product over that
    operand's last dimension, here the whole key cache. With one query the operands change places, and the
    scores are transposed instead.
    """
    plain = functools.partial(dot, "bkgth,bksh->bkgts")
    if q.shape[3] != 1:
        return plain(q, keys)

    def keys_first(q: jax.Array, keys: jax.Array) -> jax.Array:
        return dot("bksh,bkgth->bksgt", keys, q).transpose(0, 1, 3, 4, 2)

    return jax.lax.platform_dependent(q, keys, cpu=keys_first, default=plain)


def weight_gradient(x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str) -> jax.Array:
    """The product of x and y over the dimensions that are not in `out_dims`, f32.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): the product contracts the leading dimensions of its left
    operand, which some processors run in f32 code, four times slower than their bf16 instructions. On CPU, x
    is transposed in memory first. XLA folds a plain transpose back into the product; it does not fold one
    that is inside a conditional.
    """
    plain = functools.partial(dot, f"{x_dims},{y_dims}->{out_dims}")
    if x.dtype != jnp.bfloat16 or sharding.explicit_axes():
        return plain(x, y)
    # Batch dimensions first, contracted ones last.
    dims = "".join(d for d in x_dims if d in y_dims and d in out_dims)
    dims += "".join(d for d in x_dims if d not in y_dims) + "".join(d for d in x_dims if d not in out_dims)
    order = tuple(x_dims.index(d) for d in dims)

    def transposed(x: jax.Array, y: jax.Array) -> jax.Array:
        corner = y[(0,) * y.ndim]
        # XLA cannot prove which branch is taken (a NaN differs from itself); both compute the same.
        x = jax.lax.cond(
            corner == corner,
            lambda x: jnp.transpose(x, order),
            lambda x: jnp.flip(jnp.transpose(jnp.flip(x), order)),
            x,
        )
        # Keeps a later transpose out of the product too: XLA:CPU does not run that product in bf16.
        return jax.lax.optimization_barrier(dot(f"{dims},{y_dims}->{out_dims}", x, y))

    return jax.lax.platform_dependent(x, y, cpu=transposed, default=plain)
