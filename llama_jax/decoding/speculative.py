"""Speculative decoding (arXiv 2211.17192, 2302.01318): several tokens per forward pass.

A round drafts K tokens for each row, runs the model once over the row's last token and the drafts, and
samples at the K + 1 positions in order, as `decode_step` would, for as long as the sample equals the draft.
The drafts determine the number of rounds, not the tokens. Rows accept different numbers of drafts; cache
slots past a row's last token are overwritten before a query can reach them.
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
from llama_jax.decoding.constraints import Constraint, GrammarLike
from llama_jax.decoding.drafts import Draft, DraftModel, Drafts, PromptLookup
from llama_jax.decoding.generation import unstack_jit
from llama_jax.decoding.keywords import explain_unknown_keywords
from llama_jax.decoding.processes import truncate
from llama_jax.decoding.sampling import Sampling, argmax, categorical, is_greedy, sample, transform
from llama_jax.decoding.state import DecodeState, GenerateOutput, init_state, sample_token
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd
from llama_jax.taps import Edit, with_edit

# Folded into a token's key for the random number that accepts or rejects its draft; see `DRAFT_SALT`.
ACCEPT_SALT = drafts.DRAFT_SALT + 1


@chex.dataclass(frozen=True, mappable_dataclass=False)
class SpeculativeOutput:
    """The result of `speculative_generate`.

    Attributes:
      output: the `GenerateOutput`.
      rounds: int32 [], forward passes after the prompt; `generate` takes one per token.
      drafted: int32 [B], drafted tokens of each row.
      accepted: int32 [B], how many of them were accepted.
    """

    output: GenerateOutput
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    """Everything between two rounds.

    Attributes:
      decode: the rows and the model's cache, as between two decoding steps. Its `count` is not used: each
        row has its own, `output.lengths`.
      draft_cache: the draft model's cache.
      drafts: the drafts of the next round.
      rounds: see `SpeculativeOutput`, like the next two.
      drafted: see `SpeculativeOutput`.
      accepted: see `SpeculativeOutput`.
    """

    decode: DecodeState
    draft_cache: kv.KVCache | None
    drafts: Drafts
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


@explain_unknown_keywords
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
    edit: Edit | None = None,
    grammar: GrammarLike = None,
) -> SpeculativeOutput:
    """`generate` in fewer forward passes: each verifies several drafted tokens.

    With `PromptLookup` every row gets the same tokens as from `generate` with the same key, up to rounding
    (a pass over several positions sums in another order than over one). A draft x is accepted with
    probability p(x), the model's under the row's settings. With a `DraftModel` that samples x from q, x is
    accepted with probability min(1, p(x) / q(x)); otherwise a token is sampled from max(p - q, 0),
    normalized. The tokens then have the distribution of `generate`'s, and greedy rows the same tokens. In
    both cases, logits processors and end-of-sequence ids apply from token to token within a round.

    A pure function like `generate`, for `jit`, `vmap` and a mesh. Called from Python it compiles one program
    per batch size and cache size (prompt plus new tokens, rounded up to a power of two, at least 128).

    Args:
      config: the model.
      params: its parameters, preferably unstacked.
      tokens: int [B, T], right-padded prompts; padding may hold any value.
      lengths: int [B], the prompts' lengths, at least 1.
      key: a single key, of which row b uses `fold_in(key, b)`; or one key per row [B].
      sampling: temperature, filters and logits processors, see `Sampling`; None is temperature 1 and
        nothing else.
      draft: the source of drafts.
      num_draft_tokens: K, drafts per round. Static.
      max_new_tokens: at least 1. Static while tracing.
      eos_id: the end-of-sequence id or ids. None: every row runs to `max_new_tokens`.
      cache_dtype: dtype of both models' key/value caches; see `generate`. Static.
      edit: of the model, not of a draft model, as for `generate`.
      grammar: as for `generate`; a draft model's drafts keep to it too.

    Returns:
      A `SpeculativeOutput`.

    Raises:
      InputError: as `generate`; for a draft model of another vocabulary or too short a context; for a
        number of drafts, or an n-gram size, below 1.
    """
    params, context = with_edit(params, edit), config.max_position_embeddings
    if arguments.check_int("num_draft_tokens", num_draft_tokens) >= context:
        raise InputError(
            f"num_draft_tokens is {num_draft_tokens}; the model's context has {context} positions, give a few"
        )
    request = arguments.prepare_request(
        config,
        tokens,
        lengths,
        sampling,
        eos_id,
        max_new_tokens,
        params,
        draft,
        key=key,
        grammar=grammar,
        function="speculative_generate",
        options=(num_draft_tokens, str(cache_dtype), repr(getattr(draft, "config", draft))),
    )
    drafts.check_draft(config, draft, lengths, max_new_tokens)
    prompts, stop, new_tokens = request.tokens, request.max_prompt_length, request.capacity
    if stop is None or new_tokens is None:
        stop, new_tokens = prompts.shape[1], max_new_tokens
        prompts = jnp.pad(prompts, ((0, 0), (0, new_tokens)))
    else:
        params = unstack_jit(params)
        if isinstance(draft, DraftModel):
            draft = DraftModel(draft.config, unstack_jit(draft.params))
    result = _speculative_loop(
        config,
        params,
        draft,
        prompts,
        request.lengths,
        np.int32(stop - 1),
        request.key,
        request.sampling,
        request.eos_ids,
        np.int32(max_new_tokens),
        request.constraint,
        num_draft_tokens=int(num_draft_tokens),
        new_tokens=new_tokens,
        cache_dtype=kv.dtype_name(cache_dtype),
    )
    return result if request.capacity is None else truncate(result, request.rows, max_new_tokens)


@functools.partial(jax.jit, static_argnames=("config", "num_draft_tokens", "new_tokens", "cache_dtype"))
def _speculative_loop(
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
    constraint: Constraint | None = None,
    *,
    num_draft_tokens: int,
    new_tokens: int,
    cache_dtype: str | None,
) -> SpeculativeOutput:
    """Prefills the prompts int32 [B, C], C including new tokens, and runs rounds until all rows are done."""
    params, draft = jax.lax.stop_gradient((unstack(params), draft))
    batch, length = tokens.shape
    capacity = length + num_draft_tokens  # drafts are written past a row's end before they are verified
    # A round may take back all drafts, and run two tokens more of a draft model.
    run_length = max(kv.RUN_LENGTH, num_draft_tokens + 2)
    dtype = cache_dtype or compute_dtype(params)
    cache = kv.init_cache(config, batch, capacity, dtype, run_length=run_length)
    request = (tokens, lengths, 0, stop, key, sampling, eos_ids, limit, constraint)
    decode = init_state(config, params, cache, *request, new_tokens=new_tokens)
    draft_cache = drafts.prefill_draft(draft, decode.history, stop, capacity, cache_dtype, run_length)
    proposed, draft_cache = drafts.propose(draft, draft_cache, decode, num_draft_tokens)
    zeros = jnp.zeros_like(decode.history.length)
    state = _State(
        decode=decode,
        draft_cache=draft_cache,
        drafts=proposed,
        rounds=jnp.zeros((), jnp.int32),
        drafted=zeros,
        accepted=zeros,
    )
    round_with_drafts = functools.partial(_round, config, params, draft, width=num_draft_tokens)
    round_without = functools.partial(_round, config, params, draft, width=0)
    any_running = lambda state: ~jnp.all(state.decode.done)  # noqa: E731
    any_drafts = lambda state: jnp.any(state.drafts.tokens >= 0)  # noqa: E731

    def alternate(state: _State) -> _State:
        # Rounds while there are drafts, then rounds while there are none. Two loops instead of a cond,
        # which would copy the cache.
        state = jax.lax.while_loop(any_drafts, round_with_drafts, state)
        return jax.lax.while_loop(lambda state: any_running(state) & ~any_drafts(state), round_without, state)

    state = spmd.pvary_like(state, params, draft)
    # A draft model has drafts for every token but the last.
    body = round_with_drafts if isinstance(draft, DraftModel) else alternate
    state = jax.lax.while_loop(any_running, body, state)
    return SpeculativeOutput(
        output=state.decode.output,
        rounds=state.rounds,
        drafted=state.drafted,
        accepted=state.accepted,
    )


def _round(config: LlamaConfig, params: Params, draft: Draft, state: _State, *, width: int) -> _State:
    """Verifies the first `width` drafts of each row, and proposes those of the next round."""
    decode, count = state.decode, state.drafts.tokens.shape[1]
    current = state.drafts._replace(tokens=state.drafts.tokens[:, :width])
    last = decode.history.length - 1
    last_token = decode.history.token_at(last)[:, None]
    tokens = jnp.concatenate([last_token, jnp.maximum(current.tokens, 0)], axis=1)
    logits, cache = forward_cached(config, params, tokens, last, decode.cache)
    logits = sharding.constrain(logits, P(sharding.BATCH, None, None))
    decode, accepted = _verify(dataclasses.replace(decode, cache=cache), logits, current)
    proposed, draft_cache = drafts.propose(draft, state.draft_cache, decode, count)
    return _State(
        decode=decode,
        draft_cache=draft_cache,
        drafts=proposed,
        rounds=state.rounds + 1,
        drafted=state.drafted + (current.tokens >= 0).sum(-1, dtype=jnp.int32),
        accepted=state.accepted + accepted,
    )


def _verify(decode: DecodeState, logits: jax.Array, current: Drafts) -> tuple[DecodeState, jax.Array]:
    """Samples from logits f32 [B, width + 1, V], position after position, while samples equal the drafts.

    Returns:
      The state, and the number of accepted drafts of each row, int32 [B].
    """
    tokens = jnp.pad(current.tokens, ((0, 0), (0, 1)), constant_values=-1)  # the last position has no draft

    def verify_position(carry: Any) -> Any:
        index, decode, live, accepted = carry

        def at_index(x: jax.Array, axis: int, spec: P) -> jax.Array:
            return sharding.constrain(jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False), spec)

        draft, sampler = at_index(tokens, 1, sharding.ROWS_B), sample
        if current.probabilities is not None:
            q = at_index(current.probabilities, 0, sharding.LOGITS_BV)
            sampler = functools.partial(accept_or_resample, draft=draft, q=q)
        decode = sample_token(decode, at_index(logits, 1, sharding.LOGITS_BV), live, sampler)
        equal = live & (decode.token == draft)
        return index + 1, decode, equal & ~decode.done, accepted + equal

    init = (jnp.zeros((), jnp.int32), decode, ~decode.done, jnp.zeros_like(decode.history.length))
    init = spmd.pvary_like(init, logits)
    _, decode, _, accepted = jax.lax.while_loop(lambda carry: jnp.any(carry[2]), verify_position, init)
    return decode, accepted


def accept_or_resample(
    logits: jax.Array, sampling: Sampling, keys: jax.Array, *, draft: jax.Array, q: jax.Array
) -> jax.Array:
    """`sample` by rejection: the draft, sampled from q, with probability min(1, p / q), or another token.

    Args:
      logits: f32 [B, V], after `logits_processors.apply`; p is the softmax of their `transform`.
      sampling: settings, one value per row.
      keys: [B].
      draft: int32 [B]; -1 for none: the token is then sampled from p.
      q: f32 [B, V], probabilities.

    Returns:
      int32 [B]. A token other than the draft is sampled from max(p - q, 0), normalized; the result has
      distribution p.
    """
    most_likely = argmax(logits)
    greedy = is_greedy(sampling)
    one_hot = jnp.arange(logits.shape[-1]) == draft[:, None]

    def sample_random(q: jax.Array) -> jax.Array:
        p = jax.nn.softmax(transform(logits, sampling))
        q = jnp.where(draft[:, None] >= 0, q, 0.0)
        residual = jnp.maximum(p - q, 0.0)
        # Where p equals q, rounding rejects a draft once in a million times and leaves an empty residual.
        residual = jnp.where((residual > 0).any(-1, keepdims=True), residual, p)
        p, q = (jnp.where(one_hot, x, 0.0).sum(-1) for x in (p, q))
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPT_SALT)))(keys)
        token = jnp.where(uniform * q < p, draft, categorical(jnp.log(residual), keys))
        return jnp.where(greedy, most_likely, token)

    return jax.lax.cond(jnp.all(greedy), lambda _: most_likely, sample_random, q)
