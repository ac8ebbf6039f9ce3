"""Tokenizers exported to every format: loaded again they are equivalent, or the export is an error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import processors

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, gguf_vocab, load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from llama_jax.tokenizer.pieces import extract_pieces
from llama_jax.tokenizer.train import train_sentencepiece
from llama_jax.weights.names import Format
from tests.tokenizer import corpus, vocabularies
from tests.tokenizer.conftest import KINDS
from tests.tokenizer.test_laws import TEXTS
from tests.tokenizer.test_sentencepiece_model import goldens

FORMATS: tuple[Format, ...] = ("hf", "meta", "gguf", "llama2c", "orbax")
UNSUPPORTED = {
    ("gguf-bpe", "llama2c"): "is byte-level",
    ("json-bpe", "llama2c"): "is byte-level",
    ("spm-trimmed", "gguf"): "removes extra whitespace",
    ("spm-trimmed", "llama2c"): "removes extra whitespace",
}
PAIRS = [(kind, format) for kind in KINDS for format in FORMATS if (kind, format) not in UNSUPPORTED]
LAW = settings(deadline=None, max_examples=15)


def read_back(tokenizer: Tokenizer, format: Format, folder: Path) -> Tokenizer:
    vocabulary = export_vocabulary(tokenizer, format)
    if format == "gguf":
        assert not vocabulary.files
        return gguf_vocab.from_metadata(vocabulary.fields, "exported")
    assert not vocabulary.fields
    folder.mkdir()
    for name, data in vocabulary.files.items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


def config_of(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("vocab_size", "bos_id", "eos_id", "pad_id", "eos_ids", "add_bos", "chat_template")
    return {name: getattr(tokenizer, name) for name in names}


def assert_equivalent(ours: Tokenizer, before: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        ids = before.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == before.decode(ids)
        # `<unk>` is a control token in a tokenizer.json, but not in a SentencePiece model.
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
def test_export_round_trip(
    exported: Mapping[Any, Tokenizer], by_kind: dict[str, Tokenizer], kind: str, format: Format, text: str
) -> None:
    assert_equivalent(exported[kind, format], by_kind[kind], [text])


@pytest.mark.parametrize(("kind", "format"), PAIRS)
def test_special_tokens_and_the_chat_template_are_preserved(
    exported: Mapping[Any, Tokenizer], by_kind: dict[str, Tokenizer], kind: str, format: Format
) -> None:
    ours, before = config_of(exported[kind, format]), config_of(by_kind[kind])
    if format == "llama2c":  # the format has no chat template
        before["chat_template"] = None
    assert ours == before
    vocabulary = export_vocabulary(by_kind[kind], format)
    assert (vocabulary.bos_id, vocabulary.eos_ids) == (before["bos_id"], before["eos_ids"])


@pytest.mark.parametrize(("kind", "format"), UNSUPPORTED)
def test_format_that_cannot_represent_the_vocabulary(
    by_kind: dict[str, Tokenizer], kind: str, format: Format
) -> None:
    assert_unsupported(by_kind[kind], format, UNSUPPORTED[kind, format])


def assert_unsupported(tokenizer: Tokenizer, format: Format, reason: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        export_vocabulary(tokenizer, format)
    assert reason in str(raised.value)
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


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.mark.parametrize("format", FORMATS)
def test_llama2_vocabulary(llama2: Tokenizer, format: Format, shared_data: Path, tmp_path: Path) -> None:
    ours = read_back(llama2, format, tmp_path / "out")
    assert config_of(ours) == config_of(llama2)
    assert ours.special_tokens == llama2.special_tokens
    assert_equivalent(ours, llama2, lines())
    assert_equivalent(ours, llama2, [" " * length + "x" + " " * length for length in range(1, 70)])
    for text, ids in goldens(shared_data):
        assert ours.encode(text, add_bos=False) == ids, text
        assert ours.decode(ids) == text


def test_llama2_vocabulary_from_its_tokenizer_json(llama2: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json converts back to an equivalent SentencePiece model."""
    folder = tmp_path / "json"
    folder.mkdir()
    for name, data in export_vocabulary(llama2, "hf").files.items():
        if name != "tokenizer.model":
            (folder / name).write_bytes(data)
    converted = load_tokenizer(folder)
    assert type(converted) is not type(llama2)
    for format in ("meta", "gguf", "llama2c"):
        ours = read_back(converted, format, tmp_path / format)
        assert type(ours) is type(llama2)
        assert config_of(ours) == config_of(llama2)
        assert_equivalent(ours, llama2, lines()[::4])
    before, after = extract_pieces(llama2, "test"), extract_pieces(converted, "test")
    assert [(text, kind) for text, _, kind in after.pieces] == [
        (text, kind) for text, _, kind in before.pieces
    ]
    assert after.merges() == before.merges()


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_sentencepiece_model_is_exported_byte_for_byte(
    llama2: Tokenizer, format: Format, shared_data: Path
) -> None:
    data = (shared_data / "llama2" / "tokenizer.model").read_bytes()
    assert export_vocabulary(llama2, format).files["tokenizer.model"] == data


