"""The output of --show-batch: every token once, with the ones that are trained on marked."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.train.data import show_batch


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def shown(batch, tokenizer, objective="sft", **settings) -> str:
    file = io.StringIO()
    show_batch(batch, tokenizer, Console(file=file, width=80, **settings), objective)
    return file.getvalue()


@pytest.fixture(scope="module")
def batch(smollm2_vocabulary):
    one = smollm2_vocabulary.encode("<|im_start|>a\n b<|im_end|>\n", parse_special=True)
    two = smollm2_vocabulary.encode(" [bold]x é", parse_special=True)
    length = len(one) + len(two) + 3
    arrays = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segment_ids", "mask")}
    arrays["tokens"][0, :-3] = one + two
    arrays["segment_ids"][0, :-3] = [1] * len(one) + [2] * len(two)
    arrays["mask"][0, [3, 4, length - 4]] = 1
    arrays["value"] = np.zeros((1, length), np.float32)
    arrays["value"][0, length - 4] = -1.5
    return arrays


def test_without_color_trained_tokens_are_in_brackets(batch, smollm2_vocabulary):
    lines = shown(batch, smollm2_vocabulary, color_system=None).splitlines()
    assert lines[0] == f"row 0: 2 segments, {batch['tokens'].size - 3} tokens, 3 trained on, 3 padding"
    assert lines[1] == "  segment 1: 6 tokens, 2 trained on"
    assert lines[2:5] == ["<|im_start|>╎a╎↵", "⟦ b╎<|im_end|>⟧↵", ""]
    assert lines[5].startswith("  segment 2, value -1.5: ") and lines[5].endswith("1 trained on")
    assert lines[6] == " [╎bold╎]╎x⟦ é⟧"


def test_pairs_are_named(batch, smollm2_vocabulary):
    lines = shown(batch, smollm2_vocabulary, "dpo", color_system=None).splitlines()
    assert lines[1] == "  pair 1, chosen: 6 tokens, 2 trained on"
    assert lines[5].startswith("  pair 1, rejected, value -1.5: ")


def test_labels_are_named_and_the_mismatched_completion_is_not_trained_on(batch, smollm2_vocabulary):
    lines = shown(batch, smollm2_vocabulary, "kto", color_system=None).splitlines()
    assert lines[0].endswith("2 trained on, 3 padding")
    assert lines[1] == "  example 1, undesirable: 6 tokens, 2 trained on"
    assert lines[5].startswith("  example 1, mismatched, for the KL estimate: ")
    assert lines[5].endswith("0 trained on")


def test_with_color_trained_tokens_are_underlined(batch, smollm2_vocabulary):
    text = shown(batch, smollm2_vocabulary, force_terminal=True, color_system="standard")
    assert "\x1b[4;32m b\x1b[0m" in text
    assert "⟦" not in text
    assert "\x1b[2ma\x1b[0m" in text


def test_pretraining_trains_on_all_but_the_first_token_of_each_segment(batch, smollm2_vocabulary):
    plain = {name: batch[name] for name in ("tokens", "segment_ids")}
    lines = shown(plain, smollm2_vocabulary, color_system=None).splitlines()
    assert lines[1] == "  segment 1: 6 tokens, 5 trained on"
    assert lines[2] == "<|im_start|>⟦a╎↵"
