"""llama2.c's vocabularies: its algorithm as reference, its trained file of 512 pieces, malformed files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import vocabularies

LAW = settings(deadline=None, max_examples=100)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=40)


def read(path: Path) -> list[tuple[bytes, float]]:
    data = path.read_bytes()
    at, rows = 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        rows.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    return rows


def reference(path: Path, text: str) -> list[int]:
    """llama2.c's `encode`: a prefix space, characters or their bytes, then greedy merges by score."""
    rows = read(path)
    ids = {piece: i for i, (piece, _) in enumerate(rows)}
    tokens = [1]
    for character in [" ", *text] if text else []:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best = (-1e10, -1, -1)
        for i in range(len(tokens) - 1):
            merged = ids.get(rows[tokens[i]][0] + rows[tokens[i + 1]][0])
            if merged is not None and rows[merged][1] > best[0]:
                best = (rows[merged][1], merged, i)
        if best[1] < 0:
            return tokens
        tokens[best[2] : best[2] + 2] = [best[1]]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260K" / "tok512.bin"


@pytest.fixture(scope="module")
def story(shared_data: Path) -> str:
    return (shared_data / "stories260K" / "golden_greedy_200.txt").read_text(encoding="utf-8").rstrip("\n")


@LAW
@given(TEXT)
def test_encode_equals_llama2c_with_a_small_vocabulary(vocabulary_paths: dict[str, Path], text: str) -> None:
    path = vocabulary_paths["llama2c"]
    assert load_tokenizer(path).encode(text) == reference(path, text)


@LAW
@given(text=TEXT | st.text("aeinost hTL.,'\n", max_size=60))
def test_encode_equals_llama2c_with_the_trained_vocabulary(stories: Path, text: str) -> None:
    assert load_tokenizer(stories).encode(text) == reference(stories, text)


def test_golden_story(stories: Path, story: str) -> None:
    tokenizer = load_tokenizer(stories)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (512, 1, 2, (2,))
    ids = tokenizer.encode(story)
    assert ids == reference(stories, story)
    assert len(ids) == 1 + 200  # BOS, and 200 generated tokens
    assert tokenizer.decode(ids) == story
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == story


def test_vocabulary_next_to_the_model(shared_data: Path) -> None:
    assert load_tokenizer(shared_data / "stories260K" / "stories260K.bin").vocab_size == 512
    assert load_tokenizer(shared_data / "stories260K").vocab_size == 512


def test_names_of_control_tokens_have_no_newlines(by_kind: dict[str, Tokenizer]) -> None:
    assert by_kind["llama2c"].special_tokens == {"<s>": 1, "</s>": 2}
    assert by_kind["llama2c"].encode("\n<s>\n").count(1) == 1


def small() -> bytes:
    return vocabularies.llama2c(vocabularies.pieces(vocabularies.sentencepiece_model()))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = small()
    ends = {4}
    for piece, _ in read(write(tmp_path, whole)):
        ends.add(max(ends) + 8 + len(piece))
    for length in (*range(60), *range(60, len(whole), 37)):
        if length not in ends:
            path = write(tmp_path, whole[:length])
            with pytest.raises(
                TokenizerError, match=r"tok\.bin is not a complete llama2\.c vocabulary: .*take"
            ) as raised:
                load_tokenizer(path)
            assert "\n" not in str(raised.value)


def write(directory: Path, content: bytes) -> Path:
    path = directory / "tok.bin"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes"),
        (
            struct.pack("<I", 2**31) + bytes(20),
            "the length of its longest piece is -2147483648, but the file has 24 bytes",
        ),
        (struct.pack("<i", 2**31 - 1) + bytes(20), "the length of its longest piece is 2147483647"),
        (
            struct.pack("<ifi", 7, 0, 2**31 - 1) + bytes(9),
            "the length of piece 0 is 2147483647, with 9 bytes left and a maximum of 7",
        ),
        (struct.pack("<ifi", 7, 0, -5) + bytes(9), "the length of piece 0 is -5"),
        (
            struct.pack("<ifi", 2, 0, 3) + b"abc",
            "the length of piece 0 is 3, with 3 bytes left and a maximum of 2",
        ),
        (struct.pack("<ifi", 7, float("nan"), 3) + b"abc", "piece 0 has the score nan"),
        (struct.pack("<ifi", 7, 0, 2) + b"\xff\xfe", "piece 0 is not UTF-8"),
        (struct.pack("<ifi", 7, 0, 3) + b"abc", "it has 1 pieces; unknown, BOS and EOS are required"),
        (struct.pack("<ifi", 7, 0, 3) + b"abc1234", "piece 1 at byte 15 is truncated"),
        (b"GGUF" + bytes(100), "the length of its longest piece is"),
        (b'{"model": {}}' * 9, "the length of its longest piece is"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        load_tokenizer(write(tmp_path, content))
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'tok.bin'} is not a complete llama2.c vocabulary: {reason}")
    assert message.endswith("take a fresh copy")
    assert "\n" not in message


def test_duplicate_piece(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tok\.bin has no valid SentencePiece vocabulary"):
        load_tokenizer(write(tmp_path, small() + struct.pack("<fi", -1, 1) + b"a"))