def test_llama2c_vocabulary_is_exported_byte_for_byte(shared_data: Path) -> None:
    path = shared_data / "stories260K" / "tok512.bin"
    assert export_vocabulary(load_tokenizer(path), "llama2c").files == {"tokenizer.bin": path.read_bytes()}


@pytest.mark.parametrize("format", FORMATS)
def test_stories260k_vocabulary(format: Format, shared_data: Path, tmp_path: Path) -> None:
    stories = load_tokenizer(shared_data / "stories260K" / "tok512.bin")
    story = (shared_data / "stories260K" / "golden_greedy_200.txt").read_text(encoding="utf-8")
    ours = read_back(stories, format, tmp_path / "out")
    assert config_of(ours) == config_of(stories)
    assert_equivalent(ours, stories, [story, *lines()])


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "orbax"])
def test_smollm2_vocabulary(
    format: Format, smollm2_vocabulary: Tokenizer, smollm2_path: Path, tmp_path: Path
) -> None:
    smollm2 = smollm2_vocabulary
    ours = read_back(smollm2, format, tmp_path / "out")
    assert config_of(ours) == config_of(smollm2)
    assert ours.special_tokens == smollm2.special_tokens
    assert ours.chat_template
    assert_equivalent(ours, smollm2, [*lines(), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"])
    if format == "gguf":
        metadata = gguf_vocab.read_gguf_metadata(smollm2_path)
        fields = export_vocabulary(smollm2, "gguf").fields
        for key in ("tokens", "merges", "model", "pre", "bos_token_id", "eos_token_id", "padding_token_id"):
            assert fields[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
        key = "tokenizer.ggml.token_type"
        assert fields[key].tolist() == metadata[key].tolist()


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "orbax"])
def test_vocabulary_of_train_sentencepiece(format: Format, tmp_path: Path) -> None:
    path = train_sentencepiece(vocabularies.TEXT * 4, tmp_path / "tokenizer.model", vocab_size=320)
    trained = load_tokenizer(path)
    ours = read_back(trained, format, tmp_path / "out")
    assert config_of(ours) == config_of(trained)
    assert_equivalent(ours, trained, [*lines(), *vocabularies.TEXT, " the the", "", " "])
    assert_unsupported(trained, "llama2c", "a prefix space before every text")


# Special tokens


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", ["json-bpe", "json-llama", "sentencepiece"])
def test_post_processor_of_tokenizer_json_prepends_bos(
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
    if kind != "sentencepiece":  # a tokenizer.json says it itself
        backend = tokenizers.Tokenizer.from_file(str(path))
        token = (bos, backend.token_to_id(bos))
        single = f"{bos} $A" if add_bos else "$A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[token])
        backend.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.add_bos == add_bos
    data = export_vocabulary(tokenizer, "hf").files["tokenizer.json"]
    assert tokenizers.Tokenizer.from_str(data.decode()).encode("the fox").ids == tokenizer.encode("the fox")
    for format in ("hf", "gguf", "meta", "orbax"):
        assert read_back(tokenizer, format, tmp_path / format).add_bos == add_bos


def test_model_without_bos_and_eos(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model(bos_id=-1, eos_id=-1))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    for format in ("hf", "gguf", "meta", "orbax"):
        ours = read_back(tokenizer, format, tmp_path / format)
        assert config_of(ours) == config_of(tokenizer)
        assert_equivalent(ours, tokenizer, vocabularies.TEXT)
    assert_unsupported(tokenizer, "llama2c", "does not have the layout of llama2.c")


def test_end_tokens_without_a_known_name(tmp_path: Path) -> None:
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
    assert export_vocabulary(tokenizer, "hf").eos_ids == tokenizer.eos_ids
    assert read_back(tokenizer, "gguf", tmp_path).eos_ids == (1, *ids, 0)
