"""From an automaton over bytes to one over tokens, and to the arrays of a `Grammar`.

Every token is run from every state that a token can end in: the trie of the vocabulary is walked once for a
block of states, level by level. Then states from which no text can be completed are removed (a vocabulary
need not spell every text), and tokens with equal columns share a class.
"""

from __future__ import annotations

import numpy as np

from llama_jax.decoding.constraints import DEAD, WORD_BITS, Grammar, power_of_two
from llama_jax.errors import GrammarError
from llama_jax.structured_output.compiler import ByteAutomaton
from llama_jax.structured_output.vocabulary import Level, Vocabulary

MAX_BYTES = 1 << 28  # of a grammar's arrays
_MIN_SIZE = 64  # states and classes are padded to a power of two of at least this
_BLOCK = 1 << 23  # entries of a block of states x tokens


def build(automaton: ByteAutomaton, vocabulary: Vocabulary, name: str) -> Grammar:
    """The grammar of the texts that an automaton accepts.

    Args:
      automaton: over bytes.
      vocabulary: its tokens.
      name: what it is, for messages.

    Raises:
      GrammarError: if it accepts nothing, the vocabulary cannot spell any text, or it is too large.
    """
    table, accepting = _without_dead_ends(automaton)
    if not len(table):
        raise GrammarError(f"{name} accepts no text")
    states, classes, transitions = _token_transitions(table, vocabulary, name)
    # The start is a state of its own, which the automaton's first one may also be later in a text.
    ends = np.append(accepting, accepting[0])[states]
    useful = _reaches(transitions, ends)
    if not useful[0]:
        raise GrammarError(_unspellable(table, accepting, vocabulary, name))
    renumber = np.append(np.where(useful, np.cumsum(useful) - 1, DEAD), DEAD)
    transitions = renumber[transitions[useful]]
    transitions, classes = _merge_columns(transitions, classes)
    return _pad(transitions.astype(np.int32), classes, ends[useful], vocabulary, name)


def _without_dead_ends(automaton: ByteAutomaton) -> tuple[np.ndarray, np.ndarray]:
    """The automaton without states from which it accepts nothing; its last row is that of no state."""
    table = automaton.transitions
    useful = _reaches(table, automaton.accepting)
    if not useful[0]:
        return table[:0], automaton.accepting[:0]
    count = int(useful.sum())
    renumber = np.append(np.where(useful, np.cumsum(useful) - 1, count), count)  # -1 is the last entry
    rows = np.vstack([renumber[table[useful]], np.full((1, table.shape[1]), count)])
    return _minimal(rows.astype(np.int32), automaton.accepting[useful])


