"""What is minimised: from parameters and a batch to a loss.

A batch's rows are packed; an example is a segment, and of a pair the odd segment is the chosen answer and
the even one after it the rejected. Whatever is about an example or a pair is therefore a number at its last
token, and the losses are sums over tokens of which those alone count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, next_token_loss, sharding, token_logprobs
from llama_jax.loss import Loss
from llama_jax.model import ForwardOptions, hidden_states

from ..config.finetune import PreferenceConfig
from ..config.run import RunConfig, TrainConfig
from ..devices import attention_backend, compute_dtype
from .preference import dpo_loss, ranking_loss
from .segments import last, running_sums

# int32 [B, T] tokens, segment_ids (0 is padding), positions; in finetuning also mask, 1 where a token's
# prediction counts, and f32 value, a segment's own number at its last token; where they were computed
# beforehand also f32 reference, log p_ref of an answer at its last token, elsewhere 0.
Batch = Mapping[str, jax.Array]
Numbers = dict[str, jax.Array]  # f32, each a sum over what `Loss.count` counts
# (parameters, batch, and where needed reference=parameters, key=a random key) -> the loss, and other numbers
Measure = Callable[..., tuple[Loss, Numbers]]
Objective = Callable[..., Loss]


def make_measure(run: RunConfig, model: LlamaConfig, platform: str) -> Measure:
    """What a run minimises, with the other numbers that its evaluation tells.

    Args:
      run: the configuration.
      model: the model.
      platform: what it is compiled for, such as `tpu`.
    """
    how = run.train
    if run.adapter.type == "prefix" and how.attention == "auto":  # which TPU's kernel has no place for
        how = dataclasses.replace(how, attention="blockwise")
    match how.objective:
        case "pretrain" | "sft":
            plain = pretraining(model, how, platform)
            return lambda params, batch, **extras: (plain(params, batch, **extras), {})
        case "dpo":
            return direct_preference(model, how, platform, run.preference)
        case "reward":
            return reward(model, how, platform)
        case "classify":
            return classification(model, how, platform)
        case "regress":
            return regression(model, how, platform)


def make_objective(run: RunConfig, model: LlamaConfig, platform: str) -> Objective:
    """`make_measure`'s loss alone."""
    measure = make_measure(run, model, platform)
    return lambda params, batch, **extras: measure(params, batch, **extras)[0]


def pretraining(model: LlamaConfig, config: TrainConfig, platform: str) -> Objective:
    """Next-token prediction on packed documents; where a batch has a mask, of the tokens that it marks.

    Handed a key, as in training with `neftune_alpha`, it adds noise to the embeddings.

    Args:
      model: the model.
      config: the `train` section, which says how to compute.
      platform: what the step is compiled for, such as `tpu`.
    """
    options = _options(config, platform)

    def noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        bound = config.neftune_alpha / (shape[1] * model.hidden_size) ** 0.5
        where = sharding.out_sharding(sharding.ACT_BTD)
        whole = (*shape, model.hidden_size)
        return jax.random.uniform(key, whole, jnp.float32, -bound, bound, out_sharding=where)

    def objective(params: Any, batch: Batch, *, key: jax.Array | None = None) -> Loss:
        return next_token_loss(
            model,
            params,
            batch["tokens"],
            mask=batch["mask"] if "mask" in batch else batch["segment_ids"] > 0,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            num_chunks=config.loss_chunks,
            z_loss=jnp.float32(config.z_loss),
            embedding_noise=None if key is None else noise(key, batch["tokens"].shape),
            options=options,
        )

    return objective


def direct_preference(
    model: LlamaConfig, config: TrainConfig, platform: str, preference: PreferenceConfig
) -> Measure:
    """`preference.dpo_loss` over a batch's pairs, its count the pairs.

    It needs `reference`, parameters, unless the batch carries what they give.

    It tells `accuracy`, the share of pairs whose chosen answer has the larger implicit reward (equal ones
    count half), and `reward_margin`.
    """
    learned = _learned(model, config, platform)

    def measure(params: Any, batch: Batch, *, reference: Any = None) -> tuple[Loss, Numbers]:
        policy = _of_pairs(learned(params, batch), batch)
        if reference is None:
            kept = _of_pairs(_rows(batch["reference"]), batch)
        else:
            kept = jax.lax.stop_gradient(_of_pairs(learned(reference, batch), batch))
        losses, chosen, rejected = dpo_loss(
            *policy,
            *kept,
            beta=preference.beta,
            loss_type=preference.loss_type,
            label_smoothing=preference.label_smoothing,
            lengths=_of_pairs(_rows(batch["mask"]).astype(jnp.float32), batch),
        )
        return _over(_pair_ends(batch), losses, **_compared(chosen, rejected))

    return measure


def answer_logprobs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], jax.Array]:
    """The function of parameters and a batch that gives what `Batch` says of `reference`, f32 [B, T]."""
    learned = _learned(model, config, platform)

    def answers(params: Any, batch: Batch) -> jax.Array:
        segments = _rows(batch["segment_ids"])
        return jnp.where(last(segments), running_sums(learned(params, batch), segments), 0.0)

    return answers


