"""A tokenizer as an output holds it, in plain bytes: writers know nothing of tokenizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What an output of one format says of its tokenizer; empty where there is none.

    Attributes:
      files: whole files by name (tokenizer.json, tokenizer.model, tokenizer_config.json, tokenizer.bin).
      fields: GGUF's metadata (tokenizer.ggml.tokens, tokenizer.chat_template, ...).
      bos_id: the token that begins a text.
      eos_ids: those that end one, the vocabulary's own first.
      pad_id: what pads one.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
