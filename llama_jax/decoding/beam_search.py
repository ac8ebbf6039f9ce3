"""Beam search on the device, with the results of Hugging Face transformers.

The beams of a prompt share one row of the cache: the prompt's keys and values are stored once, those of each
step's tokens in the slots after them, and a mask selects the slots of each beam. Instead of reordering the
cache at every token, as is usual, this reorders the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, constraints, logits_processors
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.beam_hypotheses import (
    BEAMS_BNX,
    BeamSearchOutput,
    expand,
    extend,
    gather_beams,
    length_normalized,
    select_top,
)
from llama_jax.decoding.constraints import Constraint, GrammarLike
from llama_jax.decoding.keywords import explain_unknown_keywords
from llama_jax.decoding.processes import truncate
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import prefill_cache
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd
from llama_jax.taps import Edit, with_edit

EarlyStopping = bool | Literal["never"]

_STOP_BY_CURRENT_SCORE, _STOP_WHEN_FULL, _STOP_BY_BEST_SCORE = range(3)  # False, True and "never"


class _Arguments(NamedTuple):
    """The arguments that stay constant during a search, as arrays [] or [B]."""

    lengths: jax.Array
    max_prompt_length: jax.Array
    limit: jax.Array
    eos_ids: jax.Array
    length_penalty: jax.Array
    early_stopping: jax.Array
    sampling: Sampling
    constraint: Constraint | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _State:
    """Everything between two tokens.

    In `running` and `finished`, tokens and log-probabilities are [B, beams, C] and start with the prompt's.

    Attributes:
      cache: S slots: the prompts', then one per beam for each step.
      allowed: bool [B, beams, S], the slots that each running beam attends to, without its last token's.
      count: int32 [], tokens generated so far.
      done: bool [B], rows whose finished hypotheses are final.
      running: hypotheses that may continue, best first; their scores are plain sums, -inf for none.
      finished: hypotheses that have ended, best first.
      constraint: where each running beam is in its row's grammar, [B, beams].
    """

    cache: kv.KVCache
    allowed: jax.Array
    count: jax.Array
    done: jax.Array
    running: BeamSearchOutput
    finished: BeamSearchOutput
    constraint: Constraint | None


@explain_unknown_keywords
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
    edit: Edit | None = None,
    grammar: GrammarLike = None,
) -> BeamSearchOutput:
    """Continues each prompt by beam search.

    A sequence's score is sum(log p) / length ** length_penalty over its new tokens. Every argument has the
    meaning it has in `generate` of Hugging Face transformers, and sequences and scores are the same, except
    that a row does not depend on the rest of the batch.

    A pure function: call it inside `jit`, `vmap` or `shard_map`. Called from Python it compiles one program
    per batch size, `num_beams`, and size of sequence and cache (powers of two, at least 128); no other
    argument's value recompiles it.

    Args:
      config: the model.
      params: its parameters. Stacked layers are unstacked first, which copies them on every call; pass
        `unstack(params)` to avoid that.
      tokens: int [B, T], right-padded prompts; padding may hold any value.
      lengths: int [B], the prompts' lengths, at least 1.
      num_beams: the number of beams, from 1 (greedy decoding) to V. Static.
      max_new_tokens: at least 1; a sequence of this length has ended. Static while tracing.
      eos_id: the end-of-sequence id or ids.
      length_penalty: a scalar, or one per row [B]. Values above 0 favor long sequences, below 0 short ones.
      early_stopping: when a row with `num_beams` finished sequences is done. True: at once. False: when the
        best running beam, at its current length, does not score better than the worst of them. "never":
        when it would not at any length. Static.
      num_return_sequences: R, at most `num_beams`. Static.
      sampling: its logits processors (`repetition_penalty`, `forced_tokens`, ...) are applied to
        log-probabilities; temperature, top_k, top_p and min_p must be off.
      cache_dtype: dtype of the key/value cache, as for `generate`. Static.
      edit: as for `generate`.
      grammar: as for `generate`; a sequence that `max_new_tokens` ends is the beginning of a text.

    Returns:
      A `BeamSearchOutput`.

    Raises:
      InputError: as `generate`; for more beams than tokens; for a `sampling` that is random.
    """
    params = with_edit(params, edit)
    request = arguments.prepare_request(
        config,
        tokens,
        lengths,
        sampling,
        eos_id,
        max_new_tokens,
        params,
        length_penalty,
        grammar=grammar,
        function="beam_search",
        options=(num_beams, length_penalty, early_stopping, num_return_sequences, str(cache_dtype)),
    )
    _check(config, num_beams, num_return_sequences, Sampling() if sampling is None else sampling)
    (filled, columns), max_prompt_length = request.tokens.shape, request.max_prompt_length
    if max_prompt_length is None:
        max_prompt_length, prompts = columns, jnp.pad(request.tokens, ((0, 0), (0, max_new_tokens)))
        slots = columns + num_beams * max_new_tokens
    else:
        prompts = request.tokens
        slots = arguments.cache_capacity(max_prompt_length + num_beams * max_new_tokens)
    constants = _Arguments(
        lengths=request.lengths,
        max_prompt_length=jax.device_put(np.int32(max_prompt_length)),
        limit=jax.device_put(np.int32(max_new_tokens)),
        eos_ids=request.eos_ids,
        length_penalty=_length_penalty_rows(length_penalty, request.rows, filled),
        early_stopping=jax.device_put(np.int32(_stopping_rule(early_stopping, num_beams))),
        sampling=request.sampling,
        constraint=request.constraint,
    )
    dtype = kv.dtype_name(cache_dtype)
    output = _beam_search(config, params, prompts, constants, num_beams, slots, dtype)

    size = request.rows, num_return_sequences, max_new_tokens
    if request.max_prompt_length is None:
        return jax.tree.map(lambda x: x[tuple(map(slice, size[: x.ndim]))], output)
    return truncate(output, *size)


@functools.partial(jax.jit, static_argnames=("config", "beams", "slots", "cache_dtype"))
def _beam_search(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    constants: _Arguments,
    beams: int,
    slots: int,
    cache_dtype: str | None,
) -> BeamSearchOutput:
    """All `beams` continuations of prompts int32 [B, C], moved to column 0, with a cache of `slots` slots."""
    params = jax.lax.stop_gradient(unstack(params))
    over_batch = sharding.over_batch
    constants = constants._replace(
        lengths=over_batch(constants.lengths),
        length_penalty=over_batch(constants.length_penalty),
        sampling=jax.tree.map(over_batch, constants.sampling),
        constraint=constants.constraint and constraints.over_mesh(constants.constraint),
    )
    # Padding may hold an id outside the vocabulary, whose embedding is NaN and would spread to every row.
    columns = jnp.arange(tokens.shape[1])
    tokens = jnp.where(columns < constants.lengths[:, None], over_batch(tokens), 0)
    dtype = cache_dtype or compute_dtype(params)
    # Several beams share a row, whose slots are no positions, and the window of each is a part of its mask.
    cache = kv.init_cache(config, len(tokens), slots, dtype, run_length=None)
    # Each prompt's last token is left for the first step, which handles every beam alike.
    cache = prefill_cache(config, params, cache, tokens, 0, constants.max_prompt_length - 1)
    state = spmd.pvary_like(_init_state(cache, tokens, constants, beams), params, constants)
    state = jax.lax.while_loop(
        lambda state: (state.count < constants.limit) & ~jnp.all(state.done),
        lambda state: _step(config, params, state, constants),
        state,
    )
    output, new_columns = state.finished, constants.lengths[:, None] + columns
    take_new = jax.vmap(lambda row, columns: row.at[:, columns].get(mode="fill", fill_value=0))
    return dataclasses.replace(
        output, tokens=take_new(output.tokens, new_columns), logprobs=take_new(output.logprobs, new_columns)
    )


def _init_state(cache: kv.KVCache, tokens: jax.Array, constants: _Arguments, beams: int) -> _State:
    """The state in which each prompt [B, C] is a row's only hypothesis."""
    repeat = lambda x: sharding.constrain(jnp.repeat(x[:, None], beams, axis=1), BEAMS_BNX)  # noqa: E731
    sequences = repeat(tokens)
    empty = BeamSearchOutput(
        tokens=jnp.zeros_like(sequences),
        lengths=jnp.zeros_like(sequences[..., 0]),
        scores=jnp.full_like(sequences[..., 0], -jnp.inf, jnp.float32),
        logprobs=jnp.zeros_like(sequences, jnp.float32),
    )
    # All beams hold the same tokens: only the first counts.
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, empty.scores)
    if (constraint := constants.constraint) is not None:
        index, at = (repeat(x[:, None])[..., 0] for x in (constraint.index, constraint.state))
        constraint = dataclasses.replace(constraint, index=index, state=at)
    return _State(
        cache=cache,
        allowed=repeat(jnp.arange(cache.length) < constants.lengths[:, None] - 1),
        count=jnp.zeros((), jnp.int32),
        done=constants.lengths < 1,
        running=dataclasses.replace(empty, tokens=sequences, scores=scores),
        finished=empty,
        constraint=constraint,
    )


