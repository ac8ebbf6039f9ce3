"""From logits to a token: small pure transforms, and the one order in which they are applied.

The rules that go by the text (`rules`), temperature, top-k, top-p, min-p, draw: Hugging Face's order. Each
transform maps logits f32 [B, V] to logits, with -inf for what may not be drawn, and takes its setting as
an array of one value a row, so no value ever recompiles anything.

Thresholds are found by bisection over the bits of a float, not by sorting: 32 passes over the vocabulary
are exact and cost a fiftieth of a sort on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.decoding import logits_processors
from llama_jax.decoding.logits_processors import apply_if
from llama_jax.errors import InputError

Setting = Any  # a number, or an array of one a row; ids, or an array of a row of them each
_IDS_AT_ONCE = 64  # lists of ids are padded to a multiple of this, so that their number recompiles nothing


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Sampling:
    """How to choose the next token; every field is a scalar, or one value a row [B].

    A pytree: a jitted function of it compiles once for all values.

    Attributes:
      temperature: divides the logits; 0 chooses the likeliest token.
      top_k: how many likeliest tokens to draw from; 0 for all.
      top_p: draw from the smallest set of likeliest tokens with at least this probability together
        (nucleus sampling, arXiv 1904.09751); 1 for all.
      min_p: drop tokens less likely than this share of the likeliest one; 0 for none.
      repetition_penalty: logits of tokens already in the text are divided by it where positive and
        multiplied where negative (CTRL, arXiv 1909.05858); 1 for none.
      presence_penalty: taken once from the logit of each token chosen before, -2 to 2; 0 for none. It and
        the next go by the continuation alone, not by the prompt (OpenAI's rule).
      frequency_penalty: taken from the logit of each token as often as it was chosen before, -2 to 2.
      no_repeat_ngram_size: no sequence of so many tokens comes twice in the text; 0 for any.
      min_new_tokens: no end token before so many tokens.
      suppress_tokens: ids that are never chosen: [I] for all rows, or [B, I], where -1 is none.
      forced_tokens: ids that the continuation begins with: [I] or [B, I], where -1 leaves the choice free.
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
        """Checks every value that is known now; values being traced are taken as they are.

        Args:
          batch: rows.
          vocab_size: V, where it is known, which ids must be below.

        Raises:
          InputError: naming the setting, the row and the value.
        """
        for name, (rule, wanted) in _RANGES.items():
            shape = np.shape(getattr(self, name))
            if shape not in ((), (batch,)):
                raise InputError(
                    f"{name} has shape {shape}; it must be a scalar or one value for each of {batch} rows"
                )
            if isinstance(getattr(self, name), jax.core.Tracer):
                continue
            values = _numbers(name, getattr(self, name))
            bad = np.flatnonzero(~rule(values.astype(np.float32)))  # as they will be used
            if bad.size:
                row = f" in row {bad[0]}" if shape else ""
                raise InputError(f"{name} is {values[bad[0]]}{row}; it must be {wanted}")
        suppressed = _known_ids("suppress_tokens", self.suppress_tokens, batch, vocab_size)
        forced = _known_ids("forced_tokens", self.forced_tokens, batch, vocab_size)
        if suppressed is None or forced is None:
            return
        for at, (never, first) in enumerate(zip(suppressed, forced, strict=True)):
            if both := set(never.tolist()) & set(first.tolist()) - {-1}:
                raise InputError(
                    f"token {min(both)} is both in suppress_tokens and in forced_tokens, in row {at}; take "
                    "it out of one of them"
                )
            if vocab_size is not None and np.unique(never[never >= 0]).size >= vocab_size:
                raise InputError(f"suppress_tokens holds the whole vocabulary, in row {at}; leave a token")

    def rows(self, batch: int) -> Sampling:
        """Every field as an array [B], ids [B, I], of one dtype, however its value was written."""

        def row(value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
            if isinstance(value, jax.Array):
                return jnp.broadcast_to(value.astype(dtype), (batch,))
            # Not by `jnp.asarray`, which compiles a program for each shape.
            return jax.device_put(np.broadcast_to(np.asarray(value, dtype), (batch,)))

        return Sampling(
            temperature=row(self.temperature, jnp.float32),
            top_k=row(self.top_k, jnp.int32),
            top_p=row(self.top_p, jnp.float32),
            min_p=row(self.min_p, jnp.float32),
            repetition_penalty=row(self.repetition_penalty, jnp.float32),
            presence_penalty=row(self.presence_penalty, jnp.float32),
            frequency_penalty=row(self.frequency_penalty, jnp.float32),
            no_repeat_ngram_size=row(self.no_repeat_ngram_size, jnp.int32),
            min_new_tokens=row(self.min_new_tokens, jnp.int32),
            suppress_tokens=_id_rows(self.suppress_tokens, batch),
            forced_tokens=_id_rows(self.forced_tokens, batch),
        )

    def processors(self) -> logits_processors.LogitsProcessors:
        """The part of the settings, as `rows` gives them, that goes by the text."""
        return logits_processors.LogitsProcessors(
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.no_repeat_ngram_size,
            self.min_new_tokens,
            self.suppress_tokens,
            self.forced_tokens,
        )


_Rule = Callable[[np.ndarray], np.ndarray]
_WHOLE: _Rule = lambda x: (x >= 0) & (x == np.floor(x))  # noqa: E731
_PENALTY: tuple[_Rule, str] = (lambda x: np.abs(x) <= 2, "between -2 and 2 (0 turns it off)")
_RANGES: dict[str, tuple[_Rule, str]] = {
    "temperature": (lambda x: (x >= 0) & np.isfinite(x), "a finite number, at least 0"),
    "top_k": (_WHOLE, "a whole number, at least 0 (0 turns it off)"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 turns it off)"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "between 0 and 1 (0 turns it off)"),
    "repetition_penalty": (lambda x: (x > 0) & np.isfinite(x), "a finite number above 0 (1 turns it off)"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "no_repeat_ngram_size": (_WHOLE, "a whole number, at least 0 (0 turns it off)"),
    "min_new_tokens": (_WHOLE, "a whole number, at least 0"),
}
_INTEGERS = ("top_k", "no_repeat_ngram_size", "min_new_tokens")


def _numbers(name: str, value: jax.typing.ArrayLike) -> np.ndarray:
    values = np.atleast_1d(np.asarray(value))
    if values.dtype.kind not in "fiu" and values.dtype != jnp.bfloat16:
        raise InputError(f"{name} is {value!r}; it must be a number, or one a row")
    if name in _INTEGERS and (np.abs(values) >= 2**31).any():
        raise InputError(f"{name} is {values.max()}; it must be below 2^31")
    return values


def _known_ids(name: str, value: Any, batch: int, vocab_size: int | None) -> np.ndarray | None:
    """A list of ids as [B, I], or None while it is being traced.

    Raises:
      InputError: if it is no such list, or names an id outside the vocabulary.
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
    bad = ids[(ids < -1) | (ids >= (2**31 if vocab_size is None else vocab_size))]
    if bad.size:
        raise InputError(
            f"{name} holds {bad[0]}; ids go from 0 to {(vocab_size or 2**31) - 1}, and -1 is none"
        )
    return np.broadcast_to(ids, (batch, ids.shape[-1] if ids.ndim else 1))


def _id_rows(value: Any, batch: int) -> jax.Array:
    """Ids as int32 [B, I], I padded with -1 to a multiple of 64."""
    traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
    lib: Any = jnp if traced else np
    ids = lib.asarray(value, np.int32)
    ids = ids[None] if ids.ndim == 0 else ids
    ids = lib.broadcast_to(ids, (batch, ids.shape[-1]))
    padding = max(_IDS_AT_ONCE - ids.shape[-1], -ids.shape[-1] % _IDS_AT_ONCE)
    return jax.device_put(lib.pad(ids, ((0, 0), (0, padding)), constant_values=-1))


def temperature(logits: jax.Array, value: jax.Array) -> jax.Array:
    """logits / value [B]; rows at 0 are left as they are, for the draw to take their maximum.

    Below 1e-6 a temperature counts as 1e-6: the likeliest token in all but name, and nothing overflows.
    """
    return logits / jnp.where(value > 0, jnp.maximum(value, 1e-6), 1.0)[:, None]


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k [B] largest logits of each row, and what ties with the last of them; 0 keeps all."""

    def apply(logits: jax.Array, k: jax.Array) -> jax.Array:
        threshold = _largest_such_that(logits, lambda cut: (logits >= cut[:, None]).sum(-1) >= k)
        return jnp.where((logits >= threshold[:, None]) | (k <= 0)[:, None], logits, -jnp.inf)

    return apply_if(jnp.any(k > 0), apply, logits, k)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest likeliest tokens that have probability p [B] together, and what ties with the last."""

    def apply(logits: jax.Array, p: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(logits)

        def enough(cut: jax.Array) -> jax.Array:
            return jnp.where(probabilities >= cut[:, None], probabilities, 0.0).sum(-1) >= p

        # However small p is, the likeliest token stays.
        threshold = jnp.minimum(_largest_such_that(probabilities, enough), probabilities.max(-1))
        return jnp.where((probabilities >= threshold[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)

    return apply_if(~jnp.all(p >= 1), apply, logits, p)


def min_p(logits: jax.Array, share: jax.Array) -> jax.Array:
    """Keeps tokens at least `share` [B] times as likely as the likeliest."""

    def apply(logits: jax.Array, share: jax.Array) -> jax.Array:
        floor = logits.max(-1) + jnp.log(jnp.minimum(share, 1.0))
        return jnp.where(logits >= floor[:, None], logits, -jnp.inf)

    return apply_if(jnp.any(share != 0), apply, logits, share)


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token a row from softmax(logits), each row with its own key, by inverting the distribution.

    Walks the cumulative probability to a uniform number, in blocks: one random number a row, where the
    Gumbel trick needs one for every entry of the vocabulary (10 times the time on a CPU).

    Args:
      logits: f32 [B, V]; entries at -inf are never drawn.
      keys: [B] keys.

    Returns:
      int32 [B].
    """
    batch, vocab = logits.shape
    block = 256
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % block))).reshape(batch, -1, block)
    sums = blocks.sum(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))(keys)
    target = uniform * sums.sum(-1)
    which = _walk(sums, target)
    index = jnp.arange(sums.shape[1])
    below = jnp.where(index < which[:, None], sums, 0.0).sum(-1)
    inside = jnp.where((index == which[:, None])[..., None], blocks, 0.0).sum(1)
    token = jnp.minimum(which * block + _walk(inside, target - below), vocab - 1)
    return sharding.constrain(token.astype(jnp.int32), sharding.ROWS_B)


