"""Whether a format can represent a vocabulary: pre-tokenizers, merges, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.byte_level import match_pre_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.tokenizer import vocabularies
from tests.tokenizer.test_export import assert_equivalent, assert_unsupported, lines, load_json, read_back

# Byte-level vocabularies: pre-tokenizers

LLAMA3_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
SMOLLM_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
GPT2_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": True,
}


@pytest.mark.parametrize(
    ("rule", "ignore_merges", "name"),
    [
        (LLAMA3_PRE_TOKENIZER, True, "llama-bpe"),
        (LLAMA3_PRE_TOKENIZER, False, "dbrx"),
        (SMOLLM_PRE_TOKENIZER, False, "smollm"),
        (GPT2_PRE_TOKENIZER, False, "gpt-2"),
        (GPT2_PRE_TOKENIZER | {"add_prefix_space": True}, False, None),
    ],
)
def test_names_of_published_pre_tokenizers(
    rule: Mapping[str, Any], ignore_merges: bool, name: str | None, tmp_path: Path
) -> None:
    content = vocabularies.byte_level_json()
    content["pre_tokenizer"] = rule
    content["model"]["ignore_merges"] = ignore_merges
    tokenizer = load_json(tmp_path, content)
    if name is None:
        assert_unsupported(tokenizer, "gguf", "has a pre-tokenizer without a GGUF name")
    else:
        assert export_vocabulary(tokenizer, "gguf").fields["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_gguf_name_is_preserved_and_recognized_from_json(name: str, tmp_path: Path) -> None:
    path = vocabularies.write_gguf(
        tmp_path / "a.gguf", vocabularies.bpe_fields(vocabularies.byte_level_json(), name)
    )
    tokenizer = load_tokenizer(path)
    assert export_vocabulary(tokenizer, "gguf").fields["tokenizer.ggml.pre"] == name
    data = export_vocabulary(tokenizer, "hf").files["tokenizer.json"]
    found = match_pre_tokenizer(tokenizers.Tokenizer.from_str(data.decode()))
    assert found is not None
    rules = PRE_TOKENIZERS[found], PRE_TOKENIZERS[name]
    assert rules[0].ignore_merges == rules[1].ignore_merges
    assert rules[0].normalizer == rules[1].normalizer
    splits = [rule.build().pre_tokenize_str(" Don't 12345\n\n  x=ﬁ1 CAN'T!!") for rule in rules]
    assert splits[0] == splits[1]


def test_pre_tokenizer_without_a_name(tmp_path: Path) -> None:
    content = vocabularies.byte_level_json()
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = load_json(tmp_path, json.loads(library.to_str()))
    assert_unsupported(tokenizer, "gguf", "(known are default, gpt-2, smollm,")
    assert_equivalent(read_back(tokenizer, "hf", tmp_path / "out"), tokenizer, ["the quick  fox", "a\nb"])


def test_ids_without_a_token(tmp_path: Path) -> None:
    content = vocabularies.byte_level_json()
    added = content["added_tokens"][-1]
    added["id"] += 3
    content["model"]["vocab"]["<think here>"] = added["id"]
    tokenizer = load_json(tmp_path, content)
    assert tokenizer.vocab_size == added["id"] + 1
    ours = read_back(tokenizer, "gguf", tmp_path)
    ids = [5, *range(added["id"] - 4, added["id"] + 1), 6]
    assert ours.decode(ids) == tokenizer.decode(ids)
    assert_equivalent(ours, tokenizer, [*vocabularies.TEXT, f"[PAD{added['id'] - 1}]", "a<think here>b"])


# Vocabularies that pieces and scores cannot represent


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text before encoding it"),
        ({"treat_whitespace_as_suffix": True}, "does not represent spaces as a prefix of words"),
    ],
)
def test_unsupported_sentencepiece_models(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model(**options))
    tokenizer = load_tokenizer(path)
    assert_unsupported(tokenizer, "gguf", reason)
    assert_unsupported(tokenizer, "llama2c", reason)
    # The model can be exported unchanged, but has no equivalent tokenizer.json.
    assert set(export_vocabulary(tokenizer, "hf").files) == {"tokenizer.model", "tokenizer_config.json"}
    assert_equivalent(read_back(tokenizer, "hf", tmp_path / "out"), tokenizer, vocabularies.TEXT)


def llama_json(**changes: Any) -> dict[str, Any]:
    content = vocabularies.llama_json(vocabularies.sentencepiece_model())
    return content | changes


def fewer_merges() -> dict[str, Any]:
    content = llama_json()
    merges = content["model"]["merges"]
    return content | {"model": content["model"] | {"merges": merges[:5] + merges[6:]}}


def mixed_merges() -> dict[str, Any]:
    """Two merges for one piece, with other merges between them."""
    content = llama_json()
    vocab, merges = dict(content["model"]["vocab"]), content["model"]["merges"]
    a, b, c = next(text for text in vocab if len(text) == 3 and text[:2] in vocab and text[1:] not in vocab)
    vocab[b + c] = len(vocab)
    merges = [[b, c], [a, b + c], *merges]
    return content | {"model": content["model"] | {"vocab": vocab, "merges": merges}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (fewer_merges, "but no merge of"),
        (mixed_merges, "at several ranks"),
        (lambda: llama_json(normalizer={"type": "NFKC"}), "normalizes or splits text before encoding it"),
        (lambda: llama_json(pre_tokenizer={"type": "Whitespace"}), "normalizes or splits text before"),
        (
            lambda: llama_json(
                normalizer=None,
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": vocabularies.SPACE,
                    "prepend_scheme": "always",
                    "split": True,
                },
            ),
            "normalizes or splits text before encoding it",
        ),
    ],
)
def test_tokenizer_json_without_an_equivalent_model(content: Any, reason: str, tmp_path: Path) -> None:
    path = vocabularies.write_json(tmp_path / "tokenizer.json", content())
    vocabularies.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(path)
    assert_unsupported(tokenizer, "gguf", reason)
    assert "tokenizer.json" in export_vocabulary(tokenizer, "meta").files  # instead of a model


def test_metaspace_of_transformers_5(by_kind: dict[str, Tokenizer], tmp_path: Path) -> None:
    metaspace = {"type": "Metaspace", "replacement": vocabularies.SPACE, "prepend_scheme": "always"}
    content = llama_json(normalizer=None, pre_tokenizer=metaspace | {"split": False})
    path = vocabularies.write_json(tmp_path / "tokenizer.json", content)
    vocabularies.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    ours = read_back(load_tokenizer(path), "gguf", tmp_path)
    assert_equivalent(ours, by_kind["sentencepiece"], [*lines(), " two  spaces"])


def test_shared_scores_have_no_tokenizer_json(tmp_path: Path) -> None:
    fields = vocabularies.spm_fields(vocabularies.sentencepiece_model())
    fields["scores"] = [-1000.0] * len(fields["scores"])
    tokenizer = load_tokenizer(vocabularies.write_gguf(tmp_path / "a.gguf", fields))
    assert set(export_vocabulary(tokenizer, "hf").files) == {"tokenizer.model", "tokenizer_config.json"}
    assert_equivalent(read_back(tokenizer, "gguf", tmp_path), tokenizer, vocabularies.TEXT)
