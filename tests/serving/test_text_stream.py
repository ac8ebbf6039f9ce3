"""What a reader of a stream gets: whole characters, no stop string, and each token's log-probability once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.serving.requests import Token
from llama_jax.serving.text_stream import TextStream
from llama_jax.text.stop_strings import StopStrings
from llama_jax.tokenizer import load_tokenizer
from tests import tiny

BYTE = 3  # the id of byte 0
LETTER = BYTE + 256 + 1  # of "a"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_model(tmp_path_factory.mktemp("model")))


def stream(tokenizer, ids, stops=(), every=1):
    """The pieces of a text that is read after every few tokens, and whether it was stopped."""
    text, pieces, stopped = TextStream(tokenizer, stops, [2]), [], False
    for number, token in enumerate(ids):
        stopped = text.follow(Token(token, -1.0))
        if number % every == 0:
            pieces.append(text.take())
        if stopped or token == 2:
            break
    return [*pieces, text.take(ended=True)], stopped


IDS = st.lists(
    st.one_of(st.integers(LETTER, LETTER + 2), st.sampled_from([BYTE + b for b in "é€".encode()])),
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(ids=IDS, stops=st.lists(st.text("abc", min_size=1, max_size=3), max_size=2), every=st.integers(1, 5))
def test_the_pieces_are_the_text_before_its_first_stop_string(tokenizer, ids, stops, every):
    pieces, stopped = stream(tokenizer, ids, stops, every)
    whole = StopStrings(stops)
    expected, found = whole.push(tokenizer.decode(ids))
    expected += whole.flush()
    text = "".join(piece.text for piece in pieces)
    assert (text, stopped) == (expected, found)
    # No piece ends within a character.
    assert "\ufffd" not in "".join(piece.text for piece in pieces[:-1]) or "\ufffd" in tokenizer.decode(ids)
    tokens = [entry for piece in pieces for entry in piece.tokens]
    assert [token.id for token, _ in tokens] == ids[: len(tokens)]
    assert all(place < max(len(text), 1) or not stopped for _, place in tokens)
    if not stopped:
        assert len(tokens) == len(ids)
        for token, place in tokens if "\ufffd" not in text else ():
            if token.id >= LETTER:
                assert text[place] == tokenizer.decode([token.id])


def test_a_token_is_released_with_the_text_in_which_it_begins(tokenizer):
    a, b, c = LETTER, LETTER + 1, LETTER + 2
    text = TextStream(tokenizer, ["bc"], [2])
    seen = []
    for token in (a, b, a, b, c):
        stopped = text.follow(Token(token, -float(token)))
        piece = text.take()
        seen.append((piece.text, [(t.id, place) for t, place in piece.tokens], stopped))
    assert seen == [
        ("a", [(a, 0)], False),
        ("", [], False),  # it may begin "bc"
        ("ba", [(b, 1), (a, 2)], False),
        ("", [], False),
        ("", [], True),
    ]
    assert text.take(ended=True) == type(piece)("")


def test_an_end_token_is_no_part_of_the_text(tokenizer):
    pieces, _ = stream(tokenizer, [LETTER, 2])
    assert "".join(piece.text for piece in pieces) == "a"
    assert [token.id for piece in pieces for token, _ in piece.tokens] == [LETTER]
