"""Decoding: `prefill` a prompt, `step` a token, `generate` on the device, `stream` on the host.

One struct, `DecodeState`, holds all there is between two tokens, and `step` maps it to the next one;
`generate` and `stream` are two loops around that function. A row's tokens depend on that row alone: its
prompt, its settings and its key, never on its batch mates or on padding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.sampling import Sampling, choose

EosId = int | Sequence[int] | jax.Array | None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: int32 [B, max_new_tokens], 0 after a row's end.
      lengths: int32 [B], new tokens of each row, the end token included.
      logprobs: f32 [B, max_new_tokens], the model's log-probability of each token before any
        temperature or filter (that of `forward`'s logits), 0 after a row's end.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class DecodeState:
    """Everything between two tokens.

    Attributes:
      cache: keys and values of all tokens before `token`.
      token: int32 [B], the last token of each row's text, which the cache does not hold yet.
      position: int32 [B], where `token` stands.
      count: int32 [], tokens chosen so far.
      done: bool [B], rows that have met an end token.
      generation: what has been chosen so far.
      seen: bool [B, V], tokens in each row's prompt or continuation.
      keys: [B], one key a row; token t draws with `fold_in(key, t)`.
      sampling: settings of the next choice.
      eos_ids: int32 [E], the end tokens; -1 for none.
    """

    cache: kv.KVCache
    token: jax.Array
    position: jax.Array
    count: jax.Array
    done: jax.Array
    generation: Generation
    seen: jax.Array
    keys: jax.Array
    sampling: Sampling
    eos_ids: jax.Array


def prefill(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_id: EosId = None,
) -> DecodeState:
    """Reads the prompts into a fresh cache and returns the state to `step` from.

    Each row's last token is left for the first step, so that one place chooses every token. Arguments
    are as for `generate`; nothing is bucketed or checked here.
    """
    batch, length = tokens.shape
    lengths = sharding.constrain(jnp.asarray(lengths, jnp.int32), sharding.ROWS_B)
    in_prompt = jnp.arange(length) < lengths[:, None]
    # Padding may be anything, even an id outside the vocabulary, whose NaN would reach everyone.
    tokens = jnp.where(in_prompt, sharding.constrain(jnp.asarray(tokens, jnp.int32), sharding.TOKENS_BT), 0)
    cache = kv.init_cache(config, batch, length + max_new_tokens, compute_dtype(params))
    _, cache = forward_cached(config, params, tokens, jnp.zeros_like(lengths), cache, window=length)

    whole_rows = sharding.out_sharding(sharding.LOGITS_BV)
    ids = sharding.constrain(tokens, P(sharding.BATCH, None))
    is_last = jnp.arange(length) == (lengths - 1)[:, None]
    # Each row's padding is pointed past the vocabulary, where the scatter drops it.
    mark = lambda row, ids: row.at[ids].set(True, mode="drop")  # noqa: E731
    seen = jnp.zeros((batch, config.vocab_size), bool, out_sharding=whole_rows)
    return DecodeState(
        cache=cache,
        token=jnp.where(is_last, ids, 0).sum(-1, dtype=jnp.int32),
        position=lengths - 1,
        count=jnp.zeros((), jnp.int32),
        done=lengths < 1,
        generation=Generation(
            tokens=jnp.zeros((batch, max_new_tokens), jnp.int32, out_sharding=whole_rows),
            lengths=jnp.zeros_like(lengths),
            logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32, out_sharding=whole_rows),
        ),
        seen=jax.vmap(mark)(seen, jnp.where(in_prompt, ids, config.vocab_size)),
        keys=_row_keys(key, batch),
        sampling=Sampling() if sampling is None else sampling,
        eos_ids=_end_ids(eos_id),
    )


def step(config: LlamaConfig, params: Params, state: DecodeState) -> DecodeState:
    """Feeds the last token to the model and chooses the next one.

    Args:
      config: the model.
      params: its parameters, unstacked (`unstack`), or every step copies all of them.
      state: from `prefill` or `step`. The cache must have a free slot: no more than `max_new_tokens`
        tokens may be chosen in all.

    Returns:
      The next state. Rows that are done keep their tokens and length.
    """
    logits, cache = forward_cached(config, params, state.token[:, None], state.position, state.cache)
    logits = sharding.constrain(logits[:, 0], sharding.LOGITS_BV)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    token = choose(logits, state.sampling, state.seen, keys)
    chosen = jnp.arange(logits.shape[-1]) == token[:, None]  # a gather would not follow explicit sharding
    logprob = jnp.where(chosen, logits, 0.0).sum(-1) - jax.nn.logsumexp(logits, axis=-1)

    live = ~state.done
    token = jnp.where(live, token, 0)
    old = state.generation
    column = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.count, axis=1)
    return DecodeState(
        cache=cache,
        token=token,
        position=state.position + 1,
        count=state.count + 1,
        done=state.done | (token[:, None] == state.eos_ids).any(-1),
        generation=Generation(
            tokens=column(old.tokens, token[:, None]),
            lengths=old.lengths + live,
            logprobs=column(old.logprobs, jnp.where(live, logprob, 0.0)[:, None]),
        ),
        seen=state.seen | chosen,
        keys=state.keys,
        sampling=state.sampling,
        eos_ids=state.eos_ids,
    )


def generate(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_id: EosId = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens`, in one compiled loop that stops when all rows end.

    A pure function: call it inside `jit`, `vmap` (over keys, say) or `shard_map` as you would any other.
    For gradients, take those of `forward`'s log-probabilities of the tokens it chose.
    Called from Python it compiles once for each batch size, `max_new_tokens` and bucket of prompt lengths
    (powers of two from 32); no value of any setting recompiles it.

    Args:
      config: the model.
      params: its parameters. Stacked layers are unstacked first, which copies them once a call; pass
        `unstack(params)` to save that.
      tokens: int [B, T], prompts padded on the right with anything.
      lengths: int [B], how many of each row's tokens are its prompt, at least 1.
      key: one key, from which row b draws with `fold_in(key, b)`; or one key a row [B].
      sampling: temperature and filters, see `Sampling`; its defaults (plain random sampling) if None.
      max_new_tokens: at least 1; static.
      eos_id: the id, or ids, that end a row. None: every row runs to `max_new_tokens`.

    Returns:
      A `Generation`.

    Raises:
      InputError: for values known at the call (not traced) that cannot work: an empty prompt, an id
        outside the vocabulary, a setting out of range, more positions than the model's context.
    """
    tokens, lengths, sampling = _checked(config, tokens, lengths, sampling, max_new_tokens)
    return _generate(config, params, tokens, lengths, key, sampling, _end_ids(eos_id), max_new_tokens)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens"))
