"""Vocabularies in GGUF files: ids equal to the source vocabulary's, pre-tokenizers, invalid files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.byte_level import BYTE_OF
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.tokenizer import vocabularies
from tests.tokenizer.test_sentencepiece_model import goldens

SPM = vocabularies.spm_fields(vocabularies.sentencepiece_model())
BPE = vocabularies.bpe_fields(vocabularies.byte_level_json())


def load(directory: Path, fields: dict[str, Any], **changes: Any) -> Tokenizer:
    return load_tokenizer(vocabularies.write_gguf(directory / "model.gguf", fields | changes))


def test_llama2_golden_tokenizations(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load(
        tmp_path, vocabularies.spm_fields((shared_data / "llama2" / "tokenizer.model").read_bytes())
    )
    for text, ids in goldens(shared_data):
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text


def test_special_tokens_and_chat_template(by_kind: dict[str, Tokenizer]) -> None:
    spm, bpe = by_kind["gguf-spm"], by_kind["gguf-bpe"]
    assert (spm.bos_id, spm.eos_id, spm.unk_id, spm.pad_id, spm.add_bos) == (1, 2, 0, None, True)
    assert (bpe.bos_id, bpe.eos_id, bpe.unk_id, bpe.add_bos) == (
        None,
        bpe.special_tokens["<|im_end|>"],
        None,
        False,
    )
    assert spm.chat_template == bpe.chat_template == vocabularies.TEMPLATE


def test_flags_override_the_defaults(tmp_path: Path) -> None:
    assert not load(tmp_path, SPM, add_bos_token=False).add_bos
    assert load(tmp_path, BPE, bos_token_id=0, add_bos_token=True).encode("fox")[0] == 0
    assert load(tmp_path, BPE, bos_token_id=0, pre="llama-bpe").add_bos
    plain = load(tmp_path, SPM, add_space_prefix=False)
    the = SPM["tokens"].index("\u2581the")
    assert plain.encode(" the", add_bos=False) == [the] == load(tmp_path, SPM).encode("the", add_bos=False)
    assert plain.decode([the]) == " the"


def test_absent_special_tokens_have_llama_cpps_defaults(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, SPM, bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)


def test_minus_one_means_undefined(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, SPM, padding_token_id=2**32 - 1, bos_token_id=2**32 - 1)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.add_bos) == (None, None, False)


def test_normalization(tmp_path: Path) -> None:
    trimmed = load(tmp_path, SPM, remove_extra_whitespaces=True)
    assert trimmed.encode("  the   fox ") == load(tmp_path, SPM).encode("the fox")
    composed, decomposed = "\u00e9", "e\u0301"
    qwen2 = load(tmp_path, BPE, pre="qwen2")  # normalizes to NFC, like its models' tokenizer.json
    assert qwen2.encode(composed) == qwen2.encode(decomposed)
    gpt2 = load(tmp_path, BPE)
    assert gpt2.encode(composed) != gpt2.encode(decomposed)


def test_eot_and_eom_are_end_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, SPM, eot_token_id=300, eom_token_id=301)
    assert tokenizer.eos_ids == (2, 300, 301)


def test_special_ids_are_control_tokens(tmp_path: Path) -> None:
    """Old files do not mark control tokens, but text must still not encode to EOS."""
    for fields in (SPM, BPE):
        kinds = [6 if kind == 6 else 2 if kind == 2 else 1 for kind in fields["token_type"]]
        tokenizer = load(tmp_path, fields, token_type=kinds)
        name = next(name for name, token in tokenizer.special_tokens.items() if token == tokenizer.eos_id)
        assert tokenizer.eos_id not in tokenizer.encode(name)
        assert tokenizer.encode(name, add_bos=False, parse_special=True) == [tokenizer.eos_id]


def test_user_defined_tokens_are_never_split(by_kind: dict[str, Tokenizer]) -> None:
    for kind in ("gguf-bpe", "json-bpe"):
        tokenizer = by_kind[kind]
        ids = tokenizer.encode("fox<think here>é")
        assert BPE["tokens"].index("<think here>") in ids
        assert tokenizer.decode(ids) == "fox<think here>é"


SPLITS = {
    "gpt-2": ["I", "'m", " 1234", "  ", " aé", "!?", "\n", "\n", "x"],
    "smollm": ["I", "'m", " ", "1", "2", "3", "4", "  ", " aé", "!?", "\n", "\n", "x"],
    "llama-bpe": ["I", "'m", " ", "123", "4", "  ", " aé", "!?\n\n", "x"],
    "qwen2": ["I", "'m", " ", "1", "2", "3", "4", "  ", " aé", "!?\n\n", "x"],
    "default": ["I", "'", "m", " ", "123", "4", "  ", " aé", "!?", "\n", "\n", "x"],
}

WORDS = "I'm fooBar 1234   é!?\n\n你"
OTHER_SPLITS = {
    "tekken": ["I", "'m", " foo", "Bar", " ", "1", "2", "3", "4", "  ", " é", "!?\n\n", "你"],
    "gpt-4o": ["I'm", " foo", "Bar", " ", "123", "4", "  ", " é", "!?\n\n", "你"],
    "deepseek-llm": ["I", "'", "m", " fooBar", " ", "1234", "  ", " é", "!?", "\n", "\n", "你"],
    "deepseek-coder": [*("I", "'", "m", " fooBar", " ", *"1234", "  ", " é", "!?", "\n", "\n", "你")],
    "deepseek-v3": ["I", "'m", " fooBar", " ", "123", "4", "  ", " é", "!?\n\n", "你"],
    "falcon": ["I", "'", "m", " fooBar", " ", "123", "4", "  ", " é", "!?", "\n", "\n", "你"],
    "viking": ["I'm", " fooBar", " ", "1", "2", "3", "4", "  ", " é", "!?\n\n", "你"],
    "superbpe": ["I'm fooBar ", "1", "234", "   é!?\n\n你"],
    "seed-coder": ["I", "'m", " fooBar", " ", "1", "2", "3", "4", "  ", " é", "!?", "\n\n", "你"],
}


@pytest.mark.parametrize("name", OTHER_SPLITS)
def test_splits_of_other_vocabularies(name: str) -> None:
    pieces = [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str(WORDS)]
    assert [bytes(BYTE_OF[c] for c in piece).decode() for piece in pieces] == OTHER_SPLITS[name]


@pytest.mark.parametrize("name", SPLITS)
def test_splits_of_each_pre_tokenizer(name: str) -> None:
    pieces = [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str("I'm 1234   aé!?\n\nx")]
    assert [bytes(BYTE_OF[c] for c in piece).decode() for piece in pieces] == SPLITS[name]


def test_aliases_of_pre_tokenizers() -> None:
    assert PRE_TOKENIZERS["smollm"] is PRE_TOKENIZERS["starcoder"] is PRE_TOKENIZERS["refact"]
    assert PRE_TOKENIZERS["llama-bpe"] is PRE_TOKENIZERS["llama-v3"] is PRE_TOKENIZERS["llama3"]


def test_byte_alphabet() -> None:
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert (BYTE_OF["Ġ"], BYTE_OF["Ċ"], BYTE_OF["a"], BYTE_OF["Ń"]) == (ord(" "), ord("\n"), ord("a"), 0xAD)


def test_ignore_merges(tmp_path: Path) -> None:
    tokens = [*BPE["tokens"], "zqzq"]
    fields = {"tokens": tokens, "token_type": [*BPE["token_type"], 1]}
    assert load(tmp_path, BPE, **fields, pre="llama-bpe").encode("zqzq") == [tokens.index("zqzq")]
    assert len(load(tmp_path, BPE, **fields).encode("zqzq")) == 4


def without(fields: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in keys}


DUPLICATE = [*SPM["tokens"][:-1], SPM["tokens"][-2]]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({}, "has no vocabulary; give the model's own with tokenizer"),
    "other kind": (SPM | {"model": "bert"}, "tokenizer.ggml.model is 'bert'; llama_jax supports 'llama'"),
    "model of another type": (SPM | {"model": 7}, "tokenizer.ggml.model is '7'"),
    "no tokens": (without(SPM, "tokens"), "tokenizer.ggml.tokens is missing"),
    "tokens of another type": (SPM | {"tokens": [1, 2]}, "tokenizer.ggml.tokens is not a list of strings"),
    "no scores": (without(SPM, "scores"), "tokenizer.ggml.scores is missing"),
    "scores of another type": (
        SPM | {"scores": SPM["token_type"]},
        "scores is not an array of floats",
    ),
    "few scores": (SPM | {"scores": SPM["scores"][:-1]}, "scores has 339 entries for 340 tokens"),
    "score not finite": (
        SPM | {"scores": [float("nan"), *SPM["scores"][1:]]},
        "scores contains a value that is not finite",
    ),
    "few types": (SPM | {"token_type": SPM["token_type"][:-3]}, "token_type has 337 entries for 340 tokens"),
    "unknown type": (
        SPM | {"token_type": [9, *SPM["token_type"][1:]]},
        "token_type contains 9; the types are 1 to 6",
    ),
    "piece twice": (SPM | {"tokens": DUPLICATE}, "tokenizer.ggml.tokens contains '"),
    "eos out of range": (
        SPM | {"eos_token_id": 340},
        "eos_token_id is 340, but the vocabulary's 340 ids run from 0 to 339",
    ),
    "bos out of range": (
        BPE | {"bos_token_id": 2**32 - 2},
        "bos_token_id is 4294967294, but the vocabulary's",
    ),
    "eos of another type": (SPM | {"eos_token_id": "2"}, "eos_token_id is 2; it must be an integer"),
    "flag of another type": (SPM | {"add_bos_token": "yes"}, "add_bos_token is yes; it must be a bool"),
    "bytes missing": (
        SPM | {"token_type": [*SPM["token_type"][:9], 1, *SPM["token_type"][10:]]},
        "no valid Sentence",
    ),
    "unknown pre": (
        BPE | {"pre": "viking-2"},
        "tokenizer.ggml.pre is 'viking-2', an unknown pre-tokenizer",
    ),
    "pre of another type": (BPE | {"pre": 3}, "tokenizer.ggml.pre is '3'"),
    "no merges": (without(BPE, "merges"), "tokenizer.ggml.merges is missing"),
    "merge of one": (
        BPE | {"merges": ["ab", *BPE["merges"]]},
        "merges entry 0 is 'ab', which is not two pieces",
    ),
    "merge of three": (BPE | {"merges": ["a b c"]}, "merges entry 0 is 'a b c', which is not two pieces"),
    "merge of unknown pieces": (
        BPE | {"merges": ["zq zq"]},
        "tokenizer.ggml.merges cannot be used (Error while initializing BPE: Token `zq`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_incomplete_and_inconsistent_files(tmp_path: Path, case: str) -> None:
    fields, reason = BAD[case]
    path = vocabularies.write_gguf(tmp_path / "model.gguf", fields)
    with pytest.raises(TokenizerError) as raised:
        load_tokenizer(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert reason in message
    assert "\n" not in message


def test_absent_pre_tokenizer_is_default(tmp_path: Path) -> None:
    text = "I'm 1234   aé!?\n\nx"
    assert load(tmp_path, without(BPE, "pre")).encode(text) == load(tmp_path, BPE, pre="default").encode(text)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(8), b"{}", b"GGUF\3\0\0\0" + b"\xff" * 16])
def test_files_that_are_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"model\.gguf") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


def test_truncated_files(tmp_path: Path) -> None:
    path = vocabularies.write_gguf(tmp_path / "model.gguf", SPM)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(TokenizerError, match=r"model\.gguf") as raised:
            load_tokenizer(path)
        assert "\n" not in str(raised.value)


def test_vocabulary_of_another_architecture(tmp_path: Path) -> None:
    """Only the vocabulary is read, whatever the model's architecture."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    for key in ("tokens", "scores", "token_type"):
        writer.add_array(f"tokenizer.ggml.{key}", SPM[key])
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert load_tokenizer(tmp_path / "model.gguf").vocab_size == 340
