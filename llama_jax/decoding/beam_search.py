"""Beam search on the device, with the choices and the scores of Hugging Face transformers.

The beams of a prompt are tokens of one row of the cache: its keys and values are stored once, those of each
step's tokens in the slots after them, and a mask says which slots a beam's text consists of. Where others
reorder the cache at every token, this reorders the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, logits_processors
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import read_prompt
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd

EarlyStopping = bool | Literal["never"]

_WHOLE_ROWS = P(sharding.BATCH, None, None)  # [B, beams, anything]
_AT_THIS_LENGTH, _AT_ONCE, _AT_ANY_LENGTH = range(3)  # early_stopping False, True and "never"


@chex.dataclass(frozen=True, mappable_dataclass=False)
class BeamSearchOutput:
    """What `beam_search` returns: R texts of each row, best first.

    Where there are not so many (forced tokens may leave one alone), the rest has score -inf and length 0.

    Attributes:
      tokens: int32 [B, R, max_new_tokens], 0 after a text's end.
      lengths: int32 [B, R], new tokens of each text, the end token included.
      scores: f32 [B, R], the sum of its tokens' log-probabilities over length ** length_penalty.
      logprobs: f32 [B, R, max_new_tokens], the model's log-probability of each token before any rule, 0
        after a text's end.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    logprobs: jax.Array


class _Search(NamedTuple):
    """What stays the same during a search: its arguments, each as an array of one value a row or of none."""

    lengths: jax.Array
    longest: jax.Array
    limit: jax.Array
    eos_ids: jax.Array
    length_penalty: jax.Array
    early_stopping: jax.Array
    sampling: Sampling

    def score(self, total: jax.Array, length: jax.Array) -> jax.Array:
        """total [B, n] / length ** length_penalty, for a length that is one number, or one a row [B, 1]."""
        return total / length.astype(jnp.float32) ** self.length_penalty[:, None]


class _Candidates(NamedTuple):
    """Texts one token longer, [B, n]: total f32, parent int32 (a running text), token int32, ends bool."""

    scores: jax.Array
    parent: jax.Array
    token: jax.Array
    ends: jax.Array


_Texts = TypeVar("_Texts", BeamSearchOutput, _Candidates)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    """Everything between two tokens.

    In `running` and `finished`, tokens and log-probabilities are [B, beams, C] and begin with the prompt's.

    Attributes:
      cache: S slots: the prompts', then, for each step, one a beam.
      allowed: bool [B, beams, S], the slots that hold each running text, all but its last token.
      count: int32 [], tokens chosen so far.
      done: bool [B], rows whose finished texts are final.
      running: texts that may grow, likeliest first; their scores are plain sums, -inf where there is none.
      finished: texts that have ended, best first.
    """

    cache: kv.KVCache
    allowed: jax.Array
    count: jax.Array
    done: jax.Array
    running: BeamSearchOutput
    finished: BeamSearchOutput


