"""Texts sampled under grammars by the mask functions alone, from random logits, in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.decoding import constraints
from llama_jax.decoding.sampling import argmax, categorical
from llama_jax.tokenizer import Tokenizer

GRAMMARS, ROWS_EACH, STEPS = 8, 3, 48
# Every batch has these sizes, so that the loop compiles once for each vocabulary.
STATES, CLASSES = 1024, 128


def sample_texts(
    tokenizer: Tokenizer, grammars: Sequence[lj.Grammar], seed: int = 0
) -> list[list[list[int]]]:
    """Ids of texts that have ended, a list for each grammar: one of its rows is greedy, the others random."""
    like = jax.tree.map(
        lambda x: np.zeros((GRAMMARS, *x.shape), x.dtype),
        lj.Grammar(np.zeros(1), np.zeros((STATES, CLASSES)), np.zeros((STATES, 1)), np.zeros(STATES)),
    )
    index = np.repeat(np.arange(len(grammars)), ROWS_EACH)
    constraint = lj.Constraint(
        grammars=constraints.stack(list(grammars), at_least=like),
        index=np.pad(index, (0, GRAMMARS * ROWS_EACH - len(index)), constant_values=constraints.FREE),
        state=np.zeros(GRAMMARS * ROWS_EACH, np.int32),
    )
    assert np.shape(constraint.grammars.transitions) == (GRAMMARS, STATES, CLASSES)
    tokens, state = _sample(constraint, _bias(tokenizer), jax.random.key(seed), tokenizer.eos_id)
    tokens, state = np.asarray(tokens), np.asarray(state)
    texts: list[list[list[int]]] = [[] for _ in grammars]
    for row, grammar in enumerate(index):
        ids = tokens[row].tolist()
        if tokenizer.eos_id in ids:
            texts[grammar].append(ids[: ids.index(tokenizer.eos_id)])
        else:
            assert state[row] != constraints.DEAD
    return texts


@functools.cache
def _bias(tokenizer: Tokenizer) -> np.ndarray:
    """Logits that let texts end: for the end itself, and what closes strings, lists and objects."""
    bias = np.zeros(tokenizer.vocab_size, np.float32)
    for id in range(tokenizer.vocab_size):
        bias[id] = 2.5 * (tokenizer.piece(id) in ('"', "}", "]", ","))
    bias[tokenizer.eos_id] = 5
    return bias


@jax.jit
def _sample(constraint, bias, key, eos_id):
    rows = constraint.index.shape[0]
    greedy = jnp.arange(rows) % ROWS_EACH == 0
    eos_ids = jnp.atleast_1d(eos_id)
    table = 2 * jax.random.normal(key, (256, bias.size)) + bias

    def step(carry, key):
        constraint, done = carry
        draw, choose = jax.random.split(key)
        logits = table[jax.random.randint(draw, (rows,), 0, len(table))]
        masked = constraints.mask(constraint, logits, logits, eos_ids)
        token = jnp.where(greedy, argmax(masked), categorical(masked, jax.random.split(choose, rows)))
        return (constraints.advance(constraint, token, ~done), done | (token == eos_id)), (token, done)

    state = constraint, jnp.zeros(rows, bool)
    (constraint, done), (tokens, ended) = jax.lax.scan(step, state, jax.random.split(key, STEPS))
    return jnp.where(ended, eos_id, tokens).T, jnp.where(done, 0, constraint.state)
