"""A tokenizer as files and metadata, so that the writers do not depend on tokenizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer exported for one checkpoint format; empty if there is none.

    Attributes:
      files: file contents by name (tokenizer.json, tokenizer.model, tokenizer_config.json, tokenizer.bin).
      fields: GGUF metadata (tokenizer.ggml.tokens, tokenizer.chat_template, ...).
      bos_id: BOS token id.
      eos_ids: EOS token ids, the vocabulary's own first.
      pad_id: padding token id.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
