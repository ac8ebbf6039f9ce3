"""SentencePiece models: Llama 2's golden tokenizations, the library as reference, malformed files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.sentencepiece_model import Piece, build_model
from tests.tokenizer import vocabularies

LAW = settings(deadline=None, max_examples=100)


def goldens(shared_data: Path) -> list[tuple[str, list[int]]]:
    folder = shared_data / "llama2"
    with (folder / "golden_inputs.txt").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    rows = (folder / "golden_ids.txt").read_text().split("\n")
    return list(zip(texts, ([int(token) for token in row.split()] for row in rows), strict=True))


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama2" / "tokenizer.model")


def test_llama2_golden_tokenizations(llama2: Tokenizer, shared_data: Path) -> None:
    cases = goldens(shared_data)
    assert len(cases) == 47
    for text, ids in cases:
        assert llama2.encode(text, add_bos=False) == ids, text
        assert llama2.encode(text) == [1, *ids], text
        assert llama2.decode(ids) == llama2.decode([1, *ids]) == text


def test_llama2_special_tokens(llama2: Tokenizer) -> None:
    assert llama2.vocab_size == 32_000
    assert (llama2.bos_id, llama2.eos_id, llama2.unk_id, llama2.pad_id) == (1, 2, 0, None)
    assert llama2.eos_ids == (2,)
    assert llama2.special_tokens == {"<s>": 1, "</s>": 2}
    assert llama2.add_bos
    assert llama2.chat_template is None


def test_control_tokens_in_text_stay_text(llama2: Tokenizer) -> None:
    ids = llama2.encode("[INST] </s><s> [/INST]")
    assert ids.count(1) == 1
    assert 2 not in ids
    assert llama2.decode(ids) == "[INST] </s><s> [/INST]"


def test_text_after_a_parsed_control_token_has_a_prefix_space(llama2: Tokenizer) -> None:
    """Meta's code encodes each turn of a conversation separately, with its prefix space."""
    turns = [
        [1, *llama2.encode(turn, add_bos=False), 2] for turn in ("[INST] hi [/INST] hello ", "[INST] bye")
    ]
    text = "<s>[INST] hi [/INST] hello </s><s>[INST] bye</s>"
    assert llama2.encode(text, parse_special=True) == [*turns[0], *turns[1]]


@LAW
@given(st.data())
def test_decode_equals_the_library(vocabulary_paths: dict[str, Path], data: st.DataObject) -> None:
    path = vocabulary_paths[data.draw(st.sampled_from(["sentencepiece", "spm-trimmed"]))]
    tokenizer = load_tokenizer(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ordinary = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special_tokens.values()))
    ids = data.draw(st.lists(st.sampled_from(ordinary), max_size=30))
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.decode([1, *ids, 2]) == library.decode([1, *ids, 2])


@LAW
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_remove_extra_whitespaces_removes_only_spaces(by_kind: dict[str, Tokenizer], text: str) -> None:
    tokenizer = by_kind["spm-trimmed"]
    known = "".join(c for c in text if tokenizer.unk_id not in tokenizer.encode(c)) + "  the  fox "
    assert tokenizer.decode(tokenizer.encode(known)) == " ".join(
        filter(None, known.replace("\u2581", " ").split(" "))
    )


def test_unknown_token_decodes_to_the_models_unk_surface(llama2: Tokenizer) -> None:
    assert llama2.decode([0]) == " \u2047 "
    assert llama2.decode([0], skip_special_tokens=False) == " \u2047 "


def test_only_the_prefix_space_is_dropped(llama2: Tokenizer) -> None:
    hello, space = llama2.encode("Hello", add_bos=False)[0], llama2.encode(" ", add_bos=False)
    assert llama2.decode([hello]) == llama2.decode([1, hello]) == "Hello"
    assert llama2.decode([hello, hello]) == "Hello Hello"
    assert llama2.decode([*space, hello]) == "  Hello"
    assert llama2.decode([1, hello], skip_special_tokens=False) == "<s> Hello"


def test_configuration_files_next_to_a_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model())
    config = {"add_bos_token": False, "chat_template": "{{ x }}", "bos_token": "<s>", "pad_token": "absent"}
    vocabularies.write_json(tmp_path / "tokenizer_config.json", config)
    vocabularies.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 7]})
    tokenizer = load_tokenizer(path)
    assert not tokenizer.add_bos
    assert tokenizer.chat_template == "{{ x }}"
    assert tokenizer.eos_ids == (2, 7)
    assert tokenizer.pad_id is None


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    """The library would load a file truncated between two pieces."""
    whole = vocabularies.sentencepiece_model()
    path = tmp_path / "cut.model"
    for length in (*range(200), *range(200, len(whole), 61), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            TokenizerError, match=r"cut\.model (is not a complete|has no valid) SentencePiece"
        ) as raised:
            load_tokenizer(path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b'{"model": 1}',
        b"GGUF" + bytes(64),
        bytes(range(256)) * 20,
        b"\x0a\xff\xff\xff\xff\x7f",
    ],
)
def test_files_of_other_formats(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(
        TokenizerError, match=r"other\.model is not a complete SentencePiece model .*take a fresh copy"
    ):
        load_tokenizer(path)


def test_pieces_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(vocabularies.sentencepiece_model().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(TokenizerError, match=r"bad\.model has no valid SentencePiece vocabulary") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Piece("a", 0, 1)],  # no unknown piece
        [Piece("<unk>", 0, 2), Piece("a", 0, 1), Piece("a", -1, 1)],
        [Piece("<unk>", 0, 2), Piece("", 0, 1)],
        [Piece("<unk>", 0, 2), Piece("<0x00>", 0, 6)],  # one byte of 256
        [Piece("<unk>", 0, 2), Piece("byte", 0, 6)],
    ],
)
def test_invalid_pieces(pieces: list[Piece]) -> None:
    with pytest.raises(TokenizerError, match=r"file\.bin has no valid SentencePiece vocabulary") as raised:
        build_model(pieces, "file.bin")
    assert "\n" not in str(raised.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_permission_error(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    path = tmp_path / "secret.model"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "read_bytes", raise_permission_error)
    with pytest.raises(TokenizerError, match=r"secret\.model cannot be read \(Permission denied\)"):
        load_tokenizer(path)
