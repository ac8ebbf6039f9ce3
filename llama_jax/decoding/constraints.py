"""Grammars during decoding: which tokens an automaton allows next, and its state after one.

A `Grammar` is a deterministic automaton over tokens, as arrays: `structured_output` builds it, and here it is
an argument like any other. Two lookups a step: a row of a bit mask (the tokens that go on), and one entry of
the transitions. Tokens that every state treats alike share a class, a column of the transitions. Nothing runs
on the host, and grammars of one size compile to one program.

    constraint = for_rows([grammar, None], rows=2)    # row 0 has a grammar, row 1 none
    allowed(constraint, eos_ids, vocab_size)          # bool [B, V]
    constraint = advance(constraint, token, live)     # after a token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import InputError

FREE = -1  # the grammar of a row that has none
DEAD = -1  # the state after a token that the grammar forbids: nothing but the end
WORD_BITS = 32


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """An automaton over the tokens of a vocabulary; it starts in state 0. Made by `llama_jax.grammar`.

    A pytree of its arrays: an argument of a jitted function, compiled once for each size. W is V / 32,
    rounded up; S and C are powers of two, at least 64.

    Attributes:
      classes: int32 [V], the class of each token.
      transitions: int32 [S, C], the state after a token of a class; -1 where the grammar forbids it.
      masks: uint32 [S, W], the tokens that may follow: token b * W + w is bit b of word w.
      accepting: bool [S], whether the text may end here.
      states: how many of the S are in use, for display; None inside a transformed function.
      vocabulary: a digest of the vocabulary it was built for; None likewise.
    """

    classes: jax.typing.ArrayLike
    transitions: jax.typing.ArrayLike
    masks: jax.typing.ArrayLike
    accepting: jax.typing.ArrayLike
    states: int | None = None
    vocabulary: str | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The leaves of the pytree."""
        return self.classes, self.transitions, self.masks, self.accepting

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(np.shape(self.classes)[0])

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(int(np.prod(np.shape(x))) * np.dtype(jnp.result_type(x)).itemsize for x in self.arrays)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """The arrays only: what is for display must not recompile anything."""
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, _: None, arrays: tuple[Any, ...]) -> Grammar:
        """The inverse of `tree_flatten`, without what is for display."""
        return cls(*arrays)

    def __repr__(self) -> str:
        shape = np.shape(self.transitions)
        size = f"{self.states or shape[0]} states, {shape[1]} classes of {self.vocab_size} tokens"
        return f"Grammar({size}, {self.nbytes / 1e6:.1f} MB)"


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Constraint:
    """The grammars of a batch, and where each row is in its own.

    Between two steps a server may exchange the grammars (`stack`) and put rows at the start of one (`begin`):
    arrays of the same sizes run the same program.

    Attributes:
      grammars: R grammars of one size, stacked: its arrays have a leading dimension R.
      index: int32 [B], each row's grammar; -1 for none.
      state: int32 [B], the state in it; -1 after a token that it forbids.
    """

    grammars: Grammar
    index: jax.Array
    state: jax.Array


GrammarLike = Grammar | Sequence[Grammar | None] | Constraint | None


def stack(grammars: Sequence[Grammar], *, at_least: Grammar | None = None) -> Grammar:
    """Stacks grammars for `Constraint`, padded to common sizes: R, S and C are powers of two.

    Args:
      grammars: at least one, all of one vocabulary; numpy arrays stay on the host.
      at_least: stacked grammars whose sizes the result has at least, to run the program compiled for them.

    Raises:
      InputError: for grammars of different vocabularies.
    """
    sizes = {grammar.vocab_size for grammar in grammars}
    if len(sizes) > 1:
        raise InputError(f"the grammars are of vocabularies of {sorted(sizes)} tokens; build them for one")
    floor = (1, 1, 1) if at_least is None else np.shape(at_least.transitions)
    count = max(power_of_two(len(grammars)), floor[0])
    states, classes = (max(floor[1 + i], *(np.shape(g.transitions)[i] for g in grammars)) for i in (0, 1))
    traced = any(isinstance(x, jax.Array) for x in jax.tree.leaves(list(grammars)))
    xp: Any = jnp if traced else np

    def pad(grammar: Grammar) -> Grammar:
        rows = states - np.shape(grammar.transitions)[0]
        columns = classes - np.shape(grammar.transitions)[1]
        return Grammar(
            xp.asarray(grammar.classes),
            xp.pad(xp.asarray(grammar.transitions), ((0, rows), (0, columns)), constant_values=DEAD),
            xp.pad(xp.asarray(grammar.masks), ((0, rows), (0, 0))),
            xp.pad(xp.asarray(grammar.accepting), (0, rows)),
        )

    padded = [pad(grammar) for grammar in grammars]
    padded += padded[:1] * (count - len(padded))
    return jax.tree.map(lambda *parts: xp.stack(parts), *padded)


