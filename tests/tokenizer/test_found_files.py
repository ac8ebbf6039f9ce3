"""Tokenizer files as people have them: added words and tokens, and neighbours that say different things."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama_jax.chat import chat_template, render_chat
from llama_jax.errors import TokenizerError
from llama_jax.text.convert import convert
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary

V = 512  # of stories260K


def added(id: int, content: str, **settings: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": id, "content": content, **flags, **settings}


@pytest.fixture(scope="module")
def base(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    convert(shared_data / "stories260K" / "stories260K.bin", folder, "hf")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    return tmp_path


def edit(path: Path, **fields: Any) -> dict[str, Any]:
    """Changes fields of a JSON file; None removes one. Returns what it held."""
    old = json.loads(path.read_text()) if path.exists() else {}
    new = {key: value for key, value in (copy.deepcopy(old) | fields).items() if value is not None}
    path.write_text(json.dumps(new))
    return old


def with_added(folder: Path, *entries: dict[str, Any]) -> tokenizers.Tokenizer:
    """Appends added tokens to tokenizer.json; returns its own library's tokenizer."""
    path = folder / "tokenizer.json"
    old = edit(path)
    edit(path, added_tokens=[*old["added_tokens"], *entries])
    return tokenizers.Tokenizer.from_file(str(path))


TEXTS = ("the dragon and the wizard ran", "dragon", " dragon  wizard", "dragonwizard.", "a\ndragon\n wizard ")


@pytest.mark.parametrize("normalized", [True, False])
def test_added_words_are_encoded_and_decoded_with_their_spaces(normalized: bool, folder: Path) -> None:
    library = with_added(
        folder,
        *(added(V + i, w, normalized=normalized, special=False) for i, w in enumerate(("dragon", "wizard"))),
    )
    ours = load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [1, *library.encode(text, add_special_tokens=False).ids]
        assert ours.decode(ids) == library.decode(ids)
        assert not normalized or ours.decode(ids) == text  # others are cut out first, as texts of their own
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == library.decode(ids)


def test_added_words_that_other_formats_would_split_otherwise_are_not_written(folder: Path) -> None:
    with_added(folder, added(V, "dragon", normalized=True, special=False))
    ours = load_tokenizer(folder)
    for format in ("gguf", "llama2c"):
        with pytest.raises(TokenizerError, match="'dragon', which takes the space before it") as caught:
            export_vocabulary(ours, format)
        assert str(caught.value).endswith("write another format")
    for format in ("hf", "meta"):
        assert {*export_vocabulary(ours, format).files} == {"tokenizer.json", "tokenizer_config.json"}


def test_the_jinja_file_is_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("NEW {{ messages[0].content }}")
    for field in ("OLD", [{"name": "default", "template": "OLD"}], None):
        edit(folder / "tokenizer_config.json", chat_template=field)
        assert load_tokenizer(folder).chat_template == "NEW {{ messages[0].content }}"
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template="OLD")
    assert load_tokenizer(folder).chat_template == "OLD"


@pytest.mark.parametrize("files", [True, False])
def test_conversations_with_tools_use_the_template_for_them(files: bool, folder: Path) -> None:
    sources = {"default": "\n{{- messages[0].content }}\n", "tool_use": "\n{{ tools | length }} tools\n\n"}
    if files:
        (folder / "chat_template.jinja").write_text(sources["default"])
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(sources["tool_use"])
    else:
        rows = [{"name": name, "template": source} for name, source in sources.items()]
        edit(folder / "tokenizer_config.json", chat_template=rows)
    template, dialog = chat_template(load_tokenizer(folder)), [{"role": "user", "content": "hi"}]
    assert render_chat(template, dialog) == "hi"
    tool = {"type": "function", "function": {"name": "f"}}
    assert render_chat(template, dialog, tools=[tool, tool]) == "\n2 tools\n"


