"""Every format of vocabulary: the tokens that a grammar allows are those whose decoded text it accepts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import GrammarError
from llama_jax.structured_output.vocabulary import vocabulary_of
from llama_jax.tokenizer.fit import fit_vocabulary
from tests.structured_output.sampler import sample_texts
from tests.tokenizer.vocabularies import write_all  # noqa: F401  # what `all_tokenizers` loads

KINDS = ("sentencepiece", "llama2c", "gguf-spm", "gguf-bpe", "json-bpe", "json-llama", "spm-trimmed")
TEXTS = ("the fox", " the", "là", "it's 日本", "\n", "  two")
kinds = pytest.mark.parametrize("kind", KINDS)


def accepted(grammar, length):
    """All sequences of up to `length` tokens that a grammar accepts, by its arrays."""
    table, classes = np.asarray(grammar.transitions), np.asarray(grammar.classes)
    pending, found = [((), 0)], []
    while pending:
        ids, state = pending.pop()
        if grammar.accepting[state]:
            found.append(ids)
        if len(ids) < length:
            after = table[state][classes]
            pending += [((*ids, int(id)), after[id]) for id in np.flatnonzero(after >= 0)]
    return found


def is_text(tokenizer, id):
    special = {*tokenizer.special_tokens.values(), *tokenizer.eos_ids, tokenizer.unk_id, tokenizer.bos_id}
    return id not in special and bool(tokenizer.table.pieces[id])


@kinds
def test_two_tokens_are_accepted_exactly_if_they_decode_to_a_text(all_tokenizers, kind):
    """Spaces at the start, characters of several bytes, and the pieces of bytes included."""
    tokenizer = all_tokenizers[kind]
    texts = {"a", " ", "th", " é", "é", "  "} - ({" ", " é", "é", "  "} if kind == "spm-trimmed" else set())
    candidates = [
        id
        for id in range(tokenizer.vocab_size)
        if is_text(tokenizer, id) and set(tokenizer.table.pieces[id]) <= set("ath é".encode())
    ]
    rows = [(a,) for a in candidates] + list(itertools.product(candidates, candidates))
    # A text has at most three bytes here, and a prefix space: no third token can be but a space.
    expected = {row for row in rows if tokenizer.decode(row) in texts}
    if tokenizer.table.strip_all:  # tokens that change nothing are never allowed
        expected = {row for row in expected if tokenizer.decode(row[:1])}
    found = {ids for ids in accepted(lj.grammar(tokenizer, choices=sorted(texts)), 2) if ids}
    assert found == expected


@kinds
def test_every_choice_is_written_as_it_decodes(all_tokenizers, kind):
    tokenizer = all_tokenizers[kind]
    if kind == "spm-trimmed":  # without byte fallback, and without spaces at the start
        grammars = [lj.grammar(tokenizer, choices=["the fox"])]
        texts = ["the fox"]
    else:
        texts = list(TEXTS)
        grammars = [lj.grammar(tokenizer, choices=[text]) for text in texts]
    for text, rows in zip(texts, sample_texts(tokenizer, grammars), strict=True):
        assert rows
        for ids in rows:
            assert tokenizer.decode(ids) == text
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        grammar, state = grammars[texts.index(text)], 0
        for id in ids:  # the tokenizer's own spelling is one of them
            state = grammar.transitions[state][grammar.classes[id]]
        assert state >= 0
        assert grammar.accepting[state]


def test_a_byte_without_a_token_cannot_be_spelled(all_tokenizers):
    tokenizer = all_tokenizers["spm-trimmed"]
    with pytest.raises(GrammarError, match="cannot spell the choice '日': no token has the byte 0xE6"):
        lj.grammar(tokenizer, choices=["the", "日"])
    with pytest.raises(
        GrammarError, match="can spell no text of regex, such as '日本': no token has the byte 0xE6"
    ):
        lj.grammar(tokenizer, regex="日本")
    # What can be spelled remains.
    assert accepted(lj.grammar(tokenizer, regex="日|the"), 3)


def test_tokens_that_are_no_text_never_come(all_tokenizers):
    tokenizer = fit_vocabulary(all_tokenizers["json-bpe"], 340)
    grammar = lj.grammar(tokenizer, regex="(?s:.)*")
    allowed = np.asarray(grammar.transitions)[0][np.asarray(grammar.classes)] >= 0
    assert grammar.vocab_size == 340
    assert not allowed[[*tokenizer.special_tokens.values(), *range(331, 340)]].any()
    # At the start of a text come all tokens but those that go on with a character.
    pieces = vocabulary_of(tokenizer).pieces
    starts = [bool(piece) and not 0x80 <= piece[0] < 0xC2 and piece[0] < 0xF5 for piece in pieces]
    np.testing.assert_array_equal(allowed, starts)