def beam_search(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    num_beams: int = 4,
    *,
    max_new_tokens: int,
    eos_id: EosId = None,
    length_penalty: jax.typing.ArrayLike = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    sampling: Sampling | None = None,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> BeamSearchOutput:
    """Beam search: continues each prompt by the best texts that following its `num_beams` likeliest finds.

    A text's score is sum(log p) / length ** length_penalty over its new tokens. Every argument means what
    it means to `generate` of Hugging Face transformers, and the same texts and scores come out; but a row's
    do not depend on its batch mates.

    A pure function: call it inside `jit`, `vmap` or `shard_map`. Called from Python it compiles one program
    for each batch size, `num_beams`, and size of text and cache (powers of two, from 128); no value of any
    other argument recompiles it.

    Args:
      config: the model.
      params: its parameters. Stacked layers are unstacked first, which copies them once a call; pass
        `unstack(params)` to save that.
      tokens: int [B, T], prompts padded on the right with anything.
      lengths: int [B], how many of each row's tokens are its prompt, at least 1.
      num_beams: how many texts to follow, from 1 (greedy decoding) to V. Static.
      max_new_tokens: at least 1; a text of so many has ended. Static while tracing.
      eos_id: the id, or ids, that end a text.
      length_penalty: a scalar, or one a row [B]. Above 0 it favours long texts, below 0 short ones.
      early_stopping: when a row with `num_beams` finished texts is done. True: at once. False: when its
        likeliest running text, as long as it is, does not score better than the last of them. "never":
        when it would not at any length. Static.
      num_return_sequences: R, at most `num_beams`. Static.
      sampling: its rules (`repetition_penalty`, `forced_tokens`, ...) are applied to log-probabilities;
        what it says of chance must be left alone.
      cache_dtype: what to hold keys and values in, as for `generate`. Static.

    Returns:
      `BeamSearchOutput`.

    Raises:
      InputError: for what `generate` refuses, more beams than tokens, or a `sampling` that draws.
    """
    request = arguments.check(
        config, tokens, lengths, sampling, eos_id, max_new_tokens, params, length_penalty
    )
    _check(config, num_beams, num_return_sequences, Sampling() if sampling is None else sampling)
    (batch, columns), longest = request.tokens.shape, request.longest
    if longest is None:
        longest, prompts = columns, jnp.pad(request.tokens, ((0, 0), (0, max_new_tokens)))
        slots = columns + num_beams * max_new_tokens
    else:
        prompts, slots = request.tokens, arguments.capacity(longest + num_beams * max_new_tokens)
    search = _Search(
        lengths=request.lengths,
        longest=jax.device_put(np.int32(longest)),
        limit=jax.device_put(np.int32(max_new_tokens)),
        eos_ids=request.eos_ids,
        length_penalty=_penalties(length_penalty, batch),
        early_stopping=jax.device_put(np.int32(_when_to_stop(early_stopping, num_beams))),
        sampling=request.sampling,
    )
    dtype = kv.dtype_name(cache_dtype)
    found = _beams(config, params, prompts, search, num_beams, slots, dtype)

    def cut(x: Any) -> Any:
        return x[(slice(None), slice(num_return_sequences), slice(max_new_tokens))[: x.ndim]]

    if request.longest is None:
        return jax.tree.map(cut, found)
    # On the host: a slice on the device is a program for each size.
    return jax.tree.map(lambda x: jax.device_put(cut(np.asarray(x)), x.sharding), found)


@functools.partial(jax.jit, static_argnames=("config", "beams", "slots", "cache_dtype"))
def _beams(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    search: _Search,
    beams: int,
    slots: int,
    cache_dtype: str | None,
) -> BeamSearchOutput:
    """All `beams` texts of each prompt int32 [B, C], from column 0 on, in a cache of so many slots."""
    params = jax.lax.stop_gradient(unstack(params))
    rows = sharding.over_batch
    search = search._replace(
        lengths=rows(search.lengths),
        length_penalty=rows(search.length_penalty),
        sampling=jax.tree.map(rows, search.sampling),
    )
    # Padding may be anything, even an id outside the vocabulary, whose NaN would reach everyone.
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < search.lengths[:, None], rows(tokens), 0)
    cache = kv.init_cache(config, len(tokens), slots, cache_dtype or compute_dtype(params))
    # The last token of each prompt is left for the first step, so that one place feeds every beam.
    cache = read_prompt(config, params, cache, tokens, 0, search.longest - 1)
    state = spmd.pvary_like(_start(cache, tokens, search, beams), params, search)
    state = jax.lax.while_loop(
        lambda state: (state.count < search.limit) & ~jnp.all(state.done),
        lambda state: _step(config, params, state, search),
        state,
    )
    found, places = state.finished, search.lengths[:, None] + jnp.arange(tokens.shape[1])
    new = jax.vmap(lambda row, at: row.at[:, at].get(mode="fill", fill_value=0))
    return dataclasses.replace(found, tokens=new(found.tokens, places), logprobs=new(found.logprobs, places))


def _start(cache: kv.KVCache, tokens: jax.Array, search: _Search, beams: int) -> _State:
    """The state in which the prompts [B, C] are the only texts."""
    wide = lambda x: sharding.constrain(jnp.repeat(x[:, None], beams, axis=1), _WHOLE_ROWS)  # noqa: E731
    texts = wide(tokens)
    nothing = BeamSearchOutput(
        tokens=jnp.zeros_like(texts),
        lengths=jnp.zeros_like(texts[..., 0]),
        scores=jnp.full_like(texts[..., 0], -jnp.inf, jnp.float32),
        logprobs=jnp.zeros_like(texts, jnp.float32),
    )
    # All beams are the same text so far, which must be there once.
    once = jnp.where(jnp.arange(beams) == 0, 0.0, nothing.scores)
    return _State(
        cache=cache,
        allowed=wide(jnp.arange(cache.length) < search.lengths[:, None] - 1),
        count=jnp.zeros((), jnp.int32),
        done=search.lengths < 1,
        running=dataclasses.replace(nothing, tokens=texts, scores=once),
        finished=nothing,
    )


