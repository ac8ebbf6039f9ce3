"""Properties of tokenizers of every file format."""

from __future__ import annotations

import codecs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer

_CHARACTERS = st.characters(exclude_categories=["Cs"])
_SPELLINGS = [
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think here>",
    "  ",
    "\0",
    "\u2581",
    "é",
    "日本",
    "🦙",
]
TEXTS = st.lists(st.text(_CHARACTERS, max_size=12) | st.sampled_from(_SPELLINGS), max_size=6).map("".join)
EXACT = ("sentencepiece", "llama2c", "gguf-spm", "json-llama")
BYTE_LEVEL = ("gguf-bpe", "json-bpe")
LAW = settings(deadline=None, max_examples=60)


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40)


@LAW
@given(st.data(), st.booleans())
def test_stream_equals_decode(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(ids_of(tokenizer))
    stream = tokenizer.stream(skip_special_tokens=skip)
    for _ in range(2):  # `flush` resets the decoder
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


@LAW
@given(st.data())
def test_streamed_text_is_a_prefix_of_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    ids = tokenizer.encode(text)
    stream, streamed = tokenizer.stream(), ""
    decoded = tokenizer.decode(ids)
    for token in ids:
        streamed += stream.push(token)
        assert decoded.startswith(streamed)
    assert stream.flush() == decoded[len(streamed) :]


@LAW
@given(TEXTS)
def test_byte_level_round_trip_is_exact(by_kind: dict[str, Tokenizer], text: str) -> None:
    for kind in BYTE_LEVEL:
        assert by_kind[kind].decode(by_kind[kind].encode(text)) == text, kind


@LAW
@given(TEXTS)
def test_sentencepiece_round_trip_is_exact_except_for_its_space_character(
    by_kind: dict[str, Tokenizer], text: str
) -> None:
    for kind in EXACT:
        assert by_kind[kind].decode(by_kind[kind].encode(text)) == text.replace("\u2581", " "), kind


@LAW
@given(TEXTS)
def test_text_never_encodes_to_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.special_tokens
    assert not set(tokenizer.encode(text, add_bos=False)) & set(tokenizer.special_tokens.values())


@LAW
@given(TEXTS)
def test_formats_of_one_vocabulary_give_the_same_ids(by_kind: dict[str, Tokenizer], text: str) -> None:
    text = text.replace("\u2581", "_")  # U+2581: bytes in llama2.c, a space in SentencePiece
    first, *others = (by_kind[kind].encode(text) for kind in EXACT)
    assert all(ids == first for ids in others)
    first, second = (by_kind[kind].encode(text) for kind in BYTE_LEVEL)
    assert first == second


@LAW
@given(TEXTS)
def test_special_tokens_are_parsed_on_request(tokenizer: Tokenizer, text: str) -> None:
    name, token = next(iter(tokenizer.special_tokens.items()))
    assert tokenizer.encode(name, add_bos=False, parse_special=True) == [token]
    assert tokenizer.encode(name, add_bos=False) != [token]
    ids = tokenizer.encode(f"{text}{name}", add_bos=False, parse_special=True)
    assert ids[-1] == token


def test_skip_special_tokens(tokenizer: Tokenizer) -> None:
    name, token = next(iter(tokenizer.special_tokens.items()))
    ids = [token, *tokenizer.encode("the fox", add_bos=False), token]
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == f"{name}thefox{name}"


def test_bos_and_eos_are_never_doubled(tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is not None:
        assert tokenizer.encode("fox", add_bos=True)[0] == tokenizer.bos_id
        bos = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.bos_id)
        ids = tokenizer.encode(f"{bos}fox", add_bos=True, parse_special=True)
        assert ids.count(tokenizer.bos_id) == 1
        assert tokenizer.bos_id not in tokenizer.encode("fox", add_bos=False)
        assert tokenizer.encode("", add_bos=True) == [tokenizer.bos_id]
    eos = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.eos_id)
    assert tokenizer.encode("fox", add_eos=True)[-1] == tokenizer.eos_id
    assert tokenizer.encode(f"fox{eos}", add_eos=True, parse_special=True).count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in tokenizer.encode("fox")


def test_add_bos_defaults_to_the_vocabulary(by_kind: dict[str, Tokenizer]) -> None:
    for kind in (*EXACT, "spm-trimmed"):
        assert by_kind[kind].add_bos
        assert by_kind[kind].encode("fox")[0] == by_kind[kind].bos_id == 1
    for kind in BYTE_LEVEL:
        assert not by_kind[kind].add_bos
        assert by_kind[kind].encode("fox") == by_kind[kind].encode("fox", add_bos=False)