def _walk(weights: jax.Array, target: jax.Array) -> jax.Array:
    """The first index [B] at which the cumulative weight passes target; only ever one of weight above 0."""
    passed = (jnp.cumsum(weights, axis=-1) > target[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights > 0, -1), axis=-1)
    return jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), last)


def _largest_such_that(values: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest float [B] at which `holds`, which is true of small numbers and false of large ones.

    Floats sort like their bits read as signed integers once the negative ones are mirrored, so this
    bisects the integers: exact after 32 halvings. Where it holds of nothing the answer is -inf.
    """
    mirror = jnp.int32(0x7FFFFFFF)

    def to_float(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ mirror, bits), jnp.float32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the mean, without overflow
        yes = holds(to_float(middle))
        return jnp.where(yes, middle, low), jnp.where(yes, high, middle)

    # Derived from values, to differ over a mesh as they do; a slice of one row may lose its layout.
    rows = sharding.constrain(jnp.zeros_like(values[:, 0], jnp.int32), sharding.ROWS_B)
    infinity = jnp.int32(0x7F800000)
    low, _ = jax.lax.fori_loop(0, 32, halve, (rows + (~infinity), rows + infinity))
    return to_float(low)


def transform(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature and filters in order: from ruled logits f32 [B, V] to those of what `choose` draws from.

    Args:
      logits: f32 [B, V], after `rules.apply`.
      sampling: settings of one value a row (`Sampling.rows`).
    """
    logits = temperature(logits, sampling.temperature)
    logits = top_k(logits, sampling.top_k)
    logits = top_p(logits, sampling.top_p)
    return min_p(logits, sampling.min_p)


def argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis, of ties and of NaN too: in two passes, 10 times as fast on a CPU."""
    top = logits.max(-1, keepdims=True)
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where((logits >= top) | jnp.isnan(logits), places, logits.shape[-1]).min(-1)


def is_greedy(sampling: Sampling) -> jax.Array:
    """bool [B]: the rows whose likeliest token is taken."""
    return (sampling.temperature <= 0) | (sampling.top_k == 1)


def choose(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """The next token of each row: the likeliest at temperature 0 or top-k 1, otherwise drawn.

    Args:
      logits: f32 [B, V], after `rules.apply`.
      sampling: settings of one value a row (`Sampling.rows`).
      keys: [B] keys; a row's draw depends on its own key alone.

    Returns:
      int32 [B].
    """
    likeliest = argmax(logits)
    greedy = is_greedy(sampling)

    def random(_: None) -> jax.Array:
        return jnp.where(greedy, likeliest, draw(transform(logits, sampling), keys))

    return jax.lax.cond(jnp.all(greedy), lambda _: likeliest, random, None)
