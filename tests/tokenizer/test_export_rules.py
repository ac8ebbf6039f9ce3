"""What decides whether a format can say what a vocabulary does: rules for cutting text, merges, scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.byte_level import PRE_TOKENIZERS, recognise
from llama_jax.tokenizer.export import vocabulary_of
from tests.tokenizer import vocabularies
from tests.tokenizer.test_export import assert_alike, lines, load_json, read_back, refused

# Byte-level vocabularies: the rule by which text is cut

LLAMA3_RULE = {
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
SMOLLM_RULE = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
GPT2_RULE = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("rule", "ignore_merges", "name"),
    [
        (LLAMA3_RULE, True, "llama-bpe"),
        (LLAMA3_RULE, False, None),
        (SMOLLM_RULE, False, "smollm"),
        (GPT2_RULE, False, "gpt-2"),
        (GPT2_RULE | {"add_prefix_space": True}, False, None),
    ],
)
def test_the_published_rules_have_their_names(
    rule: Mapping[str, Any], ignore_merges: bool, name: str | None, tmp_path: Path
) -> None:
    content = vocabularies.byte_level_json()
    content["pre_tokenizer"] = rule
    content["model"]["ignore_merges"] = ignore_merges
    tokenizer = load_json(tmp_path, content)
    if name is None:
        refused(tokenizer, "gguf", "cuts text before merging in a way that GGUF has no name for")
    else:
        assert vocabulary_of(tokenizer, "gguf").fields["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_name_from_gguf_stays_and_its_rule_is_recognised_in_json(name: str, tmp_path: Path) -> None:
    path = vocabularies.write_gguf(
        tmp_path / "a.gguf", vocabularies.bpe_fields(vocabularies.byte_level_json(), name)
    )
    tokenizer = load_tokenizer(path)
    assert vocabulary_of(tokenizer, "gguf").fields["tokenizer.ggml.pre"] == name
    data = vocabulary_of(tokenizer, "hf").files["tokenizer.json"]
    found = recognise(tokenizers.Tokenizer.from_str(data.decode()))
    assert found is not None
    rules = PRE_TOKENIZERS[found], PRE_TOKENIZERS[name]
    assert rules[0].ignore_merges == rules[1].ignore_merges
    assert rules[0].normalizer == rules[1].normalizer
    cuts = [rule.build().pre_tokenize_str(" Don't 12345\n\n  x=ﬁ1 CAN'T!!") for rule in rules]
    assert cuts[0] == cuts[1]


def test_a_rule_without_a_name_is_refused(tmp_path: Path) -> None:
    content = vocabularies.byte_level_json()
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = load_json(tmp_path, json.loads(library.to_str()))
    refused(tokenizer, "gguf", "(known are default, gpt-2, smollm,")
    assert_alike(read_back(tokenizer, "hf", tmp_path / "out"), tokenizer, ["the quick  fox", "a\nb"])


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
    assert_alike(ours, tokenizer, [*vocabularies.TEXT, f"[PAD{added['id'] - 1}]", "a<think here>b"])


# Vocabularies that pieces and scores do not describe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "unigram", "vocab_size": 320}, "is no byte-pair one"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text before encoding it"),
        ({"treat_whitespace_as_suffix": True}, "does not mark a word's beginning with a space"),
    ],
)
def test_models_that_say_more(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabularies.sentencepiece_model(**options))
    tokenizer = load_tokenizer(path)
    refused(tokenizer, "gguf", says)
    refused(tokenizer, "llama2c", says)
    # The model itself can be kept, but there is no tokenizer.json that says the same.
    assert set(vocabulary_of(tokenizer, "hf").files) == {"tokenizer.model", "tokenizer_config.json"}
    assert_alike(read_back(tokenizer, "hf", tmp_path / "out"), tokenizer, vocabularies.TEXT)


def llama_json(**changes: Any) -> dict[str, Any]:
    content = vocabularies.llama_json(vocabularies.sentencepiece_model())
    return content | changes


def fewer_merges() -> dict[str, Any]:
    content = llama_json()
    merges = content["model"]["merges"]
    return content | {"model": content["model"] | {"merges": merges[:5] + merges[6:]}}


def mixed_merges() -> dict[str, Any]:
    """Two ways to make one piece, and others between them."""
    content = llama_json()
    vocab, merges = dict(content["model"]["vocab"]), content["model"]["merges"]
    a, b, c = next(text for text in vocab if len(text) == 3 and text[:2] in vocab and text[1:] not in vocab)
    vocab[b + c] = len(vocab)
    merges = [[b, c], [a, b + c], *merges]
    return content | {"model": content["model"] | {"vocab": vocab, "merges": merges}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (fewer_merges, "does not merge"),
        (mixed_merges, "at several ranks"),
        (lambda: llama_json(normalizer={"type": "NFKC"}), "normalises or cuts text before encoding it"),
        (lambda: llama_json(pre_tokenizer={"type": "Whitespace"}), "normalises or cuts text before"),
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
            "normalises or cuts text before encoding it",
        ),
    ],
)
def test_tokenizer_jsons_that_no_model_says(content: Any, says: str, tmp_path: Path) -> None:
    path = vocabularies.write_json(tmp_path / "tokenizer.json", content())
    vocabularies.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = load_tokenizer(path)
    refused(tokenizer, "gguf", says)
    assert "tokenizer.json" in vocabulary_of(tokenizer, "meta").files  # for want of a model


def test_metaspace_is_transformers_5s_form_of_a_model(by_kind: dict[str, Tokenizer], tmp_path: Path) -> None:
    metaspace = {"type": "Metaspace", "replacement": vocabularies.SPACE, "prepend_scheme": "always"}
    content = llama_json(normalizer=None, pre_tokenizer=metaspace | {"split": False})
    path = vocabularies.write_json(tmp_path / "tokenizer.json", content)
    vocabularies.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    ours = read_back(load_tokenizer(path), "gguf", tmp_path)
    assert_alike(ours, by_kind["sentencepiece"], [*lines(), " two  spaces"])


def test_scores_that_two_pieces_share_have_no_tokenizer_json(tmp_path: Path) -> None:
    fields = vocabularies.spm_fields(vocabularies.sentencepiece_model())
    fields["scores"] = [-1000.0] * len(fields["scores"])
    tokenizer = load_tokenizer(vocabularies.write_gguf(tmp_path / "a.gguf", fields))
    assert set(vocabulary_of(tokenizer, "hf").files) == {"tokenizer.model", "tokenizer_config.json"}
    assert_alike(read_back(tokenizer, "gguf", tmp_path), tokenizer, vocabularies.TEXT)