def _minimal(table: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The automaton with states merged that accept the same texts (Moore's partition refinement)."""
    group, count = np.append(accepting.astype(np.int64), 2), 0
    columns, _ = _distinct_columns(table)
    while True:
        digests = _digests(np.vstack([group, group[columns].T]))
        _, example, group = np.unique(digests, return_index=True, return_inverse=True)
        if len(example) == count:
            break
        count = len(example)
    if not (group[columns] == group[columns[example]][group]).all():  # two rows with one digest
        return table, accepting
    # The first state stays the first, and none the last.
    order = np.argsort(np.where(np.arange(count) == group[0], -1, example))
    number = np.empty(count, np.int64)
    number[order] = np.arange(count)
    kept = example[order]
    return number[group][table[kept]].astype(np.int32), accepting[kept[:-1]]


def _reaches(transitions: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """bool [S]: the states from which a goal can be reached; transitions [S, n] hold -1 for none."""
    source, target = np.nonzero(_adjacent(transitions)) if len(transitions) <= 4096 else _edges(transitions)
    order = np.argsort(target, kind="stable")
    source, starts = source[order], np.searchsorted(target[order], np.arange(len(transitions) + 1))
    found, pending = goal.copy(), list(np.flatnonzero(goal))
    while pending:
        state = pending.pop()
        for before in source[starts[state] : starts[state + 1]]:
            if not found[before]:
                found[before] = True
                pending.append(before)
    return found


def _adjacent(transitions: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(transitions), len(transitions) + 1), bool)
    matrix[np.arange(len(transitions))[:, None], transitions] = True
    return matrix[:, :-1]


def _edges(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(state, np.unique(row)) for state, row in enumerate(transitions)]
    target = np.concatenate([row for _, row in pairs])
    source = np.repeat(np.arange(len(transitions)), [len(row) for _, row in pairs])
    return source[target >= 0], target[target >= 0]


def _token_transitions(
    table: np.ndarray, vocabulary: Vocabulary, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs every token from every state that one can end in.

    Returns:
      The states [S] of `table` (the start is one more, its number), the classes [V] of the tokens, and the
      transitions [S, C] in the order of these states, -1 for none.
    """
    none = start = len(table) - 1  # the start takes the number of no state, and comes first
    table, byte_class = _distinct_columns(table)
    levels, ends = _merge_bytes(vocabulary.levels, byte_class, vocabulary.size)
    first_levels, first_ends = levels, ends
    if vocabulary.first_levels is not None:
        first_levels, first_ends = _merge_bytes(vocabulary.first_levels, byte_class, vocabulary.size)
    # Tokens that end in the same nodes of both tries are alike.
    _, example, kind = np.unique(
        ends * (first_ends.max() + 1) + first_ends, return_index=True, return_inverse=True
    )
    ends, first_ends = ends[example], first_ends[example]

    place = np.full(len(table), DEAD, np.int64)
    states, blocks, classes = [start], [], np.zeros(len(example), np.int64)
    block = _walk(table, np.array([0]), first_levels)[:, first_ends]
    if vocabulary.drops_space:  # a token that was nothing but the space
        block[:, (first_ends == 0) & (ends != 0)] = 0
    done = 1
    while True:
        reached = np.zeros(len(table), bool)
        reached[block] = True
        reached[none] = False
        new = np.flatnonzero(reached & (place < 0))
        place[new] = len(states) + np.arange(len(new))
        states += new.tolist()
        columns, inverse = _distinct_columns(block)
        blocks.append((columns, inverse))
        _, classes = np.unique(classes * (columns.shape[1] + 1) + inverse, return_inverse=True)
        count = int(classes.max()) + 1
        if len(states) * (4 * count + vocabulary.size // 8) > MAX_BYTES:
            raise GrammarError(_too_large(name, len(states), count, vocabulary))
        if done == len(states):
            break
        part = np.array(states[done : done + max(1, _BLOCK // len(example))])
        block = _walk(table, part, levels)[:, ends]
        done += len(part)
    one = np.zeros(count, np.int64)
    one[classes] = np.arange(len(example))
    rows = np.vstack([columns[:, inverse[one]] for columns, inverse in blocks])
    return np.array(states), classes[kind], np.where(rows == none, DEAD, place[rows])


def _merge_bytes(
    levels: list[Level], byte_class: np.ndarray, vocab_size: int
) -> tuple[list[Level], np.ndarray]:
    """The trie of byte classes: prefixes that the automaton cannot tell apart are one node.

    Returns:
      Its levels, whose `tokens` number the nodes that tokens end in, from 1; and that number for each token,
      int [V], 0 for those that are no text.
    """
    merged, numbers, above, count = [], np.zeros(vocab_size, np.int64), np.zeros(1, np.int64), 1
    for level in levels:
        keys, place = np.unique(above[level.parent] * 256 + byte_class[level.byte], return_inverse=True)
        nodes, which = np.unique(place[level.ends], return_inverse=True)
        numbers[level.tokens] = count + which
        merged.append(Level(keys >> 8, keys & 255, count + np.arange(len(nodes)), nodes))
        above, count = place, count + len(nodes)
    return merged, numbers


def _walk(table: np.ndarray, states: np.ndarray, levels: list[Level]) -> np.ndarray:
    """The state after each numbered node, from each of `states`, int32 [n, nodes]; node 0 leads nowhere."""
    none = len(table) - 1
    count = 1 + sum(len(level.tokens) for level in levels)
    out = np.full((len(states), count), none, np.int32)
    current, place = states[:, None], np.zeros(1, np.int64)
    for level in levels:
        # Nodes whose prefix is possible from no state are left out, with all below them.
        kept = np.flatnonzero(place[level.parent] >= 0)
        current = table[current[:, place[level.parent[kept]]], level.byte[kept]]
        alive = (current != none).any(0)
        kept, current = kept[alive], current[:, alive]
        if not len(kept):
            break
        place = np.full(len(level.parent), -1)
        place[kept] = np.arange(len(kept))
        ends = place[level.ends]
        out[:, level.tokens[ends >= 0]] = current[:, ends[ends >= 0]]
    return out


def _distinct_columns(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns of a block [n, V], and which of them each column is [V]."""
    digests = _digests(block)
    _, example, inverse = np.unique(digests, return_index=True, return_inverse=True)
    columns = block[:, example]
    if not (columns[:, inverse] == block).all():  # two columns with one digest
        columns, inverse = np.unique(block, axis=1, return_inverse=True)
    return columns, inverse.reshape(-1)


def _digests(block: np.ndarray) -> np.ndarray:
    """A digest of each column of a block of integers [n, V], uint64 [V]."""
    weights = np.random.default_rng(0).integers(1, 1 << 63, len(block), np.uint64) | np.uint64(1)
    digests = np.zeros(block.shape[1], np.uint64)
    for row, weight in zip(block, weights, strict=True):
        digests += row.astype(np.uint64) * weight
    return digests


def _merge_columns(transitions: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merges classes whose columns have become equal."""
    columns, inverse = _distinct_columns(transitions)
    return columns, inverse[classes]


def _pad(
    transitions: np.ndarray, classes: np.ndarray, accepting: np.ndarray, vocabulary: Vocabulary, name: str
) -> Grammar:
    (states, count), words = transitions.shape, -(-vocabulary.size // WORD_BITS)
    padded, columns = power_of_two(states, _MIN_SIZE), power_of_two(count, _MIN_SIZE)
    if padded * (columns + words) * 4 > MAX_BYTES:
        raise GrammarError(_too_large(name, states, count, vocabulary))
    table = np.full((padded, columns), DEAD, np.int32)
    table[:states, :count] = transitions
    masks = np.zeros((padded, words), np.uint32)
    rows, which = _distinct_columns((transitions >= 0).T)
    for number, row in enumerate(rows.T):
        bits = np.zeros((WORD_BITS, words), bool)
        bits.reshape(-1)[: vocabulary.size] = row[classes]
        mask = np.packbits(bits, axis=0, bitorder="little").T.copy().view("<u4")[:, 0]
        masks[:states][which == number] = mask
    ends = np.zeros(padded, bool)
    ends[:states] = accepting
    return Grammar(classes.astype(np.int32), table, masks, ends, states, vocabulary.digest)


def _too_large(name: str, states: int, classes: int, vocabulary: Vocabulary) -> str:
    return (
        f"{name} is too large: its automaton has {states} or more states and {classes} classes of the "
        f"{vocabulary.size} tokens, over the limit of {MAX_BYTES >> 20} MB; bound lengths and repetitions "
        "more tightly, or split it"
    )


def _unspellable(table: np.ndarray, accepting: np.ndarray, vocabulary: Vocabulary, name: str) -> str:
    """That no text can be spelled, with the shortest one and a byte of it that no token has."""
    text = _shortest(table, accepting)
    held = set(b"".join(vocabulary.pieces))
    missing = next((byte for byte in text if byte not in held), None)
    reason = (
        f"no token has the byte 0x{missing:02X}" if missing is not None else "its tokens do not join to it"
    )
    shown = text.decode(errors="replace")[:40]
    return (
        f"the vocabulary of {vocabulary.size} tokens can spell no text of {name}, such as {shown!r}: {reason}"
    )


def _shortest(table: np.ndarray, accepting: np.ndarray) -> bytes:
    """A shortest text that an automaton accepts."""
    none, before = len(table) - 1, {0: (-1, 0)}
    pending = [0]
    for state in pending:
        if accepting[state]:
            break
        for byte in np.flatnonzero(table[state] != none):
            if (after := int(table[state, byte])) not in before:
                before[after] = state, int(byte)
                pending.append(after)
    text = []
    while (step := before[state])[0] >= 0:
        state = step[0]
        text.append(step[1])
    return bytes(reversed(text))