def for_rows(grammar: Grammar | Sequence[Grammar | None], rows: int) -> Constraint:
    """Every row at the start of its grammar.

    Args:
      grammar: one for all rows, or one for each, None for a row without; rows past the end of the list have
        none.
      rows: B.
    """
    of_rows = [grammar] * rows if isinstance(grammar, Grammar) else list(grammar)
    distinct = list({id(one): one for one in of_rows if one is not None}.values())
    places = {id(one): place for place, one in enumerate(distinct)}
    index = np.full(rows, FREE, np.int32)
    index[: len(of_rows)] = [places.get(id(one), FREE) for one in of_rows]
    # Not with `jnp.asarray`, which compiles a program for each shape.
    put = lambda x: x if isinstance(x, jax.Array) else jax.device_put(x)  # noqa: E731
    state = np.zeros(rows, np.int32)
    return Constraint(grammars=jax.tree.map(put, stack(distinct)), index=put(index), state=put(state))


def begin(constraint: Constraint, row: int | jax.Array, index: int | jax.Array) -> Constraint:
    """Puts a row at the start of grammar `index`; -1 for none."""
    return dataclasses.replace(
        constraint, index=constraint.index.at[row].set(index), state=constraint.state.at[row].set(0)
    )


def over_mesh(constraint: Constraint) -> Constraint:
    """The constraint in the layout of decoding: rows over the batch axes, grammars in every device."""
    replicate = lambda x: sharding.constrain(jnp.asarray(x), P(*(None,) * x.ndim))  # noqa: E731
    return Constraint(
        grammars=jax.tree.map(replicate, constraint.grammars),
        index=sharding.over_batch(jnp.asarray(constraint.index, jnp.int32)),
        state=sharding.over_batch(jnp.asarray(constraint.state, jnp.int32)),
    )


def allowed(constraint: Constraint, eos_ids: jax.Array, vocab_size: int) -> jax.Array:
    """The tokens that may come next.

    An end-of-sequence token may come in accepting states and nowhere else; where the grammar has no other
    token either (its text is complete), that is all. It never counts as text.

    Args:
      constraint: the rows; like the next two functions for [B, beams] as for [B].
      eos_ids: int32 [E], or [B, E] where rows have their own; -1 for none.
      vocab_size: V.

    Returns:
      bool [B, V]; at least one in each row, if there is an end-of-sequence token.
    """
    grammars, has_grammar = constraint.grammars, constraint.index != FREE
    alive = has_grammar & (constraint.state != DEAD)
    words = _take(grammars.masks, constraint.index, constraint.state)
    words = jnp.where(alive[..., None], words, jnp.uint32(0))
    bits = jnp.arange(WORD_BITS, dtype=jnp.uint32)[:, None]
    text = ((words[..., None, :] >> bits) & 1).astype(bool).reshape(*alive.shape, -1)[..., :vocab_size]
    is_end = (jnp.arange(vocab_size)[:, None] == eos_ids[..., None, :]).any(-1)
    text &= ~is_end
    may_end = (alive & _take(grammars.accepting, constraint.index, constraint.state)) | ~text.any(-1)
    return text | (is_end & may_end[..., None]) | ~has_grammar[..., None]