def _step(config: LlamaConfig, params: Params, state: _State, constants: _Arguments) -> _State:
    """Runs each running beam's last token and keeps the best hypotheses that are one token longer."""
    beams = state.allowed.shape[1]
    logits, allowed, cache = _forward(config, params, state, constants)
    logprobs = jax.nn.log_softmax(logits)
    totals = state.running.scores[..., None] + _processed(logits, logprobs, state, constants)
    continuing, ending = expand(totals, constants.eos_ids)
    selected = select_top(beams, continuing)
    column = constants.lengths + state.count
    running = extend(state.running, selected, column, logprobs)

    # A hypothesis may end only if it is among the best of all, continuing ones included.
    best, count = select_top(beams, continuing, ending), state.count + 1
    ends = (best.ends | (count == constants.limit)) & ~state.done[:, None] & (best.scores > -jnp.inf)
    if (constraint := state.constraint) is not None:
        at = gather_beams(constraint.state, selected.parent)
        constraint = constraints.advance(dataclasses.replace(constraint, state=at), selected.token)
    score = functools.partial(length_normalized, length_penalty=constants.length_penalty)
    best = best._replace(scores=jnp.where(ends, score(best.scores, count), -jnp.inf))
    finished = select_top(beams, state.finished, extend(state.running, best, column, logprobs))

    at_limit = (constants.early_stopping == _STOP_BY_BEST_SCORE) & (constants.length_penalty > 0)
    bound = score(running.scores[:, :1], jnp.where(at_limit, constants.limit, count)[:, None])
    full = (finished.scores > -jnp.inf).all(-1) & (constants.early_stopping == _STOP_WHEN_FULL)
    return _State(
        cache=cache,
        allowed=gather_beams(allowed, selected.parent),
        count=count,
        done=state.done | full | (bound <= finished.scores).all(-1),
        running=running,
        finished=finished,
        constraint=constraint,
    )