def _generate(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    max_new_tokens: int,
) -> Generation:
    params = unstack(params)
    state = prefill(
        config, params, tokens, lengths, key, sampling, max_new_tokens=max_new_tokens, eos_id=eos_ids
    )
    # What a step makes of the state may vary over more mesh axes than a fresh one (inside shard_map).
    state = sharding.vary_alike(state, params)
    state = jax.lax.while_loop(
        lambda state: (state.count < max_new_tokens) & ~jnp.all(state.done),
        lambda state: step(config, params, state),
        state,
    )
    return state.generation


_prefill = jax.jit(prefill, static_argnames=("config", "max_new_tokens"))
_step = jax.jit(step, static_argnames=("config",), donate_argnames=("state",))


def stream(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_id: EosId = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`generate`, a token at a time on the host: the same tokens from the same arguments.

    Returns:
      An iterator of (tokens int32 [B], live bool [B]): the newest token of each row, and whether the row
      had not ended before it; the token of a row that had is 0.

    Raises:
      InputError: as `generate` does, at the call.
    """
    tokens, lengths, sampling = _checked(config, tokens, lengths, sampling, max_new_tokens)
    params = jax.jit(unstack)(params) if hasattr(params["layers"], "keys") else params
    start = functools.partial(_prefill, max_new_tokens=max_new_tokens, eos_id=_end_ids(eos_id))
    return _steps(config, params, start(config, params, tokens, lengths, key, sampling), max_new_tokens)


def _steps(
    config: LlamaConfig, params: Params, state: DecodeState, max_new_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    live = np.ones(state.done.shape, bool)
    for _ in range(max_new_tokens):
        state = _step(config, params, state)
        yield np.asarray(state.token), live
        live = ~np.asarray(state.done)
        if not live.any():
            return


def bucket(length: int) -> int:
    """The padded length for a prompt of `length` tokens: the next power of two, at least 32."""
    return max(32, 1 << (length - 1).bit_length())


def _checked(
    config: LlamaConfig, tokens: Any, lengths: Any, sampling: Sampling | None, max_new_tokens: int
) -> tuple[jax.Array, jax.Array, Sampling]:
    """Checks all that is known before tracing, pads tokens to their bucket, and gives every row settings.

    What is known is handled in numpy: an operation of JAX would be compiled anew for each length.
    """
    sampling = Sampling() if sampling is None else sampling
    if jnp.ndim(tokens) != 2:
        raise InputError(f"tokens has shape {jnp.shape(tokens)}; it must be [batch, length]")
    batch, length = jnp.shape(tokens)
    if batch < 1 or length < 1:
        raise InputError(
            f"tokens has shape {(batch, length)}; a prompt needs at least one token (a BOS, say)"
        )
    if jnp.shape(lengths) != (batch,):
        raise InputError(f"lengths has shape {jnp.shape(lengths)}; it must be [{batch}], one a row of tokens")
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise InputError(f"{name} is {jnp.result_type(array)}; it must be whole numbers")
    whole = isinstance(max_new_tokens, int | np.integer) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number, at least 1")
    sampling.check(batch)
    ids, counts = _known(tokens), _known(lengths)
    if counts is not None:
        _check_lengths(config, counts, length, int(max_new_tokens))
        if ids is not None:
            _check_ids(config, ids, counts)
    padding = ((0, 0), (0, bucket(length) - length))
    if ids is None:
        tokens = jnp.pad(jnp.asarray(tokens, jnp.int32), padding)
    else:
        # Clipped, since padding may be any number, which int32 may not hold.
        tokens = jnp.asarray(np.pad(np.clip(ids, -1, 2**31 - 1).astype(np.int32), padding))
    counts = lengths if counts is None else counts.astype(np.int32)
    return tokens, jnp.asarray(counts, jnp.int32), sampling.rows(batch)


def _known(array: Any) -> np.ndarray | None:
    """The numbers, or None while tracing, or where other processes hold part of them."""
    traced = isinstance(array, jax.core.Tracer)
    if traced or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def _check_lengths(config: LlamaConfig, lengths: np.ndarray, width: int, max_new_tokens: int) -> None:
    for row in np.flatnonzero((lengths < 1) | (lengths > width)):
        empty = "an empty prompt: give at least one token, a BOS for instance"
        why = empty if lengths[row] < 1 else f"longer than tokens, which holds {width} a row"
        raise InputError(f"lengths is {lengths[row]} in row {row}: {why}")
    longest, context = int(lengths.max()), config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise InputError(
            f"the prompt's {longest} tokens and max_new_tokens {max_new_tokens} need "
            f"{longest + max_new_tokens} positions; the model's context has {context}: shorten one of them"
        )


def _check_ids(config: LlamaConfig, ids: np.ndarray, lengths: np.ndarray) -> None:
    in_prompt = np.arange(ids.shape[1]) < lengths[:, None]
    bad = np.argwhere(in_prompt & ((ids < 0) | (ids >= config.vocab_size)))
    if bad.size:
        row, at = bad[0]
        raise InputError(
            f"token id {ids[row, at]} in row {row}, position {at} is outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )


def _end_ids(eos_id: EosId) -> jax.Array:
    """End tokens as an array of 8, or 16, ..., so that their number does not recompile anything.

    Raises:
      InputError: for what is neither a whole number nor a sequence of them.
    """
    if isinstance(eos_id, jax.core.Tracer):
        ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
        return jnp.pad(ids, (0, -ids.size % 8), constant_values=-1)
    known = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
    if known.ndim != 1 or (known.size and known.dtype.kind not in "iu"):
        raise InputError(f"eos_id is {eos_id!r}; it must be a token id, a sequence of them, or None")
    padded = np.full(max(8, -(-known.size // 8) * 8), -1, np.int32)
    padded[: known.size] = known
    return jnp.asarray(padded)


def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    """One typed key a row, from one key or from B of them; raw uint32 keys are taken too."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim not in (1, 2):
            raise InputError(f"key is {key.dtype} of shape {key.shape}; make one with jax.random.key(seed)")
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise InputError(f"key has shape {key.shape}; give one key, or one for each of {batch} rows")
    return key
