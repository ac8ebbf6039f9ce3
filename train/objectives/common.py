"""What objectives share: their types, forward options, and reductions over the segments of packed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.forward_options import ForwardOptions
from llama_jax.loss import Loss, add_router_losses
from llama_jax.ops.router_losses import RouterLosses

from ..config.train import TrainConfig
from ..devices import attention_backend, compute_dtype

# int32 [B, T] tokens, segment_ids (0 is padding), positions; in finetuning also mask, 1 where a token's
# prediction counts, and f32 value, a segment's label, target or margin at its last token; with precomputed
# reference log-probabilities also f32 reference, log p_ref of an answer at its last token, elsewhere 0.
Batch = Mapping[str, jax.Array]
# f32 sums over what `Loss.count` counts, or sums with a count of their own
Metrics = dict[str, jax.Array | Loss]
# (params, batch, and where needed reference=params, teacher=a `Network`, key=a random key) -> the loss, and
# metrics beside it
MetricsFn = Callable[..., tuple[Loss, Metrics]]
LossFn = Callable[..., Loss]


def forward_options(config: TrainConfig, platform: str) -> ForwardOptions:
    """How the `train` section asks the forward pass to be computed on `platform`."""
    return ForwardOptions(
        dtype=compute_dtype(config, platform),
        attention_backend=attention_backend(config, platform),
        remat=config.remat,
        custom_vjp=True,
    )


def with_router_losses(loss: Loss, router: RouterLosses | None, config: TrainConfig) -> Loss:
    """The loss with those of a mixture's routers, as the `train` section weights them."""
    weights = jnp.float32([config.router_aux_loss_coef, config.router_z_loss_coef])
    return add_router_losses(loss, router, RouterLosses(balance=weights[0], z=weights[1]))


def unshard_sequence(x: jax.Array) -> jax.Array:
    """Constrains [B, T] to whole rows per device: segment reductions run along them."""
    return sharding.constrain(x, P(sharding.BATCH, None))


def segment_cumsum(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Cumulative sums that restart where `ids` changes: the total of a segment is at its last token.

    Args:
      values: f32 [B, T].
      ids: int [B, T], equal within a segment and different between neighbors.

    Returns:
      f32 [B, T].
    """

    def combine(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        left_starts, total = left
        starts, value = right
        return left_starts | starts, jnp.where(starts, value, total + value)

    previous = jnp.concatenate([jnp.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)
    return jax.lax.associative_scan(combine, (ids != previous, values), axis=1)[1]


def segment_lengths(segment_ids: jax.Array) -> jax.Array:
    """f32 [B, T]: the number of tokens of the segment that each token belongs to.

    Args:
      segment_ids: int [B, T]; padding, id 0, counts as segments too.
    """
    ids = unshard_sequence(segment_ids)
    ones = jnp.ones_like(ids, jnp.float32)
    up_to, from_there = segment_cumsum(ones, ids), segment_cumsum(ones, ids[:, ::-1])[:, ::-1]
    return up_to + from_there - 1


def segment_ends(ids: jax.Array) -> jax.Array:
    """bool [B, T]: the last token of each segment; padding, id 0, has none."""
    following = jnp.concatenate([ids[:, 1:], jnp.full_like(ids[:, :1], -1)], axis=1)
    return (ids != following) & (ids > 0)


def pair_sums(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over chosen and over rejected answers, f32 [B, T] each, to be read at a pair's last token."""
    segments = unshard_sequence(batch["segment_ids"])
    pairs, is_chosen = (segments + 1) // 2, segments % 2 == 1
    return (
        segment_cumsum(jnp.where(is_chosen, values, 0.0), pairs),
        segment_cumsum(jnp.where(~is_chosen, values, 0.0), pairs),
    )


def pair_ends(batch: Batch) -> jax.Array:
    """bool [B, T]: the last token of each pair."""
    return segment_ends((unshard_sequence(batch["segment_ids"]) + 1) // 2)


def pair_metrics(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
    """Accuracy, a tie counting half, and margin of the rewards of chosen and rejected answers."""
    correct = (chosen > rejected) + 0.5 * (chosen == rejected)  # all are ties before DPO's first step
    return {"accuracy": correct, "reward_margin": chosen - rejected}


def masked_sums(mask: jax.Array, losses: jax.Array, **metrics: jax.Array) -> tuple[Loss, Metrics]:
    """Sums losses and metrics over `mask`, whose number of set entries is the count."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x.astype(jnp.float32), 0.0).sum()

    loss = Loss(total=total(losses), count=mask.sum().astype(jnp.float32))
    sums: Metrics = {name: total(x) for name, x in metrics.items()}
    return loss, sums
