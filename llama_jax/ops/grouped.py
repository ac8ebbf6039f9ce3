"""Grouped products: rows grouped by expert, each group times its expert's matrix.

Rows are sorted by expert, and each group is padded to whole blocks, so that a block has one expert. A block
without rows is not computed: the cost follows the number of rows, whatever their distribution (MegaBlocks,
arXiv 2211.15841).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.ops import spmd
from llama_jax.ops.products import dot, matvec, weight_gradient
from llama_jax.ops.quantization import Quantized

MAX_BLOCK = 128  # rows; a side of a TPU's matrix unit


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("experts", "is_live", "sizes"),
    meta_fields=("block_size",),
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """How padded rows [M, ...] are divided among the experts.

    Attributes:
      experts: int32 [M / block_size], the expert of each block; they ascend.
      is_live: bool [M / block_size], whether the block has rows; those at the end may have none.
      sizes: int32 [E], the rows of each expert, padding included.
      block_size: the rows of a block.
    """

    experts: jax.Array
    is_live: jax.Array
    sizes: jax.Array
    block_size: int


def choose_block_size(rows: int, num_experts: int) -> int:
    """A power of two: 1 for as many rows as experts or fewer, else about what was fastest on two cores.

    For few rows (decoding) it is twice the mean size of a group, up to 16, so that most experts are read
    once. For many it is half the mean, up to `MAX_BLOCK`: padding is half a block per expert.
    """
    mean = -(-rows // num_experts)
    power = lambda n: 1 << max(n - 1, 0).bit_length()  # noqa: E731
    few = min(2 * power(mean), 16) if mean > 1 else 1
    return max(few, min(power(-(-mean // 2)), MAX_BLOCK))


def group_rows(
    ids: jax.Array, num_experts: int, *, max_rows: int | None = None
) -> tuple[Groups, jax.Array, jax.Array]:
    """Sorts rows by expert, stably, and pads each group to whole blocks.

    Args:
      ids: int [R], the expert of each row; `num_experts` for a row that is left out.
      num_experts: E.
      max_rows: the most rows that are not left out; R by default.

    Returns:
      The groups; `source` int [M], the row at each place, R at padding; and `place` int [R], the place of
      each row, M of one that is left out.
    """
    rows = ids.shape[0] if max_rows is None else max_rows
    size = choose_block_size(rows, num_experts)
    # The sum of ceil(n / size) over groups of n rows is at most either of these.
    count = min(rows, rows // size + num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    lengths = (ids[:, None] == experts).sum(0, dtype=jnp.int32)
    blocks = -(-lengths // size)
    last_block = jnp.cumsum(blocks)
    first_place, first_row = (last_block - blocks) * size, jnp.cumsum(lengths) - lengths
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)

    expert_of = (jnp.arange(count, dtype=jnp.int32)[:, None] >= last_block).sum(1, dtype=jnp.int32)
    is_live, expert_of = expert_of < num_experts, jnp.minimum(expert_of, num_experts - 1)
    offset = jnp.arange(count * size, dtype=jnp.int32) - jnp.repeat(first_place[expert_of], size)
    is_row = jnp.repeat(is_live, size) & (offset < jnp.repeat(lengths[expert_of], size))
    at = jnp.where(is_row, jnp.repeat(first_row[expert_of], size) + offset, 0)
    source = jnp.where(is_row, order[at], ids.shape[0])

    expert = jnp.minimum(ids, num_experts - 1)
    place = jnp.where(ids < num_experts, first_place[expert] + rank - first_row[expert], count * size)
    return Groups(expert_of, is_live, blocks * size, size), source, place


# Dimensions of a weight, each with the mesh axes that it is gathered over.
Gathers = tuple[tuple[int, tuple[str, ...]], ...]


def grouped_dot(
    x: jax.Array,
    weight: jax.Array | Quantized,
    groups: Groups,
    *,
    gathers: Gathers = (),
    custom_vjp: bool = False,
) -> jax.Array:
    """Each block of rows times its expert's matrix, accumulated in f32.

    On TPU this is `jax.lax.ragged_dot`, for which XLA has a kernel (by the cost model of libtpu 0.0.52 as
    fast as JAX's megablox, which is therefore not used), in the backward pass too. Elsewhere JAX (0.10.2)
    computes it for all rows with every expert, so a loop goes over the blocks and computes those with rows.
    Quantized matrices are dequantized in the loop on every platform: one at a time, once per block.

    Args:
      x: [M, I], rows in the order of `group_rows`.
      weight: [E, I, O]; or quantized, with a leading dimension E in every leaf.
      groups: the blocks.
      gathers: inside `shard_map` with `custom_vjp`, over what a shard of a plain weight is gathered, in x's
        dtype; in the backward pass again, where its gradient is reduce-scattered in f32.
      custom_vjp: compute the gradients in x's dtype, accumulated in f32, and that of the weight by adding up
        blocks in place. There is no forward-mode derivative then.

    Returns:
      [M, O] in x's dtype. Rows of blocks that are not live are not defined.
    """
    if isinstance(weight, Quantized):
        return _frozen_product(x, weight, groups) if custom_vjp else _by_blocks(x, weight, groups)
    if custom_vjp:
        return _product(gathers, *spmd.pvary_like((x, weight, groups)))
    return _forward_product(*spmd.pvary_like((x, weight.astype(x.dtype), groups)))


def _forward_product(x: jax.Array, weight: jax.Array, groups: Groups) -> jax.Array:
    def ragged(x: jax.Array, weight: jax.Array, groups: Groups) -> jax.Array:
        return jax.lax.ragged_dot(x, weight, groups.sizes, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, weight, groups, tpu=ragged, default=_by_blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(gathers: Gathers, x: jax.Array, weight: jax.Array, groups: Groups) -> jax.Array:
    return _forward_product(x, _gather(gathers, weight.astype(x.dtype)), groups)


def _product_forward(gathers: Gathers, x: jax.Array, weight: jax.Array, groups: Groups) -> Any:
    return _product(gathers, x, weight, groups), (x, weight, groups)


def _product_backward(gathers: Gathers, residuals: Any, d_out: jax.Array) -> Any:
    x, weight, groups = residuals
    whole = _gather(gathers, weight.astype(x.dtype))
    d_x = _forward_product(d_out, whole.swapaxes(1, 2), groups)
    d_weight = _weight_gradient(x, d_out, groups)
    for dimension, axes in gathers:
        d_weight = jax.lax.psum_scatter(d_weight, axes, scatter_dimension=dimension, tiled=True)
    return d_x, d_weight.astype(weight.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _gather(gathers: Gathers, weight: jax.Array) -> jax.Array:
    for dimension, axes in gathers:
        weight = jax.lax.all_gather(weight, axes, axis=dimension, tiled=True)
    return weight


@jax.custom_vjp
def _frozen_product(x: jax.Array, weight: Quantized, groups: Groups) -> jax.Array:
    return _by_blocks(x, weight, groups)


def _frozen_product_forward(x: jax.Array, weight: Quantized, groups: Groups) -> Any:
    return _by_blocks(x, weight, groups), (weight, groups)


def _frozen_product_backward(residuals: Any, d_out: jax.Array) -> Any:
    weight, groups = residuals

    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        return dot("ro,oi->ri", rows, _matrix_of(weight, expert).dequantize().astype(rows.dtype))

    return _map_blocks(product, d_out, groups), None, None


_frozen_product.defvjp(_frozen_product_forward, _frozen_product_backward)


def _by_blocks(x: jax.Array, weight: jax.Array | Quantized, groups: Groups) -> jax.Array:
    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        matrix = _matrix_of(weight, expert)
        if isinstance(matrix, Quantized):
            return matrix.product(rows[None], None)[0]
        return (matvec if rows.shape[0] == 1 else dot)("btd,df->btf", rows[None], matrix)[0]

    return _map_blocks(product, x, groups)


def _matrix_of(weight: Any, expert: jax.Array) -> Any:
    take = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, axis=0, keepdims=False)
    return jax.tree.map(take, weight)


def _map_blocks(product: Any, x: jax.Array, groups: Groups) -> jax.Array:
    """`product`(rows [block_size, I], expert) of every block that is live."""
    blocks = x.reshape(-1, groups.block_size, x.shape[-1])

    def step(_: None, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        rows, expert, is_live = block
        compute = lambda rows: product(rows, expert).astype(x.dtype)  # noqa: E731
        out = jax.eval_shape(compute, rows)
        empty = lambda rows: spmd.pvary_like(jnp.zeros(out.shape, out.dtype), rows, expert)  # noqa: E731
        return None, jax.lax.cond(is_live, compute, empty, rows)

    _, out = jax.lax.scan(step, None, (blocks, groups.experts, groups.is_live))
    return out.reshape(x.shape[0], -1)


def _weight_gradient(x: jax.Array, d_out: jax.Array, groups: Groups) -> jax.Array:
    """f32 [E, I, O]: for each expert the product of its rows of x [M, I] and d_out [M, O]."""
    contracted = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )

    def ragged(x: jax.Array, d_out: jax.Array, groups: Groups) -> jax.Array:
        return jax.lax.ragged_dot_general(
            x, d_out, groups.sizes, contracted, preferred_element_type=jnp.float32
        )

    def by_blocks(x: jax.Array, d_out: jax.Array, groups: Groups) -> jax.Array:
        rows, d_rows = (a.reshape(-1, groups.block_size, a.shape[-1]) for a in (x, d_out))

        def step(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
            rows, d_rows, expert, is_live = block

            def add(total: jax.Array) -> jax.Array:
                return total.at[expert].add(weight_gradient("ri", rows, "ro", d_rows, "io"))

            return jax.lax.cond(is_live, add, lambda total: total, total), None

        start = jnp.zeros((groups.sizes.shape[0], x.shape[1], d_out.shape[1]), jnp.float32)
        start = spmd.pvary_like(start, x, d_out, groups)
        return jax.lax.scan(step, start, (rows, d_rows, groups.experts, groups.is_live))[0]

    return jax.lax.platform_dependent(x, d_out, groups, tpu=ragged, default=by_blocks)
