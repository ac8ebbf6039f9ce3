"""Vocabularies written for every format: read back, they encode and decode as before, or are refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, gguf_vocab, load_tokenizer
from llama_jax.tokenizer.export import vocabulary_of
from llama_jax.tokenizer.pieces import sentence_pieces
from llama_jax.tokenizer.train import train_sentencepiece
from llama_jax.weights.names import Format
from tests.tokenizer import corpus, vocabularies
from tests.tokenizer.conftest import KINDS
from tests.tokenizer.test_laws import TEXTS
from tests.tokenizer.test_sentencepiece_model import goldens

FORMATS: tuple[Format, ...] = ("hf", "meta", "gguf", "llama2c", "orbax")
REFUSED = {
    ("gguf-bpe", "llama2c"): "is a byte-level one",
    ("json-bpe", "llama2c"): "is a byte-level one",
    ("spm-trimmed", "gguf"): "leaves out spaces that repeat",
    ("spm-trimmed", "llama2c"): "leaves out spaces that repeat",
}
PAIRS = [(kind, format) for kind in KINDS for format in FORMATS if (kind, format) not in REFUSED]
LAW = settings(deadline=None, max_examples=15)


def read_back(tokenizer: Tokenizer, format: Format, folder: Path) -> Tokenizer:
    vocabulary = vocabulary_of(tokenizer, format)
    if format == "gguf":
        assert not vocabulary.files
        return gguf_vocab.from_metadata(vocabulary.fields, "exported")
    assert not vocabulary.fields
    folder.mkdir()
    for name, data in vocabulary.files.items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


def roles(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("vocab_size", "bos_id", "eos_id", "pad_id", "eos_ids", "add_bos", "chat_template")
    return {name: getattr(tokenizer, name) for name in names}


def assert_alike(ours: Tokenizer, before: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        ids = before.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == before.decode(ids)
        # `<unk>` is a control token in a tokenizer.json and none in a SentencePiece model.
        control = text.replace("<unk>", "<s>")
        ids = before.encode(control, parse_special=True)
        assert ours.encode(control, parse_special=True) == ids, control
        assert ours.decode(ids, skip_special_tokens=False) == before.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="session")
def exported(
    by_kind: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[Any, Tokenizer]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        (kind, format): read_back(by_kind[kind], format, folder / f"{kind}-{format}")
        for kind, format in PAIRS
    }


@LAW
@given(TEXTS)
@pytest.mark.parametrize(("kind", "format"), PAIRS)
def test_read_back_it_encodes_and_decodes_as_before(
    exported: Mapping[Any, Tokenizer], by_kind: dict[str, Tokenizer], kind: str, format: Format, text: str
) -> None:
    assert_alike(exported[kind, format], by_kind[kind], [text])


@pytest.mark.parametrize(("kind", "format"), PAIRS)
def test_roles_and_the_chat_template_stay(
    exported: Mapping[Any, Tokenizer], by_kind: dict[str, Tokenizer], kind: str, format: Format
) -> None:
    ours, before = roles(exported[kind, format]), roles(by_kind[kind])
    if format == "llama2c":  # which has no place for one
        before["chat_template"] = None
    assert ours == before
    vocabulary = vocabulary_of(by_kind[kind], format)
    assert (vocabulary.bos_id, vocabulary.eos_ids) == (before["bos_id"], before["eos_ids"])


@pytest.mark.parametrize(("kind", "format"), REFUSED)
def test_what_a_format_cannot_say_is_refused(
    by_kind: dict[str, Tokenizer], kind: str, format: Format
) -> None:
    refused(by_kind[kind], format, REFUSED[kind, format])


def refused(tokenizer: Tokenizer, format: Format, says: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        vocabulary_of(tokenizer, format)
    assert says in str(raised.value)
    assert "write another format" in str(raised.value)
    assert "\n" not in str(raised.value)


def load_json(folder: Path, content: Mapping[str, Any], **config: Any) -> Tokenizer:
    path = vocabularies.write_json(folder / "tokenizer.json", content)
    vocabularies.write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"} | config)
    return load_tokenizer(path)


# Real vocabularies


@functools.cache
def lines() -> list[str]:
    return corpus.lines()[::12]


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "llama2" / "tokenizer.model")


@pytest.mark.parametrize("format", FORMATS)
def test_llama2s_vocabulary(llama2: Tokenizer, format: Format, shared_data: Path, tmp_path: Path) -> None:
    ours = read_back(llama2, format, tmp_path / "out")
    assert roles(ours) == roles(llama2)
    assert ours.special_tokens == llama2.special_tokens
    assert_alike(ours, llama2, lines())
    assert_alike(ours, llama2, [" " * length + "x" + " " * length for length in range(1, 70)])
    for text, ids in goldens(shared_data):
        assert ours.encode(text, add_bos=False) == ids, text
        assert ours.decode(ids) == text


def test_llama2s_vocabulary_from_its_tokenizer_json(llama2: Tokenizer, tmp_path: Path) -> None:
    """Hugging Face's form says all that the model does: it becomes a model again."""
    folder = tmp_path / "json"
    folder.mkdir()
    for name, data in vocabulary_of(llama2, "hf").files.items():
        if name != "tokenizer.model":
            (folder / name).write_bytes(data)
    converted = load_tokenizer(folder)
    assert type(converted) is not type(llama2)
    for format in ("meta", "gguf", "llama2c"):
        ours = read_back(converted, format, tmp_path / format)
        assert type(ours) is type(llama2)
        assert roles(ours) == roles(llama2)
        assert_alike(ours, llama2, lines()[::4])
    before, after = sentence_pieces(llama2, "test"), sentence_pieces(converted, "test")
    assert [(text, kind) for text, _, kind in after.pieces] == [
        (text, kind) for text, _, kind in before.pieces
    ]
    assert after.merges() == before.merges()


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_a_sentencepiece_model_is_written_to_the_byte(
    llama2: Tokenizer, format: Format, shared_data: Path
) -> None:
    data = (shared_data / "llama2" / "tokenizer.model").read_bytes()
    assert vocabulary_of(llama2, format).files["tokenizer.model"] == data