def mask(constraint: Constraint, processed: jax.Array, logits: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """-inf for the tokens that the rows' grammars forbid.

    The grammar wins over logits processors: where these leave none of the tokens that it allows (forced or
    suppressed tokens, a minimal length), they do not count for this token.

    Args:
      constraint: the rows.
      processed: f32 [B, V], after the logits processors.
      logits: f32 [B, V], before.
      eos_ids: int32 [E].
    """
    may_come = allowed(constraint, eos_ids, logits.shape[-1])
    masked = jnp.where(may_come, processed, -jnp.inf)
    blocked = ~(masked > -jnp.inf).any(-1) & (constraint.index != FREE)
    return jnp.where(blocked[..., None], jnp.where(may_come, logits, -jnp.inf), masked)


def advance(constraint: Constraint, token: jax.Array, live: jax.Array | bool = True) -> Constraint:
    """The constraint after token [B] in the rows that are `live` [B]."""
    token_class = _take(constraint.grammars.classes, constraint.index, token)
    after = _take(constraint.grammars.transitions, constraint.index, constraint.state, token_class)
    moves = live & (constraint.index != FREE) & (constraint.state != DEAD)
    return dataclasses.replace(constraint, state=jnp.where(moves, after, constraint.state))


def _take(array: Any, *indices: jax.Array) -> jax.Array:
    """array[i, j, ...] of each row, in the layout of rows; -1 is 0, for rows that have none."""
    shape = (*indices[0].shape, *array.shape[len(indices) :])
    spec = sharding.out_sharding(P(sharding.BATCH, *(None,) * (len(shape) - 1)), shape)
    at = tuple(jnp.maximum(index, 0) for index in indices)
    return jnp.asarray(array).at[at].get(mode="clip", out_sharding=spec)


def power_of_two(count: int, minimum: int = 1) -> int:
    """The smallest power of two that is at least `count` and `minimum`."""
    return max(minimum, 1 << max(count - 1, 0).bit_length())


def prepare(grammar: GrammarLike, vocab_size: int, batch: int, rows: int, eos_id: Any) -> Constraint | None:
    """Checks the argument `grammar` of a generation, and gives every row its own.

    Args:
      grammar: one, or one for each row, or a `Constraint` of all rows.
      vocab_size: the model's.
      batch: the rows that were given.
      rows: the rows with those that were added, which have none.
      eos_id: the end-of-sequence ids.

    Raises:
      InputError: for anything else, a grammar of another vocabulary, or no end-of-sequence id.
    """
    if grammar is None:
        return None
    if isinstance(grammar, Constraint):
        if np.shape(grammar.index) != (batch,) or np.shape(grammar.state) != (batch,):
            raise InputError(f"the constraint has {np.shape(grammar.index)} rows; give one of {batch}")
        found = [np.shape(grammar.grammars.classes)[-1]]
    else:
        single = isinstance(grammar, Grammar)
        if not single and not isinstance(grammar, list | tuple):
            raise InputError(
                f"grammar is a {type(grammar).__name__}; make one with llama_jax.grammar(tokenizer, ...)"
            )
        given = [grammar] if isinstance(grammar, Grammar) else list(grammar)
        if not single and len(given) != batch:
            raise InputError(f"grammar has {len(given)} entries; give one, or one for each of {batch} rows")
        if wrong := [one for one in given if not isinstance(one, Grammar | None)]:
            raise InputError(
                f"grammar holds a {type(wrong[0]).__name__}; make one with llama_jax.grammar(tokenizer, ...)"
            )
        found = [one.vocab_size for one in given if one is not None]
    if not found:
        return None
    for size in found:
        check(size, vocab_size, eos_id)
    if not isinstance(grammar, Constraint):
        return for_rows(grammar, rows)
    # Decoding donates its state: what the caller holds must not be a part of it.
    return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else jnp.copy(x), _fill(grammar, rows))


def check(grammar_size: int, vocab_size: int, eos_id: Any) -> None:
    """Checks a grammar of a vocabulary of some size against a model's, and that its texts can end.

    Raises:
      InputError: if it is another vocabulary, or there is no end-of-sequence id.
    """
    if grammar_size != vocab_size:
        raise InputError(
            f"the grammar is of a vocabulary of {grammar_size} tokens and the model has {vocab_size}; build "
            "it with the model's own tokenizer"
        )
    if not isinstance(eos_id, jax.core.Tracer):
        ids = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
        if not ((ids >= 0) & (ids < vocab_size)).any():
            raise InputError("a grammar needs eos_id: the token that ends a text that is complete")


def _fill(constraint: Constraint, rows: int) -> Constraint:
    added = rows - np.shape(constraint.index)[0]
    if not added:
        return constraint
    return dataclasses.replace(
        constraint,
        index=jax.device_put(np.pad(np.asarray(constraint.index), (0, added), constant_values=FREE)),
        state=jax.device_put(np.pad(np.asarray(constraint.state), (0, added))),
    )
