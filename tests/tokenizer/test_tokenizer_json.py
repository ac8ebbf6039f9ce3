"""tokenizer.json and the configuration files next to it: special tokens, BOS, templates, invalid files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import vocabularies
from tests.tokenizer.test_export import read_back
from tests.tokenizer.test_sentencepiece_model import goldens

BYTE_LEVEL = vocabularies.byte_level_json()
LLAMA = vocabularies.llama_json(vocabularies.sentencepiece_model())


def load(directory: Path, content: Any, **config_files: Any) -> Tokenizer:
    for name, settings in config_files.items():
        vocabularies.write_json(directory / f"{name}.json", settings)
    return load_tokenizer(vocabularies.write_json(directory / "tokenizer.json", content))


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(content) | changes


def test_llama2_golden_tokenizations(shared_data: Path, tmp_path: Path) -> None:
    model = (shared_data / "llama2" / "tokenizer.model").read_bytes()
    tokenizer = load(tmp_path, vocabularies.llama_json(model))
    for text, ids in goldens(shared_data):
        assert tokenizer.encode(text) == [1, *ids], text
        assert tokenizer.decode(ids) == text


def test_bos_from_the_post_processor(tmp_path: Path) -> None:
    llama = load(tmp_path, LLAMA)
    assert (llama.bos_id, llama.add_bos, llama.eos_id, llama.eos_ids) == (1, True, None, (2,))
    assert llama.encode("fox")[0] == 1
    byte_level = load(tmp_path, BYTE_LEVEL)
    assert (byte_level.bos_id, byte_level.add_bos, byte_level.eos_id) == (None, False, None)


def test_the_post_processor_overrides_the_tokenizer_config(tmp_path: Path) -> None:
    """As in transformers 5, whose classes take no notice of both fields beside a tokenizer.json."""
    for value in (True, False):
        fields = {"add_bos_token": value, "add_eos_token": value}
        assert load(tmp_path, LLAMA, tokenizer_config=fields).encode("fox") == [1, 269, 334]
        end = fields | {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>"}
        tokenizer = load(tmp_path, BYTE_LEVEL, tokenizer_config=end)
        assert tokenizer.decode(tokenizer.encode("fox"), skip_special_tokens=False) == "fox"


def test_eos_in_the_post_processor_is_appended(tmp_path: Path) -> None:
    content = copy.deepcopy(LLAMA)
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    tokenizer = load(tmp_path, content, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.encode("fox") == tokenizer.encode("fox", add_eos=True) == [1, 269, 334, 2]
    assert tokenizer.encode("fox", add_eos=False) == [1, 269, 334]
    assert tokenizer.encode("fox", add_bos=False) == [269, 334]  # transformers' add_special_tokens=False
    for format in ("hf", "gguf", "meta", "orbax"):
        again = read_back(tokenizer, format, tmp_path / format)
        assert again.encode("fox") == [1, 269, 334, 2]
    with pytest.raises(TokenizerError, match="appends </s> to every text, which llama2c cannot represent"):
        read_back(tokenizer, "llama2c", tmp_path / "llama2c")


def test_add_prefix_space_is_for_the_classes_that_read_it(tmp_path: Path) -> None:
    llama = {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}
    tokenizer = load(tmp_path, LLAMA, tokenizer_config=llama)
    assert tokenizer.encode("the", add_bos=False) == [259, 300]
    assert tokenizer.decode([*tokenizer.encode(" the", add_bos=False)]) == " the"
    gpt2 = {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}
    tokenizer = load(tmp_path, BYTE_LEVEL, tokenizer_config=gpt2)
    assert tokenizer.decode(tokenizer.encode("fox")) == " fox"
    for value in (True, False):
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": value}
        assert load(tmp_path, LLAMA, tokenizer_config=fields).encode("fox") == [1, 269, 334]


def test_byte_pieces_without_byte_fallback_are_text(tmp_path: Path) -> None:
    decoder = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    tokenizer = load(tmp_path, changed(LLAMA, decoder=decoder))
    assert tokenizer.decode([298, 63]) == "<0x3C>"
    fields = {"tokenizer_class": "LlamaTokenizer"}  # whose decoder in transformers is not the file's
    assert load(tmp_path, changed(LLAMA, decoder=decoder), tokenizer_config=fields).decode([298, 63]) == "<"


def test_special_tokens_come_from_the_most_specific_file(tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path,
        BYTE_LEVEL,
        tokenizer_config={"eos_token": "<|im_end|>", "pad_token": None, "unk_token": {"content": "nowhere"}},
        special_tokens_map={"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}},
        generation_config={"eos_token_id": [1, 7], "bos_token_id": 0},
        config={"bos_token_id": 5, "eos_token_id": 6},
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 1, 0, None)
    assert tokenizer.eos_ids == (1, 7, 0)  # tokenizer_config.json, generation_config.json, <|endoftext|>
    assert load(tmp_path / "..", BYTE_LEVEL, config={"eos_token_id": 1}).eos_id == 1


def test_special_tokens_are_control_tokens(tmp_path: Path) -> None:
    content = copy.deepcopy(BYTE_LEVEL)
    for entry in content["added_tokens"]:
        entry["special"] = False
    plain = load(tmp_path, content)
    assert 1 in plain.encode("<|im_end|>")
    marked = load(tmp_path, content, tokenizer_config={"eos_token": "<|im_end|>"})
    assert marked.special_tokens == {"<|im_end|>": 1}
    assert 1 not in marked.encode("<|im_end|>")
    assert marked.encode("<|im_end|>", parse_special=True) == [1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "a"}, "a"),
        ({"chat_template": [{"name": "tool", "template": "b"}, {"name": "default", "template": "c"}]}, "c"),
        ({"chat_template": [{"name": "tool", "template": "b"}]}, None),
        ({}, None),
    ],
)
def test_chat_templates(tmp_path: Path, config: dict[str, Any], expected: str | None) -> None:
    assert load(tmp_path, BYTE_LEVEL, tokenizer_config=config).chat_template == expected


def test_chat_template_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load(tmp_path, BYTE_LEVEL).chat_template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        load(tmp_path, BYTE_LEVEL)


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    tokenizer = load(tmp_path, changed(BYTE_LEVEL, truncation=truncation, padding=padding))
    assert tokenizer.encode("the quick brown fox") == load(tmp_path, BYTE_LEVEL).encode("the quick brown fox")


def test_metaspace_files(tmp_path: Path) -> None:
    """Metaspace in place of normalizer steps, and a vocabulary without a prefix space."""
    the = LLAMA["model"]["vocab"]["\u2581the"]
    for scheme, text in (("first", "the fox"), ("never", " the fox")):
        metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        tokenizer = load(
            tmp_path, changed(LLAMA, normalizer=None, pre_tokenizer=metaspace, decoder=metaspace)
        )
        ids = tokenizer.encode(text, add_bos=False)
        assert ids[0] == the
        assert tokenizer.decode(ids) == text
    plain = load(tmp_path, vocabularies.llama_json(vocabularies.sentencepiece_model(), prefix=False))
    assert plain.decode([the]) == " the"


def test_unused_ids_decode_to_nothing(tmp_path: Path) -> None:
    content = copy.deepcopy(BYTE_LEVEL)
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    content["model"]["vocab"][last] += 5
    tokenizer = load(tmp_path, content)
    assert tokenizer.vocab_size == content["model"]["vocab"][last] + 1
    assert tokenizer.decode([tokenizer.vocab_size - 3]) == ""


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
BAD: dict[str, tuple[Any, str]] = {
    "array": ([1], "is a JSON list, not an object"),
    "no model": ({}, "the model type is 'None'; llama_jax supports BPE and Unigram"),
    "other model": (changed(BYTE_LEVEL, model=WORDS), "the model type is 'WordLevel'"),
    "model of another type": (changed(BYTE_LEVEL, model="BPE" * 99), "the model type is 'BPEBPE"),
    "no decoder": (changed(BYTE_LEVEL, decoder=None), "the decoder is 'None'"),
    "other decoder": (
        changed(BYTE_LEVEL, decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}),
        "'WordPiece'",
    ),
    "decoders of another type": (
        changed(BYTE_LEVEL, decoder={"type": "Sequence", "decoders": 3}),
        "'Sequence'",
    ),
    "merge of unknown pieces": (
        changed(BYTE_LEVEL, model=BYTE_LEVEL["model"] | {"merges": [["zq", "zq"]]}),
        "cannot be loaded (Cannot instantiate Tokenizer from buffer: Token `zq` out of vocabulary",
    ),
    "shared id": (
        changed(BYTE_LEVEL, model=BYTE_LEVEL["model"] | {"vocab": BYTE_LEVEL["model"]["vocab"] | {"Ġ": 40}}),
        "share the id 40",
    ),
    "id beyond reason": (
        changed(
            BYTE_LEVEL, model=BYTE_LEVEL["model"] | {"vocab": BYTE_LEVEL["model"]["vocab"] | {"Ġ": 2**32 - 1}}
        ),
        "the vocabulary has ids up to 4294967295; it must have 1 to 4194304 ids",
    ),
    "empty": (
        changed(BYTE_LEVEL, model=BYTE_LEVEL["model"] | {"vocab": {}, "merges": []}, added_tokens=[]),
        "the vocabulary is empty",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_files(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    with pytest.raises(TokenizerError) as raised:
        load(tmp_path, content)
    message = str(raised.value)
    assert message.startswith(str(tmp_path / "tokenizer.json"))
    assert reason in message
    assert "\n" not in message


def test_file_that_makes_the_library_panic(tmp_path: Path) -> None:
    content = vocabularies.llama_json(vocabularies.sentencepiece_model())
    content["model"]["continuing_subword_prefix"] = "longer than any piece is"
    with pytest.raises(TokenizerError, match="cannot be loaded") as raised:
        load(tmp_path, content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"GGUF\3\0\0\0", b"\0" * 50])
def test_files_that_are_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not JSON .*; take a fresh copy") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config_files", "reason"),
    [
        ({"tokenizer_config": [1]}, "tokenizer_config.json is a JSON list"),
        (
            {"tokenizer_config": {"eos_token": "</end>"}},
            "tokenizer_config.json: eos_token is '</end>', which is not in the",
        ),
        (
            {"special_tokens_map": {"bos_token": "<b>"}},
            "special_tokens_map.json: bos_token is '<b>', which is not in the",
        ),
        (
            {"generation_config": {"eos_token_id": "2"}},
            "generation_config.json: eos_token_id is ['2']; it must be",
        ),
        ({"config": {"bos_token_id": -1}}, "bos_id is -1, but the vocabulary's"),
    ],
)
def test_inconsistent_config_files(tmp_path: Path, config_files: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        load(tmp_path, BYTE_LEVEL, **config_files)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_malformed_config_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        load(tmp_path, BYTE_LEVEL)