def _step(config: LlamaConfig, params: Params, state: _State, search: _Search) -> _State:
    """Feeds each running text's last token to the model and keeps the best texts one token longer."""
    beams = state.allowed.shape[1]
    logits, allowed, cache = _forward(config, params, state, search)
    logprobs = jax.nn.log_softmax(logits)
    totals = state.running.scores[..., None] + _ruled(logits, logprobs, state, search)
    going, ending = _candidates(totals, search.eos_ids)
    chosen = _best(beams, going)
    running = _longer(state, chosen, logprobs, search)

    # A text may end only if it is among the best of all, those that go on included.
    best, count = _best(beams, going, ending), state.count + 1
    ends = (best.ends | (count == search.limit)) & ~state.done[:, None] & (best.scores > -jnp.inf)
    best = best._replace(scores=jnp.where(ends, search.score(best.scores, count), -jnp.inf))
    finished = _best(beams, state.finished, _longer(state, best, logprobs, search))

    any_length = (search.early_stopping == _AT_ANY_LENGTH) & (search.length_penalty > 0)
    most = search.score(running.scores[:, :1], jnp.where(any_length, search.limit, count)[:, None])
    full = (finished.scores > -jnp.inf).all(-1) & (search.early_stopping == _AT_ONCE)
    return _State(
        cache=cache,
        allowed=_take(allowed, chosen.parent),
        count=count,
        done=state.done | full | (most <= finished.scores).all(-1),
        running=running,
        finished=finished,
    )


def _forward(
    config: LlamaConfig, params: Params, state: _State, search: _Search
) -> tuple[jax.Array, jax.Array, kv.KVCache]:
    """Logits f32 [B, beams, V] after each running text; `allowed` and the cache with its last token."""
    (_, beams, slots), columns = state.allowed.shape, state.running.tokens.shape[-1]
    last = search.lengths - 1 + state.count
    token = jnp.where(jnp.arange(columns) == last[:, None, None], state.running.tokens, 0).sum(-1)
    start = search.longest + state.count * beams
    allowed = state.allowed | (jnp.arange(slots) == start + jnp.arange(beams)[:, None])
    logits, cache = forward_cached(
        config,
        params,
        token.astype(jnp.int32),
        jnp.zeros_like(last) + start,
        state.cache,
        positions=jnp.zeros_like(token, jnp.int32) + last[:, None],
        allowed=sharding.constrain(allowed, P(sharding.BATCH, "context", None)),
    )
    return sharding.constrain(logits, _WHOLE_ROWS), allowed, cache


def _ruled(logits: jax.Array, logprobs: jax.Array, state: _State, search: _Search) -> jax.Array:
    """Log-probabilities f32 [B, beams, V] after the rules.

    As in Hugging Face, they change log-probabilities where there are several beams, but for one, which is
    greedy decoding, logits.
    """
    several = logits.shape[1] > 1

    def apply(values: jax.Array, tokens: jax.Array) -> jax.Array:
        text = logits_processors.TokenHistory(tokens, search.lengths + state.count, search.lengths)
        return logits_processors.apply(values, search.sampling.processors(), text, search.eos_ids)

    ruled = jax.vmap(apply, 1, 1)(logprobs if several else logits, state.running.tokens)
    return ruled if several else ruled - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _candidates(totals: jax.Array, eos_ids: jax.Array) -> tuple[_Candidates, _Candidates]:
    """The best ways to go on with each text, and every way to end it.

    Args:
      totals: f32 [B, beams, V], sums of log-probabilities with each next token.
      eos_ids: int32 [E].

    Returns:
      Candidates [B, beams * beams], more of one text than can be kept; and [B, beams * E].
    """
    batch, beams, vocabulary = totals.shape
    is_end = (jnp.arange(vocabulary)[:, None] == eos_ids).any(-1)
    scores, token = jax.lax.top_k(jnp.where(is_end, -jnp.inf, totals), beams)
    repeated = jnp.tril(eos_ids[:, None] == eos_ids, -1).any(-1)
    end = totals.at[:, :, jnp.where(repeated, -1, eos_ids)].get(
        mode="fill",
        fill_value=-jnp.inf,
        wrap_negative_indices=False,
        out_sharding=sharding.out_sharding(_WHOLE_ROWS, (batch, beams, eos_ids.size)),
    )

    def flat(scores: jax.Array, token: jax.Array, ends: bool) -> _Candidates:
        parent = jnp.zeros_like(token) + jnp.arange(beams, dtype=jnp.int32)[:, None]
        parts = scores, parent, token, jnp.full_like(token, ends, bool)
        return _Candidates(*(part.reshape(batch, -1) for part in parts))

    return flat(scores, token, False), flat(end, jnp.zeros_like(end, jnp.int32) + eos_ids, True)