def _forward(
    config: LlamaConfig, params: Params, state: _State, constants: _Arguments
) -> tuple[jax.Array, jax.Array, kv.KVCache]:
    """Logits f32 [B, beams, V] of each running beam; `allowed` and the cache with its last token."""
    (_, beams, slots), columns = state.allowed.shape, state.running.tokens.shape[-1]
    last = constants.lengths - 1 + state.count
    token = jnp.where(jnp.arange(columns) == last[:, None, None], state.running.tokens, 0).sum(-1)
    start = constants.max_prompt_length + state.count * beams
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
    return sharding.constrain(logits, BEAMS_BNX), allowed, cache


def _processed(logits: jax.Array, logprobs: jax.Array, state: _State, constants: _Arguments) -> jax.Array:
    """Log-probabilities f32 [B, beams, V] after the logits processors.

    As in Hugging Face, the processors change log-probabilities, but with a single beam, which is greedy
    decoding, logits.
    """
    several = logits.shape[1] > 1

    def apply(values: jax.Array, tokens: jax.Array) -> jax.Array:
        lengths = constants.lengths
        history = logits_processors.TokenHistory(tokens, lengths + state.count, lengths)
        processors = constants.sampling.processors()
        return logits_processors.apply(values, processors, history, constants.eos_ids)

    values = logprobs if several else logits
    processed = jax.vmap(apply, 1, 1)(values, state.running.tokens)
    if state.constraint is not None:
        processed = constraints.mask(state.constraint, processed, values, constants.eos_ids)
    return processed if several else processed - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _check(config: LlamaConfig, num_beams: int, num_return_sequences: int, sampling: Sampling) -> None:
    beams = arguments.check_int("num_beams", num_beams)
    if beams > config.vocab_size:
        raise InputError(f"num_beams is {beams}; the vocabulary has only {config.vocab_size} tokens")
    if arguments.check_int("num_return_sequences", num_return_sequences) > beams:
        raise InputError(
            f"num_return_sequences is {num_return_sequences}; it must be at most num_beams, which is {beams}"
        )
    for name, off in (("temperature", (1, 0)), ("top_k", (0,)), ("top_p", (1,)), ("min_p", (0,))):
        value = getattr(sampling, name)
        if isinstance(value, jax.core.Tracer):
            continue
        on = np.asarray(value)[~np.isin(value, off)]
        if on.size:
            raise InputError(
                f"{name} is {on[0]}, but beam search does not sample: leave it at {off[0]}, or use generate"
            )


def _length_penalty_rows(length_penalty: Any, batch: int, filled: int) -> jax.Array:
    """The length penalty of each row, f32 [B], and 0 for rows that were added."""
    if np.shape(length_penalty) not in ((), (batch,)):
        raise InputError(
            f"length_penalty has shape {np.shape(length_penalty)}; it must be a scalar or one value for "
            f"each of {batch} rows"
        )
    if isinstance(length_penalty, jax.core.Tracer):
        return jnp.broadcast_to(length_penalty.astype(jnp.float32), (batch,))
    values = np.asarray(length_penalty)
    is_number = jnp.issubdtype(values.dtype, np.floating) or jnp.issubdtype(values.dtype, np.integer)
    if not is_number or not np.isfinite(values.astype(np.float32)).all():
        raise InputError(f"length_penalty is {length_penalty!r}; it must be a finite number, or one per row")
    rows = np.broadcast_to(values.astype(np.float32), (batch,))
    return jax.device_put(np.pad(rows, (0, filled - batch)))


def _stopping_rule(early_stopping: EarlyStopping, num_beams: int) -> int:
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise InputError(f'early_stopping is {early_stopping!r}; it must be True, False or "never"')
    if early_stopping is True or num_beams == 1:  # greedy decoding stops at its first end
        return _STOP_WHEN_FULL
    return _STOP_BY_BEST_SCORE if early_stopping == "never" else _STOP_BY_CURRENT_SCORE
