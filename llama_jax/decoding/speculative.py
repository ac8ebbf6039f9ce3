"""Speculative decoding (arXiv 2211.17192, 2302.01318): several tokens from one run of the model.

A round drafts K tokens for each row, runs the model once over the row's last token and the drafts, and goes
through the K + 1 positions in order, choosing at each as `step` would, for as long as the draft is what was
chosen. What the drafts are decides how many rounds it takes, not what is generated. Rows accept different
numbers of drafts; what the cache holds past a row's text is overwritten before any query can reach it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, drafts
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.drafts import Draft, DraftModel, Drafts, PromptLookup
from llama_jax.decoding.generation import shortened, unstacked
from llama_jax.decoding.sampling import Sampling, argmax, choose, draw, is_greedy, transform
from llama_jax.decoding.state import DecodeState, GenerateOutput, begin, take
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd

ACCEPTING = drafts.DRAFTING + 1  # likewise, to accept a draft or not


@chex.dataclass(frozen=True, mappable_dataclass=False)
class SpeculativeOutput:
    """What `speculative_generate` returns.

    Attributes:
      generation: as `generate` returns it.
      rounds: int32 [], runs of the model after the prompt; `generate` takes one a token.
      drafted: int32 [B], tokens drafted for each row.
      accepted: int32 [B], how many of them are in what was generated.
    """

    generation: GenerateOutput
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    """Everything between two rounds.

    Attributes:
      decode: the rows' texts and the model's cache, as between two steps. Its `count` is not used: each row
        has its own, `generation.lengths`.
      draft_cache: the draft model's.
      drafts: those of the next round.
      rounds: see `SpeculativeOutput`, like the two after it.
      drafted: ditto.
      accepted: ditto.
    """

    decode: DecodeState
    draft_cache: kv.KVCache | None
    drafts: Drafts
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def speculative_generate(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    draft: Draft = PromptLookup(),  # noqa: B008  # frozen
    num_draft_tokens: int = 8,
    max_new_tokens: int,
    eos_id: EosId = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> SpeculativeOutput:
    """`generate` in fewer runs of the model, by judging several drafted tokens in each.

    With `PromptLookup` every row gets the very tokens that `generate` gives it for the same key, as far as
    rounding allows (several positions at once are summed in another order than one). A draft x is accepted
    with the probability p(x) that the model, under the row's settings, gives it. With a `DraftModel` that
    draws x from q, x is accepted with probability min(1, p(x) / q(x)), and otherwise a token is drawn from
    max(p - q, 0), normalised: the tokens have the distribution of `generate`'s, and greedy rows its very
    tokens. In both, rules and end tokens hold from token to token within a round.

    A pure function like `generate`, for `jit`, `vmap` and a mesh. Called from Python it compiles one
    program for each batch size and each power of two, from 128, that prompt and new tokens need together.

    Args:
      config: the model.
      params: its parameters, preferably unstacked.
      tokens: int [B, T], prompts padded on the right with anything.
      lengths: int [B], how many of each row's tokens are its prompt, at least 1.
      key: one key, from which row b draws with `fold_in(key, b)`; or one key a row.
      sampling: temperature, filters and rules, see `Sampling`; its defaults (plain random sampling) if None.
      draft: where drafts come from.
      num_draft_tokens: K, drafts a round. Static.
      max_new_tokens: at least 1; static while tracing.
      eos_id: the id, or ids, that end a row. None: every row runs to `max_new_tokens`.
      cache_dtype: what to hold keys and values in, of both models; see `generate`. Static.

    Returns:
      A `SpeculativeOutput`.

    Raises:
      InputError: as `generate`; for a draft model of another vocabulary or too short a context; for a
        number of drafts, or an n-gram size, below 1.
    """
    context = config.max_position_embeddings
    if arguments.whole_number("num_draft_tokens", num_draft_tokens) >= context:
        raise InputError(
            f"num_draft_tokens is {num_draft_tokens}; the model's context has {context} positions, give a few"
        )
    request = arguments.check(config, tokens, lengths, sampling, eos_id, max_new_tokens, params, key, draft)
    drafts.check(config, draft, lengths, max_new_tokens)
    prompts, stop, room = request.tokens, request.longest, request.capacity
    if stop is None or room is None:
        stop, room = prompts.shape[1], max_new_tokens
        prompts = jnp.pad(prompts, ((0, 0), (0, room)))
    else:
        params = unstacked(params)
        if isinstance(draft, DraftModel):
            draft = DraftModel(draft.config, unstacked(draft.params))
    speculation = _speculate(
        config,
        params,
        draft,
        prompts,
        request.lengths,
        np.int32(stop - 1),
        key,
        request.sampling,
        request.eos_ids,
        np.int32(max_new_tokens),
        num_draft_tokens=int(num_draft_tokens),
        new_tokens=room,
        cache_dtype=kv.dtype_name(cache_dtype),
    )
    if room == max_new_tokens:
        return speculation
    return dataclasses.replace(speculation, generation=shortened(speculation.generation, max_new_tokens))


@functools.partial(jax.jit, static_argnames=("config", "num_draft_tokens", "new_tokens", "cache_dtype"))
def _speculate(
    config: LlamaConfig,
    params: Params,
    draft: Draft,
    tokens: jax.Array,
    lengths: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    limit: jax.Array,
    *,
    num_draft_tokens: int,
    new_tokens: int,
    cache_dtype: str | None,
) -> SpeculativeOutput:
    """Reads the prompts, int32 [B, C] with room for what is to come, and plays rounds until all rows end."""
    params, draft = jax.lax.stop_gradient((unstack(params), draft))
    batch, length = tokens.shape
    room = length + num_draft_tokens  # drafts are written past the text, before they are judged
    cache = kv.init_cache(config, batch, room, cache_dtype or compute_dtype(params))
    decode = begin(
        config, params, cache, tokens, lengths, 0, stop, key, sampling, eos_ids, limit, new_tokens=new_tokens
    )
    draft_cache = drafts.read(draft, decode.history.tokens, stop, room, cache_dtype)
    first, draft_cache = drafts.following(draft, draft_cache, decode, num_draft_tokens)
    none = jnp.zeros_like(decode.history.length)
    state = _State(
        decode=decode,
        draft_cache=draft_cache,
        drafts=first,
        rounds=jnp.zeros((), jnp.int32),
        drafted=none,
        accepted=none,
    )
    wide = functools.partial(_round, config, params, draft, width=num_draft_tokens)
    narrow = functools.partial(_round, config, params, draft, width=0)
    going = lambda state: ~jnp.all(state.decode.done)  # noqa: E731
    found = lambda state: jnp.any(state.drafts.tokens >= 0)  # noqa: E731

    def rounds(state: _State) -> _State:
        # As many as there are drafts for, and then as many as there are none for. Two loops and no
        # conditional, which would copy the cache.
        state = jax.lax.while_loop(found, wide, state)
        return jax.lax.while_loop(lambda state: going(state) & ~found(state), narrow, state)

    state = spmd.pvary_like(state, params, draft)
    # A draft model always has drafts, but for the last token.
    state = jax.lax.while_loop(going, wide if isinstance(draft, DraftModel) else rounds, state)
    return SpeculativeOutput(
        generation=state.decode.output,
        rounds=state.rounds,
        drafted=state.drafted,
        accepted=state.accepted,
    )


def _round(config: LlamaConfig, params: Params, draft: Draft, state: _State, *, width: int) -> _State:
    """Judges the first `width` drafts of each row, and makes those of the next round."""
    decode, count = state.decode, state.drafts.tokens.shape[1]
    given = state.drafts._replace(tokens=state.drafts.tokens[:, :width])
    last = decode.history.length - 1
    tokens = jnp.concatenate([decode.history.at(last)[:, None], jnp.maximum(given.tokens, 0)], axis=1)
    logits, cache = forward_cached(config, params, tokens, last, decode.cache)
    logits = sharding.constrain(logits, P(sharding.BATCH, None, None))
    decode, accepted = _judge(dataclasses.replace(decode, cache=cache), logits, given)
    following, draft_cache = drafts.following(draft, state.draft_cache, decode, count)
    return _State(
        decode=decode,
        draft_cache=draft_cache,
        drafts=following,
        rounds=state.rounds + 1,
        drafted=state.drafted + (given.tokens >= 0).sum(-1, dtype=jnp.int32),
        accepted=state.accepted + accepted,
    )


def _judge(decode: DecodeState, logits: jax.Array, given: Drafts) -> tuple[DecodeState, jax.Array]:
    """Chooses by logits f32 [B, width + 1, V], position after position, while the drafts agree.

    Returns:
      the state, and how many drafts of each row were accepted, int32 [B].
    """
    tokens = jnp.pad(given.tokens, ((0, 0), (0, 1)), constant_values=-1)  # nothing agrees with the last

    def position(carry: Any) -> Any:
        index, decode, live, accepted = carry

        def at(x: jax.Array, axis: int, spec: P) -> jax.Array:
            return sharding.constrain(jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False), spec)

        draft, pick = at(tokens, 1, sharding.ROWS_B), choose
        if given.probabilities is not None:
            pick = functools.partial(
                accept_or_draw, draft=draft, q=at(given.probabilities, 0, sharding.LOGITS_BV)
            )
        decode = take(decode, at(logits, 1, sharding.LOGITS_BV), live, pick)
        agreed = live & (decode.token == draft)
        return index + 1, decode, agreed & ~decode.done, accepted + agreed

    start = (jnp.zeros((), jnp.int32), decode, ~decode.done, jnp.zeros_like(decode.history.length))
    start = spmd.pvary_like(start, logits)
    _, decode, _, accepted = jax.lax.while_loop(lambda carry: jnp.any(carry[2]), position, start)
    return decode, accepted


def accept_or_draw(
    logits: jax.Array, sampling: Sampling, keys: jax.Array, *, draft: jax.Array, q: jax.Array
) -> jax.Array:
    """`choose` by rejection: the draft, drawn from q, with probability min(1, p / q), or another token.

    Args:
      logits: f32 [B, V], after `rules.apply`; p is the softmax of what `transform` makes of them.
      sampling: settings of one value a row.
      keys: [B].
      draft: int32 [B]; -1 for none, and the token is drawn from p.
      q: f32 [B, V], probabilities.

    Returns:
      int32 [B]. What is not the draft is drawn from max(p - q, 0), normalised; together that is p.
    """
    likeliest = argmax(logits)
    greedy = is_greedy(sampling)
    here = jnp.arange(logits.shape[-1]) == draft[:, None]

    def random(q: jax.Array) -> jax.Array:
        p = jax.nn.softmax(transform(logits, sampling))
        q = jnp.where(draft[:, None] >= 0, q, 0.0)
        rest = jnp.maximum(p - q, 0.0)
        # Where p is q, rounding may refuse the draft once in a million times and leave nothing to draw from.
        rest = jnp.where((rest > 0).any(-1, keepdims=True), rest, p)
        p, q = (jnp.where(here, x, 0.0).sum(-1) for x in (p, q))
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPTING)))(keys)
        token = jnp.where(uniform * q < p, draft, draw(jnp.log(rest), keys))
        return jnp.where(greedy, likeliest, token)

    return jax.lax.cond(jnp.all(greedy), lambda _: likeliest, random, q)