def post_processor(*names: str, ids: dict[str, int]) -> dict[str, Any]:
    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    text = [{"Sequence": {"id": part, "type_id": i}} for i, part in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [*single, text[0]],
        "pair": [*single, *text],
        "special_tokens": tokens,
    }


@pytest.mark.parametrize("names", [("<|begin|>",), ("<s>", "<|begin|>"), ("<s>",), ()])
def test_the_post_processor_says_what_is_prepended(
    names: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    ids = {"<s>": 1, "<|begin|>": V}
    with_added(folder, added(V, "<|begin|>"))
    edit(folder / "tokenizer.json", post_processor=post_processor(*names, ids=ids))
    edit(folder / "tokenizer_config.json", add_bos_token=None)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    expected = library.encode("Once upon a time").ids
    assert ours.encode("Once upon a time") == expected
    assert expected[: len(names)] == [ids[name] for name in names]
    assert ours.encode("Once upon a time", add_bos=False) == expected[len(names) :]
    assert ours.bos_id == 1  # of the templates
    written = tmp_path / "written"
    written.mkdir()
    for name, data in export_vocabulary(ours, "hf").files.items():
        (written / name).write_bytes(data)
    assert load_tokenizer(written).encode("Once upon a time") == expected
    if len(names) < 2:  # llama.cpp knows one token to prepend
        fields = export_vocabulary(ours, "gguf").fields
        assert fields["tokenizer.ggml.bos_token_id"] == (ids[names[0]] if names else 1)
        assert fields["tokenizer.ggml.add_bos_token"] == bool(names)
    else:
        with pytest.raises(
            TokenizerError, match=r"prepends <s> <\|begin\|> to every text, which gguf cannot"
        ):
            export_vocabulary(ours, "gguf")


def test_a_post_processor_that_panics_is_one_line(folder: Path) -> None:
    content = edit(folder / "tokenizer.json")
    processor = post_processor("<s>", ids={"<s>": 1}) | {"special_tokens": {}}
    edit(folder / "tokenizer.json", post_processor=processor)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json.* (its post_processor cannot be run|cannot be loaded)"
    ):
        load_tokenizer(folder)
    assert content["model"]["type"] == "BPE"


CHATML = {"<|im_end|>": V, "<|im_start|>": V + 1}


@pytest.mark.parametrize("file", ["added_tokens.json", "added_tokens_decoder", "both"])
def test_tokens_that_files_add_to_a_sentencepiece_model(file: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    edit(tmp_path / "special_tokens_map.json", **names)
    if file != "added_tokens_decoder":
        edit(tmp_path / "added_tokens.json", **CHATML, cat=V + 2)
    if file != "added_tokens.json":
        decoder = {str(id): added(id, name) for name, id in CHATML.items()}
        decoder[str(V + 2)] = added(V + 2, "cat", special=False)
        edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder, **names)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (V + 3, V)
    text = "<|im_start|>Once upon a time<|im_end|>"
    ids = tokenizer.encode(text, parse_special=True)
    assert ids == [1, V + 1, 403, 407, 261, 378, V]  # transformers' ids
    assert tokenizer.decode(ids) == "Once upon a time"
    assert not {*CHATML.values()} & {*tokenizer.encode(text)}  # typed, they are text
    assert V + 2 in tokenizer.encode("a cat ran")
    written = tmp_path / "written"
    written.mkdir()
    for name, data in export_vocabulary(tokenizer, "meta").files.items():
        (written / name).write_bytes(data)
    assert load_tokenizer(written).encode(text, parse_special=True) == ids


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<a>": "x"}, r"added_tokens\.json: its added tokens are not names with ids"),
        ("added_tokens.json", {"<a>": 1 << 40}, r"an added token has id 1099511627776; ids must be below"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": 3}},
            r"tokenizer_config\.json: its added tokens",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"tokenizer_config\.json: its added tokens"),
    ],
)
def test_malformed_added_tokens(file: str, content: Any, message: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)
