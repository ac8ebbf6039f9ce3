"""Reads a checkpoint here and with its own program, and compares what they say."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llama_jax as lj
from llama_jax.chat import chat_template, encode_chat
from tests.golden.cases import relative_error
from tests.parity.compatibility.references import Messages, Reference
from tests.parity.compatibility.variants import PROMPT, Variant
from tests.tokenizer import corpus, vocabularies

NEW_TOKENS = 12
TOLERANCE = 2e-5  # of logits, relative to the largest
CONVERSATION: Messages = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  hello world, 2 + 2?\n"},
    {"role": "assistant", "content": "4 — naïve"},
    {"role": "user", "content": "the other thing"},
]
LINES = [
    *vocabularies.TEXT,
    *(line for line in corpus.lines()[::60] if line.strip()),
    "hello world and hello  world, the cat; cat's catcat thing  thing over  over the other",
    "x<s>the</s> <s> the </s>x",
    "<|im_start|>user\nhi<|im_end|>\n <|im_end|> x",
    " leading",
    "trailing ",
    "   ",
    "a\n\n\nb",
    "\ttab",
    "ﬁne ＡＢ e\u0301 \u00a0x",
]
_FORWARD: dict[lj.LlamaConfig, Any] = {}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours beside the reference.

    Attributes:
      program: the reference.
      lines: the texts whose ids differ.
      error: the greatest difference of logits, relative to the largest.
      text, reference_text: the greedy continuations.
      chat: whether a conversation's ids are the same; None without a template.
    """

    program: str
    lines: tuple[str, ...]
    error: float
    text: str
    reference_text: str
    chat: bool | None

    @property
    def same(self) -> bool:
        """Whether nothing differs beyond rounding."""
        return (
            not self.lines
            and self.error <= TOLERANCE
            and self.text == self.reference_text
            and self.chat is not False
        )


def compare(variant: Variant) -> Comparison:
    """Makes the checkpoint in a temporary folder, reads it twice, and compares."""
    with tempfile.TemporaryDirectory() as folder:
        made = variant.make(Path(folder))
        model = lj.load(made.path, adapter=made.adapter)
        return _compare(model, made.reference)


def _compare(model: lj.Model, theirs: Reference) -> Comparison:
    ids = theirs.encode(LINES[0])
    error = relative_error(_logits(model, ids), theirs.logits(ids))
    chat = None
    if theirs.chat:
        chat = encode_chat(model.tokenizer, chat_template(model.tokenizer), CONVERSATION) == theirs.chat(
            CONVERSATION
        )
    return Comparison(
        theirs.program,
        tuple(
            line
            for line in LINES
            if model.encode_prompt(line, parse_special=theirs.parses_special) != theirs.encode(line)
        ),
        float(error),
        model.generate(PROMPT, max_new_tokens=NEW_TOKENS),
        _continuation(theirs),
        chat,
    )


def _logits(model: lj.Model, ids: list[int]) -> np.ndarray:
    """f32 [T, V]; padded, so that texts of every length share a program."""
    forward = _FORWARD.setdefault(model.config, jax.jit(partial(lj.forward, model.config)))
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(forward(model.params, tokens))[0, : len(ids)]


def _continuation(theirs: Reference) -> str:
    """The text that the new tokens add to the prompt's."""
    prompt = theirs.encode(PROMPT)
    whole = theirs.decode(prompt + theirs.generate(prompt, NEW_TOKENS))
    return whole.removeprefix(theirs.decode(prompt))