def test_multi_byte_character_is_streamed_with_its_last_id(by_kind: dict[str, Tokenizer]) -> None:
    for kind in (*EXACT, *BYTE_LEVEL):
        tokenizer = by_kind[kind]
        ids = tokenizer.encode("🦙", add_bos=False)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert pieces[-1] == "🦙", kind
        assert "".join(pieces[:-1]) == "", kind
        assert len(ids) >= 4, kind


def test_bytes_that_are_not_utf8_become_replacement_characters(by_kind: dict[str, Tokenizer]) -> None:
    for kind in (*EXACT, *BYTE_LEVEL):
        tokenizer = by_kind[kind]
        *first, _ = tokenizer.encode("🦙", add_bos=False)
        x = tokenizer.encode("x", add_bos=False)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, first)).strip() == ""
        assert set(stream.flush()) == {"\ufffd"}
        broken = tokenizer.decode([*first, *x])
        assert broken.strip(" \ufffd") == "x"
        assert broken.count("\ufffd") == (3 if kind in EXACT else 1)  # as in the reference libraries


def test_pieces_for_display(tokenizer: Tokenizer) -> None:
    displayed = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert all(displayed)
    assert " the" in displayed
    assert "\u2581the" not in displayed
    for name, token in tokenizer.special_tokens.items():
        assert displayed[token] == name


def test_bytes_that_are_not_utf8_display_as_hex(by_kind: dict[str, Tokenizer]) -> None:
    for kind in (*EXACT, *BYTE_LEVEL):
        first = by_kind[kind].encode("🦙", add_bos=False)[-1]
        assert by_kind[kind].piece(first) == "<0x99>"


def test_decode_accepts_arrays_and_iterators(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode(np.array(ids, np.int32)) == "the fox"
    assert tokenizer.decode(iter(ids)) == "the fox"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("bad", [-1, 10**6, 2**70])
def test_id_out_of_range(tokenizer: Tokenizer, bad: int) -> None:
    for call in (
        lambda: tokenizer.decode([0, bad]),
        lambda: tokenizer.stream().push(bad),
        lambda: tokenizer.piece(bad),
    ):
        with pytest.raises(TokenizerError) as raised:
            call()
        message = str(raised.value)
        assert f"token id {bad} is outside" in message
        assert f"its {tokenizer.vocab_size} ids run from 0 to {tokenizer.vocab_size - 1}" in message
        assert "\n" not in message


@pytest.mark.parametrize("bad", [[1.5], [[1, 2]], ["a"], [None], 7, np.zeros((2, 2), int)])
def test_ids_are_not_a_flat_sequence_of_integers(tokenizer: Tokenizer, bad: object) -> None:
    with pytest.raises(TokenizerError, match="must be a flat sequence of integers") as raised:
        tokenizer.decode(bad)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate, '\\ud83e', at character 3") as raised:
        tokenizer.encode("fox\ud83e")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [None, b"fox", 3, ["fox"]])
def test_text_is_not_a_str(tokenizer: Tokenizer, bad: object) -> None:
    with pytest.raises(
        TokenizerError, match=f"text to encode is of type {type(bad).__name__}; it must be a str"
    ):
        tokenizer.encode(bad)  # type: ignore[arg-type]


def test_add_bos_without_a_bos_token(by_kind: dict[str, Tokenizer]) -> None:
    with pytest.raises(TokenizerError, match=r"defines no BOS token; encode without add_bos"):
        by_kind["gguf-bpe"].encode("fox", add_bos=True)


def test_eos_ids(by_kind: dict[str, Tokenizer]) -> None:
    for kind in BYTE_LEVEL:
        assert by_kind[kind].eos_id == by_kind[kind].special_tokens["<|im_end|>"]
        assert set(by_kind[kind].eos_ids) == set(by_kind[kind].special_tokens.values())
        assert by_kind[kind].eos_ids[0] == by_kind[kind].eos_id
    for kind in EXACT:
        assert by_kind[kind].eos_ids == (by_kind[kind].eos_id,) == (2,)


def test_error_handler_replaces_each_byte() -> None:
    assert b"a\xf0\x9f\xa6b".decode("utf-8", "llama_jax.replace_each") == "a\ufffd\ufffd\ufffdb"
    with pytest.raises(UnicodeEncodeError):
        codecs.encode("\ud800", "utf-8", "llama_jax.replace_each")