def test_llama2cs_own_vocabulary_is_written_to_the_byte(shared_data: Path) -> None:
    path = shared_data / "stories260K" / "tok512.bin"
    assert vocabulary_of(load_tokenizer(path), "llama2c").files == {"tokenizer.bin": path.read_bytes()}


@pytest.mark.parametrize("format", FORMATS)
def test_stories260ks_vocabulary(format: Format, shared_data: Path, tmp_path: Path) -> None:
    stories = load_tokenizer(shared_data / "stories260K" / "tok512.bin")
    story = (shared_data / "stories260K" / "golden_greedy_200.txt").read_text(encoding="utf-8")
    ours = read_back(stories, format, tmp_path / "out")
    assert roles(ours) == roles(stories)
    assert_alike(ours, stories, [story, *lines()])


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "orbax"])
def test_smollm2s_vocabulary(format: Format, smollm2_path: Path, tmp_path: Path) -> None:
    smollm2 = load_tokenizer(smollm2_path)
    ours = read_back(smollm2, format, tmp_path / "out")
    assert roles(ours) == roles(smollm2)
    assert ours.special_tokens == smollm2.special_tokens
    assert ours.chat_template
    assert_alike(ours, smollm2, [*lines(), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"])
    if format == "gguf":
        metadata = gguf_vocab.read_gguf_metadata(smollm2_path)
        fields = vocabulary_of(smollm2, "gguf").fields
        for key in ("tokens", "merges", "model", "pre", "bos_token_id", "eos_token_id", "padding_token_id"):
            assert fields[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
        key = "tokenizer.ggml.token_type"
        assert fields[key].tolist() == metadata[key].tolist()


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "orbax"])
def test_a_vocabulary_trained_here(format: Format, tmp_path: Path) -> None:
    path = train_sentencepiece(vocabularies.TEXT * 4, tmp_path / "tokenizer.model", vocab_size=320)
    trained = load_tokenizer(path)
    ours = read_back(trained, format, tmp_path / "out")
    assert roles(ours) == roles(trained)
    assert_alike(ours, trained, [*lines(), *vocabularies.TEXT, " the the", "", " "])
    refused(trained, "llama2c", "a space before every text")


# Roles


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", ["json-bpe", "json-llama", "sentencepiece"])
def test_tokenizer_json_itself_puts_bos_where_it_belongs(
    kind: str, add_bos: bool, vocabulary_paths: dict[str, Path], tmp_path: Path
) -> None:
    source = vocabulary_paths[kind]
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    bos = "<|endoftext|>" if kind == "json-bpe" else "<s>"
    eos = "<|im_end|>" if kind == "json-bpe" else "</s>"
    vocabularies.write_json(
        tmp_path / "tokenizer_config.json", {"bos_token": bos, "eos_token": eos, "add_bos_token": add_bos}
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.add_bos == add_bos
    data = vocabulary_of(tokenizer, "hf").files["tokenizer.json"]
    assert tokenizers.Tokenizer.from_str(data.decode()).encode("the fox").ids == tokenizer.encode("the fox")
    for format in ("hf", "gguf", "meta", "orbax"):
        assert read_back(tokenizer, format, tmp_path / format).add_bos == add_bos


def test_a_model_without_bos_and_eos(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model(bos_id=-1, eos_id=-1))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    for format in ("hf", "gguf", "meta", "orbax"):
        ours = read_back(tokenizer, format, tmp_path / format)
        assert roles(ours) == roles(tokenizer)
        assert_alike(ours, tokenizer, vocabularies.TEXT)
    refused(tokenizer, "llama2c", "not laid out as llama2.c's programs expect")


def test_ends_that_have_no_known_name(tmp_path: Path) -> None:
    content = vocabularies.byte_level_json()
    first = len(content["model"]["vocab"])
    ids = [first + 1, first + 2]
    content["added_tokens"] += [
        content["added_tokens"][0] | {"id": id, "content": f"<|{name}|>", "special": True}
        for id, name in zip(ids, ("stop", "call"), strict=True)
    ]
    vocabularies.write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, *ids]})
    tokenizer = load_json(tmp_path, content)
    assert set(tokenizer.eos_ids) == {0, 1, *ids}
    assert vocabulary_of(tokenizer, "hf").eos_ids == tokenizer.eos_ids
    assert read_back(tokenizer, "gguf", tmp_path).eos_ids == (1, *ids, 0)