def reward(model: LlamaConfig, config: TrainConfig, platform: str) -> Measure:
    """`preference.ranking_loss` over a batch's pairs, with `value` at the chosen answer's end its margin."""
    scores = _scores(model, config, platform)

    def measure(params: Any, batch: Batch) -> tuple[Loss, Numbers]:
        ends = last(_rows(batch["segment_ids"]))
        chosen, rejected = _of_pairs(jnp.where(ends, scores(params, batch)[..., 0], 0.0), batch)
        margin, _ = _of_pairs(_rows(batch["value"]), batch)
        losses = ranking_loss(chosen, rejected, margin)
        return _over(_pair_ends(batch), losses, **_compared(chosen, rejected))

    return measure


def classification(model: LlamaConfig, config: TrainConfig, platform: str) -> Measure:
    """Cross-entropy of the head's classes at each example's last token, with `value` there its label.

    It tells `accuracy`, and `confusion` [C, C]: how often each class, by row, was taken for each.
    """
    scores = _scores(model, config, platform)

    def measure(params: Any, batch: Batch) -> tuple[Loss, Numbers]:
        logits = scores(params, batch)
        labels = _rows(batch["value"]).astype(jnp.int32)
        picked = jnp.where(jnp.arange(logits.shape[-1]) == labels[..., None], logits, 0.0).sum(-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - picked
        taken = jnp.argmax(logits, axis=-1)
        ends = last(_rows(batch["segment_ids"]))
        loss, numbers = _over(ends, losses, accuracy=taken == labels)
        classes = jnp.arange(logits.shape[-1])
        true = (labels[..., None] == classes) & ends[..., None]
        pairs = [x.astype(jnp.float32) for x in (true, taken[..., None] == classes)]
        confusion = jnp.einsum("btc,btd->cd", *pairs, out_sharding=sharding.out_sharding(P(None, None)))
        return loss, numbers | {"confusion": confusion}

    return measure


def regression(model: LlamaConfig, config: TrainConfig, platform: str) -> Measure:
    """Squared error of the head's number at each example's last token, with `value` there the right one."""
    scores = _scores(model, config, platform)

    def measure(params: Any, batch: Batch) -> tuple[Loss, Numbers]:
        errors = scores(params, batch)[..., 0] - _rows(batch["value"])
        return _over(last(_rows(batch["segment_ids"])), errors**2, mean_absolute_error=jnp.abs(errors))

    return measure


def _options(config: TrainConfig, platform: str) -> ForwardOptions:
    return ForwardOptions(
        dtype=compute_dtype(config, platform),
        attention_backend=attention_backend(config, platform),
        remat=config.remat,
        custom_vjp=True,
    )


def _learned(model: LlamaConfig, config: TrainConfig, platform: str) -> Callable[[Any, Batch], jax.Array]:
    """The log-probability of every token that is learned, f32 [B, T]; 0 elsewhere."""
    options = _options(config, platform)

    def logprobs(params: Any, batch: Batch) -> jax.Array:
        where = (batch["tokens"], batch["positions"], batch["segment_ids"])
        each = token_logprobs(model, params, *where, num_chunks=config.loss_chunks, options=options)
        return each * _rows(batch["mask"])

    return logprobs


def _scores(model: LlamaConfig, config: TrainConfig, platform: str) -> Callable[[Any, Batch], jax.Array]:
    """The head's numbers at every token, f32 [B, T, C]: those of the last tokens are the examples'."""
    options = _options(config, platform)

    def scores(params: Any, batch: Batch) -> jax.Array:
        where = (batch["tokens"], batch["positions"], batch["segment_ids"])
        x = hidden_states(model, params, *where, options=options)
        x = sharding.constrain(x, P(sharding.BATCH, None, None)).astype(jnp.float32)
        return jnp.einsum("btd,dc->btc", x, params["score"]["kernel"], precision="highest")

    return scores


def _rows(x: jax.Array) -> jax.Array:
    """[B, T] with whole rows on a device: sums run along them."""
    return sharding.constrain(x, P(sharding.BATCH, None))


def _of_pairs(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the chosen and over the rejected answer of each pair, at the pair's last token."""
    segments = _rows(batch["segment_ids"])
    pairs, is_chosen = (segments + 1) // 2, segments % 2 == 1
    return tuple(running_sums(jnp.where(is_chosen == which, values, 0.0), pairs) for which in (True, False))  # type: ignore[return-value]


def _compared(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
    right = (chosen > rejected) + 0.5 * (chosen == rejected)  # equal before the first step
    return {"accuracy": right, "reward_margin": chosen - rejected}


def _pair_ends(batch: Batch) -> jax.Array:
    return last((_rows(batch["segment_ids"]) + 1) // 2)


def _over(where: jax.Array, losses: jax.Array, **numbers: jax.Array) -> tuple[Loss, Numbers]:
    """Sums over what `where` marks."""

    def total(x: jax.Array) -> jax.Array:
        return jnp.where(where, x.astype(jnp.float32), 0.0).sum()

    counted = Loss(total=total(losses), count=where.sum().astype(jnp.float32))
    return counted, {name: total(x) for name, x in numbers.items()}
