"""Log-probabilities of completions by the trainer's forward pass, and the tokens that it would have sampled.

One program scores a batch [B, T], always of the same shape. Where rollouts are exact it also samples: from
its logits at every position, with the key of that token, as decoding does. A completion each of whose tokens
is the one that is sampled from the logits before it was sampled by this program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, Sampling, sharding
from llama_jax.decoding import processes
from llama_jax.decoding.sampling import sample_gumbel
from llama_jax.decoding.state import fold_in_rows
from llama_jax.loss import map_logits, shift_left, shift_right
from llama_jax.model import hidden_states
from llama_jax.tokenizer import Tokenizer

from ..config.run import RunConfig
from ..feed import Feed
from ..objectives import with_prefix_backend
from ..objectives.common import forward_options
from ..trainable import Frozen, TrainableSpec


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the trainer's forward pass says of a batch; entry t is of token t.

    Attributes:
      logprobs: f32 [B, T], log-probabilities at the temperature of sampling, those of the loss.
      plain: f32 [B, T], the same at temperature 1, as decoding reports them.
      choices: int32 [B, T], the token that is sampled there; None unless rollouts are exact.
    """

    logprobs: np.ndarray
    plain: np.ndarray
    choices: np.ndarray | None


class Scorer:
    """Scores batches of completions, by one compiled program."""

    def __init__(
        self,
        run: RunConfig,
        model: LlamaConfig,
        platform: str,
        tokenizer: Tokenizer,
        feed: Feed,
        trainable_spec: TrainableSpec,
        sampling: Sampling,
    ) -> None:
        """`sampling` is that of the rollouts, with one value for all rows."""
        rows, microbatches = run.train.global_batch_size, run.train.gradient_accumulation_steps
        score = _make_score(run, model, platform, tokenizer, sampling)
        self._feed = feed

        @jax.jit
        def scored(trainable: Any, frozen: Frozen, batch: Any, key: jax.Array, first_row: jax.Array) -> Any:
            params = trainable_spec.language_model(trainable, frozen)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))
            return over_microbatches(lambda part: score(params, *part), (batch, keys), microbatches)

        self._scored = scored

    def __call__(
        self, trainable: Any, frozen: Frozen, batch: dict[str, np.ndarray], key: jax.Array, first_row: int
    ) -> Scored:
        """Scores this process's rows of a batch; every process gets the whole result.

        Args:
          trainable, frozen: the parameters.
          batch: `tokens`, `segment_ids`, `positions`, and `index`, the number of a token in its completion
            (-1 elsewhere).
          key: of the rollout.
          first_row: the number of the batch's first row among those of the rollout.
        """
        arrays = self._feed.put(batch)
        found = self._scored(trainable, frozen, arrays, key, np.int32(first_row))
        return Scored(**{"choices": None, **processes.fetch(found)})


def over_microbatches(function: Callable[[Any], Any], rows: Any, count: int) -> Any:
    """`function` of a tree of rows [B, ...], of a part of them at a time, as the step has them.

    Args:
      function: rows -> a tree of arrays [b, T].
      rows: the tree.
      count: the number of microbatches.
    """
    if count == 1:
        return function(rows)
    # Microbatch m has rows m, m + count, ...
    split = lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)  # noqa: E731
    found = jax.lax.map(function, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1]), found)


def _make_score(
    run: RunConfig, model: LlamaConfig, platform: str, tokenizer: Tokenizer, sampling: Sampling
) -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]]:
    options = forward_options(with_prefix_backend(run), platform)
    temperature, chooses = run.rl.temperature, run.train.exact_rollouts
    is_unused = np.isin(np.arange(model.vocab_size), getattr(tokenizer, "unused_ids", ()))

    def score(params: Any, batch: Any, keys: jax.Array) -> dict[str, jax.Array]:
        rows = keys.shape[0]
        settings = jax.tree.map(sharding.over_batch, sampling.broadcast(rows))

        def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
            """int32 [B, t]: the tokens sampled from logits [B, t, V]."""
            # One position at a time, as decoding has them: no axis of the mesh may divide the positions.
            logits = sharding.constrain(logits, P(sharding.BATCH, None, "tensor"))
            if is_unused.any():
                logits = jnp.where(is_unused, -jnp.inf, logits)

            def at_position(position: tuple[jax.Array, jax.Array]) -> jax.Array:
                number = sharding.constrain(position[1], sharding.ROWS_B)

                def draw(here: jax.Array) -> jax.Array:
                    here = sharding.constrain(here, sharding.LOGITS_BV)
                    return sample_gumbel(here, settings, fold_in_rows(keys, jnp.maximum(number, 0)))

                is_used = jnp.any(number >= 0)  # by any completion: prompts need no random numbers
                return jax.lax.cond(is_used, draw, lambda _: jnp.zeros_like(number), position[0])

            places = jnp.moveaxis(logits, 1, 0), jnp.moveaxis(index, 1, 0)
            return jnp.moveaxis(jax.lax.map(at_position, places), 0, 1)

        def of_logits(logits: jax.Array, targets: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
            is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
            logit = jnp.where(is_target, logits, 0.0).sum(-1)
            plain = logit - jax.nn.logsumexp(logits, axis=-1)
            found = {"plain": plain, "logprobs": plain}
            if temperature != 1:
                found["logprobs"] = logit / temperature - jax.nn.logsumexp(logits / temperature, axis=-1)
            return found | ({"choices": choose(logits, index)} if chooses else {})

        x = hidden_states(
            model, params, batch["tokens"], batch["positions"], batch["segment_ids"], options=options
        )
        following = shift_left(batch["tokens"]), shift_left(batch["index"])
        found = map_logits(params, x, of_logits, *following, num_chunks=run.train.loss_chunks)
        return {name: shift_right(values) for name, values in found.items()}

    return score
