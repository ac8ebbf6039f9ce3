"""From logits to a token: small pure transforms, and the one order in which they are applied.

Repetition penalty, temperature, top-k, top-p, min-p, draw: Hugging Face's order. Each transform maps
logits f32 [B, V] to logits, with -inf for what may not be drawn, and takes its setting as an array of one
value a row, so no value ever recompiles anything.

Thresholds are found by bisection over the bits of a float, not by sorting: 32 passes over the vocabulary
are exact and cost a fiftieth of a sort on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.errors import InputError


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
    """

    temperature: jax.typing.ArrayLike = 1.0
    top_k: jax.typing.ArrayLike = 0
    top_p: jax.typing.ArrayLike = 1.0
    min_p: jax.typing.ArrayLike = 0.0
    repetition_penalty: jax.typing.ArrayLike = 1.0

    def check(self, batch: int) -> None:
        """Checks every value that is known now; values being traced are taken as they are.

        Raises:
          InputError: naming the setting, the row and the value.
        """
        rules: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
            "temperature": (lambda x: (x >= 0) & np.isfinite(x), "a finite number, at least 0"),
            "top_k": (lambda x: (x >= 0) & (x == np.floor(x)), "a whole number, at least 0 (0 turns it off)"),
            "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1 turns it off)"),
            "min_p": (lambda x: (x >= 0) & (x <= 1), "between 0 and 1 (0 turns it off)"),
            "repetition_penalty": (
                lambda x: (x > 0) & np.isfinite(x),
                "a finite number above 0 (1 turns it off)",
            ),
        }
        for name, (rule, wanted) in rules.items():
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

    def rows(self, batch: int) -> Sampling:
        """Every field as an array [B] of one dtype, so that no way of writing a value recompiles anything."""

        def row(value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
            if isinstance(value, jax.Array):
                return jnp.broadcast_to(value.astype(dtype), (batch,))
            return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (batch,)))

        return Sampling(
            temperature=row(self.temperature, jnp.float32),
            top_k=row(self.top_k, jnp.int32),
            top_p=row(self.top_p, jnp.float32),
            min_p=row(self.min_p, jnp.float32),
            repetition_penalty=row(self.repetition_penalty, jnp.float32),
        )


def _numbers(name: str, value: jax.typing.ArrayLike) -> np.ndarray:
    values = np.atleast_1d(np.asarray(value))
    if values.dtype.kind not in "fiu" and values.dtype != jnp.bfloat16:
        raise InputError(f"{name} is {value!r}; it must be a number, or one a row")
    if name == "top_k" and (np.abs(values) >= 2**31).any():
        raise InputError(f"{name} is {values.max()}; it must be below 2^31")
    return values


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes tokens of `seen`, bool [B, V], less likely by `penalty` [B] (above 1) or likelier (below)."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: jax.Array, value: jax.Array) -> jax.Array:
    """logits / value [B]; rows at 0 are left as they are, for the draw to take their maximum.

    Below 1e-6 a temperature counts as 1e-6: the likeliest token in all but name, and nothing overflows.
    """
    return logits / jnp.where(value > 0, jnp.maximum(value, 1e-6), 1.0)[:, None]


def top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k [B] largest logits of each row, and what ties with the last of them; 0 keeps all."""
    threshold = _largest_such_that(logits, lambda cut: (logits >= cut[:, None]).sum(-1) >= k)
    return jnp.where((logits >= threshold[:, None]) | (k <= 0)[:, None], logits, -jnp.inf)


def top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest likeliest tokens that have probability p [B] together, and what ties with the last."""
    probabilities = jax.nn.softmax(logits)

    def enough(cut: jax.Array) -> jax.Array:
        return jnp.where(probabilities >= cut[:, None], probabilities, 0.0).sum(-1) >= p

    # However small p is, the likeliest token stays.
    threshold = jnp.minimum(_largest_such_that(probabilities, enough), probabilities.max(-1))
    return jnp.where((probabilities >= threshold[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)


def min_p(logits: jax.Array, share: jax.Array) -> jax.Array:
    """Keeps tokens at least `share` [B] times as likely as the likeliest."""
    floor = logits.max(-1) + jnp.log(jnp.minimum(share, 1.0))
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


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


class _Rows(NamedTuple):
    """`Sampling` with every field an array [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def transform(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """Every transform in order: the logits of the distribution that `choose` draws from, f32 [B, V]."""
    return _transform(logits, _per_row(sampling, logits.shape[0]), seen)


def _transform(logits: jax.Array, rows: _Rows, seen: jax.Array) -> jax.Array:
    logits = repetition_penalty(logits, seen, rows.repetition_penalty)
    logits = temperature(logits, rows.temperature)
    logits = top_k(logits, rows.top_k)
    logits = top_p(logits, rows.top_p)
    return min_p(logits, rows.min_p)


def choose(logits: jax.Array, sampling: Sampling, seen: jax.Array, keys: jax.Array) -> jax.Array:
    """The next token of each row: the likeliest at temperature 0 or top-k 1, otherwise drawn.

    Args:
      logits: f32 [B, V], the model's.
      sampling: settings, scalar or one a row.
      seen: bool [B, V], the tokens already in each row's text.
      keys: [B] keys; a row's draw depends on its own key alone.

    Returns:
      int32 [B].
    """
    rows = _per_row(sampling, logits.shape[0])
    penalised = repetition_penalty(logits, seen, rows.repetition_penalty)
    likeliest = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    greedy = (rows.temperature <= 0) | (rows.top_k == 1)

    def random(_: None) -> jax.Array:
        return jnp.where(greedy, likeliest, draw(_transform(logits, rows, seen), keys))

    return jax.lax.cond(jnp.all(greedy), lambda _: likeliest, random, None)


def _per_row(sampling: Sampling, batch: int) -> _Rows:
    rows = sampling.rows(batch)
    lay = lambda x: sharding.constrain(jnp.asarray(x), sharding.ROWS_B)  # noqa: E731
    return _Rows(
        lay(rows.temperature), lay(rows.top_k), lay(rows.top_p), lay(rows.min_p), lay(rows.repetition_penalty)
    )