def _longer(state: _State, by: _Candidates, logprobs: jax.Array, search: _Search) -> BeamSearchOutput:
    """The texts that candidates [B, n] stand for, with the candidates' scores."""
    old = _take(state.running, by.parent)
    here = jnp.arange(old.tokens.shape[-1]) == (search.lengths + state.count)[:, None, None]
    logprob = jax.vmap(lambda row, parent, token: row[parent, token])(logprobs, by.parent, by.token)
    return BeamSearchOutput(
        tokens=jnp.where(here, by.token[..., None], old.tokens),
        lengths=old.lengths + 1,
        scores=by.scores,
        logprobs=jnp.where(here, logprob[..., None], old.logprobs),
    )


def _best(count: int, *texts: _Texts) -> _Texts:
    """The `count` texts of each row that score best, of all that are given, in order."""
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *texts)
    return _take(together, jax.lax.top_k(together.scores, count)[1])


def _take(tree: Any, index: jax.Array) -> Any:
    """Entries index [B, m] of every array [B, n, ...]: [B, m, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, index), tree)


def _check(config: LlamaConfig, num_beams: int, num_return_sequences: int, sampling: Sampling) -> None:
    beams = arguments.whole_number("num_beams", num_beams)
    if beams > config.vocab_size:
        raise InputError(f"num_beams is {beams}; the vocabulary has only {config.vocab_size} tokens")
    if arguments.whole_number("num_return_sequences", num_return_sequences) > beams:
        raise InputError(
            f"num_return_sequences is {num_return_sequences}; it must be at most num_beams, which is {beams}"
        )
    for name, off in (("temperature", (1, 0)), ("top_k", (0,)), ("top_p", (1,)), ("min_p", (0,))):
        given = getattr(sampling, name)
        if isinstance(given, jax.core.Tracer):
            continue
        drawn = np.asarray(given)[~np.isin(given, off)]
        if drawn.size:
            raise InputError(
                f"{name} is {drawn[0]}, but beam search leaves nothing to chance: keep it at {off[0]}, or "
                "use generate"
            )


def _penalties(length_penalty: Any, batch: int) -> jax.Array:
    """The length penalty of each row, f32 [B]."""
    if np.shape(length_penalty) not in ((), (batch,)):
        raise InputError(
            f"length_penalty has shape {np.shape(length_penalty)}; it must be a scalar or one value for "
            f"each of {batch} rows"
        )
    if isinstance(length_penalty, jax.core.Tracer):
        return jnp.broadcast_to(length_penalty.astype(jnp.float32), (batch,))
    values = np.asarray(length_penalty)
    number = jnp.issubdtype(values.dtype, np.floating) or jnp.issubdtype(values.dtype, np.integer)
    if not number or not np.isfinite(values.astype(np.float32)).all():
        raise InputError(f"length_penalty is {length_penalty!r}; it must be a finite number, or one a row")
    return jax.device_put(np.broadcast_to(values.astype(np.float32), (batch,)))


def _when_to_stop(early_stopping: EarlyStopping, num_beams: int) -> int:
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise InputError(f'early_stopping is {early_stopping!r}; it must be True, False or "never"')
    if early_stopping is True or num_beams == 1:  # greedy decoding stops at its first end
        return _AT_ONCE
    return _AT_ANY_LENGTH if early_stopping == "never" else _AT_THIS_LENGTH
