"""From logits to a token: temperature, top-k, top-p, min-p and the random draw, in Hugging Face's order.

Each transform maps logits f32 [B, V] to logits, -inf for tokens that must not be sampled, and takes its
setting as an array of one value per row, so no value recompiles anything. A filter that is off in every row
is skipped at run time, as is the random draw where every row is greedy.

Thresholds are found by bisection over the bits of a float instead of a sort: 32 passes over the vocabulary
are exact and take a fiftieth of a sort's time on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.decoding.logits_processors import LogitsProcessors, apply_if
from llama_jax.errors import InputError

Setting = Any  # a scalar or an array [B]; for token ids, a sequence [I] or an array [B, I]
_ID_MULTIPLE = 64  # ids are padded to a multiple of this, so that their count recompiles nothing


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Sampling:
    """How the next token is sampled; every field is a scalar, or one value per row [B].

    A pytree: a jitted function of it compiles once for all values.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding (argmax).
      top_k: sample from the k most likely tokens; 0 for all.
      top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least this
        (nucleus sampling, arXiv 1904.09751); 1 for all.
      min_p: drop tokens less likely than this fraction of the most likely one; 0 for none.
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur in prompt or
        continuation (CTRL, arXiv 1909.05858); 1 for none.
      presence_penalty: subtracted once from the logit of each token generated before, -2 to 2; 0 for none.
        It and the next count the continuation alone, not the prompt (OpenAI's rule).
      frequency_penalty: subtracted from the logit of each token once per earlier occurrence, -2 to 2.
      no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and continuation; 0 for no limit.
      min_new_tokens: no end-of-sequence token before this many tokens.
      suppress_tokens: ids that are never generated: [I] for all rows, or [B, I], padded with -1.
      forced_tokens: ids that the continuation begins with: [I] or [B, I]; -1 leaves a position free.
    """

    temperature: Setting = 1.0
    top_k: Setting = 0
    top_p: Setting = 1.0
    min_p: Setting = 0.0
    repetition_penalty: Setting = 1.0
    presence_penalty: Setting = 0.0
    frequency_penalty: Setting = 0.0
    no_repeat_ngram_size: Setting = 0
    min_new_tokens: Setting = 0
    suppress_tokens: Setting = ()
    forced_tokens: Setting = ()

    def check(self, batch: int, vocab_size: int | None = None) -> None:
        """Checks every concrete value; tracers are skipped.

        Args:
          batch: B.
          vocab_size: V, where it is known, to check token ids against.

        Raises:
          InputError: naming the setting, the row and the value.
        """
        for name, (is_valid, requirement) in _RANGES.items():
            shape = np.shape(getattr(self, name))
            if shape not in ((), (batch,)):
                raise InputError(
                    f"{name} has shape {shape}; it must be a scalar or one value for each of {batch} rows"
                )
            if isinstance(getattr(self, name), jax.core.Tracer):
                continue
            values = _to_array(name, getattr(self, name))
            with np.errstate(over="ignore"):  # infinity is not valid either
                in_use = values.astype(np.float32)  # the dtype they are used in
            invalid = np.flatnonzero(~is_valid(in_use))
            if invalid.size:
                where = f" in row {invalid[0]}" if shape else ""
                raise InputError(f"{name} is {values[invalid[0]]}{where}; it must be {requirement}")
        suppressed = _concrete_ids("suppress_tokens", self.suppress_tokens, batch, vocab_size)
        forced = _concrete_ids("forced_tokens", self.forced_tokens, batch, vocab_size)
        if suppressed is None or forced is None:
            return
        for row, (suppressed_ids, forced_ids) in enumerate(zip(suppressed, forced, strict=True)):
            if both := set(suppressed_ids.tolist()) & set(forced_ids.tolist()) - {-1}:
                raise InputError(
                    f"token {min(both)} is both in suppress_tokens and in forced_tokens, in row {row}; take "
                    "it out of one of them"
                )
            if vocab_size is not None and np.unique(suppressed_ids[suppressed_ids >= 0]).size >= vocab_size:
                raise InputError(f"suppress_tokens holds the whole vocabulary, in row {row}; leave a token")

    def broadcast(self, batch: int) -> Sampling:
        """Every field as an array [B] (ids [B, I]) of a fixed dtype: its Python type recompiles nothing."""

        def to_rows(value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
            if isinstance(value, jax.Array):
                return jnp.broadcast_to(value.astype(dtype), (batch,))
            # Not with `jnp.asarray`, which compiles a program for each shape.
            return jax.device_put(np.broadcast_to(np.asarray(value, dtype), (batch,)))

        return Sampling(
            temperature=to_rows(self.temperature, jnp.float32),
            top_k=to_rows(self.top_k, jnp.int32),
            top_p=to_rows(self.top_p, jnp.float32),
            min_p=to_rows(self.min_p, jnp.float32),
            repetition_penalty=to_rows(self.repetition_penalty, jnp.float32),
            presence_penalty=to_rows(self.presence_penalty, jnp.float32),
            frequency_penalty=to_rows(self.frequency_penalty, jnp.float32),
            no_repeat_ngram_size=to_rows(self.no_repeat_ngram_size, jnp.int32),
            min_new_tokens=to_rows(self.min_new_tokens, jnp.int32),
            suppress_tokens=_pad_ids(self.suppress_tokens, batch),
            forced_tokens=_pad_ids(self.forced_tokens, batch),
        )

    def processors(self) -> LogitsProcessors:
        """The settings that depend on the token history; call it on the result of `broadcast`."""
        return LogitsProcessors(
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.no_repeat_ngram_size,
            self.min_new_tokens,
            self.suppress_tokens,
            self.forced_tokens,
        )


_IsValid = Callable[[np.ndarray], np.ndarray]
_is_natural: _IsValid = lambda x: (x >= 0) & (x == np.floor(x))  # noqa: E731
_PENALTY: tuple[_IsValid, str] = (lambda x: np.abs(x) <= 2, "between -2 and 2 (0 turns it off)")
_RANGES: dict[str, tuple[_IsValid, str]] = {
    "temperature": (lambda x: (x >= 0) & np.isfinite(x), "a finite number, at least 0"),
    "top_k": (_is_natural, "a whole number, at least 0 (0 turns it off)"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 turns it off)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "between 0 and 1 (0 turns it off)"),
    "repetition_penalty": (lambda x: (x > 0) & np.isfinite(x), "a finite number above 0 (1 turns it off)"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "no_repeat_ngram_size": (_is_natural, "a whole number, at least 0 (0 turns it off)"),
    "min_new_tokens": (_is_natural, "a whole number, at least 0"),
}
_INTEGERS = ("top_k", "no_repeat_ngram_size", "min_new_tokens")


def _to_array(name: str, value: jax.typing.ArrayLike) -> np.ndarray:
    values = np.atleast_1d(np.asarray(value))
    if values.dtype.kind not in "fiu" and values.dtype != jnp.bfloat16:
        raise InputError(f"{name} is {value!r}; it must be a number, or one per row")
    if name in _INTEGERS and (np.abs(values) >= 2**31).any():
        raise InputError(f"{name} is {values.max()}; it must be below 2^31")
    return values


def _concrete_ids(name: str, value: Any, batch: int, vocab_size: int | None) -> np.ndarray | None:
    """Token ids as numpy [B, I]; None while tracing.

    Raises:
      InputError: if they are not ids of that shape, or outside the vocabulary.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
        return None
    try:
        ids = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} holds rows of different lengths; fill the shorter ones with -1") from None
    if ids.size == 0:
        return np.zeros((batch, 0), np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim > 2 or (ids.ndim == 2 and len(ids) != batch):
        raise InputError(
            f"{name} is {ids.dtype} of shape {ids.shape}; it must be token ids, or a row of them for each of "
            f"{batch} rows"
        )
    invalid = ids[(ids < -1) | (ids >= (2**31 if vocab_size is None else vocab_size))]
    if invalid.size:
        raise InputError(
            f"{name} holds {invalid[0]}; ids go from 0 to {(vocab_size or 2**31) - 1}, and -1 is none"
        )
    return np.broadcast_to(ids, (batch, ids.shape[-1] if ids.ndim else 1))


def _pad_ids(value: Any, batch: int) -> jax.Array:
    """Token ids as int32 [B, I], I padded with -1 to a multiple of 64."""
    on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    xp: Any = jnp if on_device else np
    ids = xp.asarray(value, np.int32)
    ids = ids[None] if ids.ndim == 0 else ids
    ids = xp.broadcast_to(ids, (batch, ids.shape[-1]))
    padding = max(_ID_MULTIPLE - ids.shape[-1], -ids.shape[-1] % _ID_MULTIPLE)
    return jax.device_put(xp.pad(ids, ((0, 0), (0, padding)), constant_values=-1))


def temperature(logits: jax.Array, value: jax.Array) -> jax.Array:
    """logits / value [B]; rows at 0 are unchanged, since `sample` takes their argmax.

    A temperature below 1e-6 counts as 1e-6, which is greedy in effect and does not overflow.
    """
    return logits / jnp.where(value > 0, jnp.maximum(value, 1e-6), 1.0)[:, None]


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k [B] largest logits of each row and ties with the last of them; 0 keeps all."""

    def keep_top(logits: jax.Array, k: jax.Array) -> jax.Array:
        threshold = _bisect(logits, lambda cut: (logits >= cut[:, None]).sum(-1) >= k)
        return jnp.where((logits >= threshold[:, None]) | (k <= 0)[:, None], logits, -jnp.inf)

    return apply_if(jnp.any(k > 0), keep_top, logits, k)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest most likely tokens of total probability p [B], and ties with the last; 1 keeps all."""

    def keep_nucleus(logits: jax.Array, p: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(logits)

        def reaches_p(cut: jax.Array) -> jax.Array:
            return jnp.where(probabilities >= cut[:, None], probabilities, 0.0).sum(-1) >= p

        # The most likely token stays, however small p is.
        threshold = jnp.minimum(_bisect(probabilities, reaches_p), probabilities.max(-1))
        return jnp.where((probabilities >= threshold[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)

    return apply_if(~jnp.all(p >= 1), keep_nucleus, logits, p)


def min_p(logits: jax.Array, fraction: jax.Array) -> jax.Array:
    """Keeps tokens at least `fraction` [B] times as likely as the most likely one; 0 keeps all."""

    def keep_likely(logits: jax.Array, fraction: jax.Array) -> jax.Array:
        threshold = logits.max(-1) + jnp.log(jnp.minimum(fraction, 1.0))
        return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)

    return apply_if(jnp.any(fraction != 0), keep_likely, logits, fraction)


def categorical(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples a token per row from softmax(logits), each row with its own key, by inverse transform sampling.

    The cumulative distribution is searched block by block. This takes one random number per row, where the
    Gumbel trick of `jax.random.categorical` takes V (10 times the time on a CPU).

    Args:
      logits: f32 [B, V]; entries at -inf are never sampled.
      keys: [B] keys.

    Returns:
      int32 [B].
    """
    batch, vocab_size = logits.shape
    block = 256
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab_size % block))).reshape(batch, -1, block)
    sums = blocks.sum(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
    target = uniform * sums.sum(-1)
    block_index = _search_cumulative(sums, target)
    indices = jnp.arange(sums.shape[1])
    sum_before = jnp.where(indices < block_index[:, None], sums, 0.0).sum(-1)
    in_block = jnp.where((indices == block_index[:, None])[..., None], blocks, 0.0).sum(1)
    offset = _search_cumulative(in_block, target - sum_before)
    token = jnp.minimum(block_index * block + offset, vocab_size - 1)
    return sharding.constrain(token.astype(jnp.int32), sharding.ROWS_B)


def gumbel_argmax(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples a token per row from softmax(logits), each row with its own key: argmax of logits plus noise.

    The distribution is that of `categorical`, at the cost of V random numbers per row. In return two programs
    whose logits differ by rounding sample the same token more often from the same key: only the margin of the
    largest sum decides, not the shifts of all probabilities before a token (arXiv 2408.07978).

    Args:
      logits: f32 [B, V]; entries at -inf are never sampled.
      keys: [B] keys.

    Returns:
      int32 [B].
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return argmax(logits + sharding.constrain(noise, sharding.LOGITS_BV))


def _search_cumulative(weights: jax.Array, target: jax.Array) -> jax.Array:
    """The first index [B] at which the cumulative sum exceeds `target` [B]; its weight is always above 0."""
    found = (jnp.cumsum(weights, axis=-1) > target[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, -1), axis=-1)
    return jnp.where(found.any(-1), jnp.argmax(found, axis=-1), last)


def _bisect(values: jax.Array, predicate: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest float [B] for which `predicate` holds; it must be true up to a threshold and false above.

    With the negative ones mirrored, floats are ordered like their bits as signed integers. Bisecting those
    is exact after 32 steps. Where the predicate holds nowhere, the result is -inf.
    """
    mirror = jnp.int32(0x7FFFFFFF)

    def to_float(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ mirror, bits), jnp.float32)

    def step(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the mean, without overflow
        holds = predicate(to_float(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    # Derived from `values` to have their varying mesh axes; a slice of one row may lose its sharding.
    zeros = sharding.constrain(jnp.zeros_like(values[:, 0], jnp.int32), sharding.ROWS_B)
    infinity = jnp.int32(0x7F800000)
    low, _ = jax.lax.fori_loop(0, 32, step, (zeros + (~infinity), zeros + infinity))
    return to_float(low)


def transform(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature, top-k, top-p and min-p: the logits that `sample` draws from.

    Args:
      logits: f32 [B, V], after `logits_processors.apply`.
      sampling: settings, one value per row (`Sampling.broadcast`).
    """
    logits = temperature(logits, sampling.temperature)
    logits = top_k(logits, sampling.top_k)
    logits = top_p(logits, sampling.top_p)
    return min_p(logits, sampling.min_p)


def argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis, for ties and NaN too, in two passes: 10 times as fast on a CPU."""
    maximum = logits.max(-1, keepdims=True)
    indices = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where((logits >= maximum) | jnp.isnan(logits), indices, logits.shape[-1]).min(-1)


def is_greedy(sampling: Sampling) -> jax.Array:
    """bool [B]: the rows whose next token is the argmax."""
    return (sampling.temperature <= 0) | (sampling.top_k == 1)


def sample(
    logits: jax.Array, sampling: Sampling, keys: jax.Array, draw: Callable[..., jax.Array] = categorical
) -> jax.Array:
    """The next token of each row: the argmax at temperature 0 or top-k 1, otherwise a random sample.

    Args:
      logits: f32 [B, V], after `logits_processors.apply`.
      sampling: settings, one value per row (`Sampling.broadcast`).
      keys: [B] keys; a row's sample depends on its own key alone.
      draw: how it is drawn: `categorical` or `gumbel_argmax`.

    Returns:
      int32 [B].
    """
    most_likely = argmax(logits)
    greedy = is_greedy(sampling)

    def sample_random(_: None) -> jax.Array:
        return jnp.where(greedy, most_likely, draw(transform(logits, sampling), keys))

    return jax.lax.cond(jnp.all(greedy), lambda _: most_likely, sample_random, None)


sample_gumbel = functools.partial(sample, draw=gumbel_argmax)
