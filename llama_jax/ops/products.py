"""Products and layouts in the forms that each platform's compiler runs fast.

Every work-around for a compiler in a product or a layout stands here, once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from llama_jax import sharding

# How many parts `one_row` reads a matrix in: the best or as good as any from [288, 288] to [11008, 4096].
_PARTS = 4


def dot(equation: str, a: jax.Array, b: jax.Array, layout: P | None = None) -> jax.Array:
    """einsum accumulated, and returned, in f32: bf16 dots fall off XLA:CPU's fast path without it."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, out_sharding=layout)


def one_row(equation: str, x: jax.Array, weight: jax.Array, layout: P | None) -> jax.Array:
    """`dot` of a single row, which is decoding a text, in the forms that XLA:CPU is quick at."""
    if x.dtype == jnp.bfloat16:
        # There is a bf16 matmul but no bf16 matvec worth the name: two rows are 2-10x faster than one.
        return dot(equation, jnp.concatenate([x, x], axis=1), weight, layout)[:, :1]
    operands, result = equation.split("->")
    left, right = operands.split(",")
    whole = right[0] != left[-1] or weight.shape[0] % _PARTS
    if whole or x.dtype != jnp.float32 or sharding.explicit_axes():
        return dot(equation, x, weight, layout)
    # As so many products side by side, each of some rows of the matrix: several whole streams out of memory
    # in the place of one of slices of rows, up to a third faster.
    x = x.reshape(*x.shape[:-1], _PARTS, -1)
    weight = weight.reshape(_PARTS, -1, *weight.shape[1:])
    return dot(f"{left[:-1]}p{left[-1]},p{right}->p{result}", x, weight).sum(0)


def weight_gradient(x_dims: str, x: jax.Array, y_dims: str, y: jax.Array, out_dims: str) -> jax.Array:
    """The product of x and y over the dimensions that `out_dims` leaves out, f32.

    It contracts the leading dimensions of its left side, where XLA:CPU on some processors falls from its
    bf16 path to f32 code, four times slower. There, and on the CPU alone, x is really transposed first:
    XLA would fold a plain transpose back into the product, but not one inside a conditional.
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


def row_major(x: jax.Array) -> jax.Array:
    """x as it is, last dimension fastest in memory: XLA on a TPU would transpose it in every layer.

    Elsewhere nothing is asked for: the request is not partitioned there, and would gather x from all devices.
    """

    def constrained(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


@jax.custom_vjp
def materialize_cotangent(x: jax.Array) -> jax.Array:
    """x as it is; its gradient is written out, rather than fused with what is done with it next."""
    return x


materialize_cotangent.defvjp(lambda x: (x, None), lambda _, d_out: (jax.lax.optimization_barrier(d_out),))
