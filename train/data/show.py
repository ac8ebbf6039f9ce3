"""A batch shown token by token: what a model is given, and what it is to learn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.text import Text

from llama_jax.tokenizer import Tokenizer

_SHOWN = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}  # what the eye takes for a space or for nothing


def show_batch(batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, console: Console) -> None:
    """Prints the rows of a batch, segment by segment.

    Learned tokens are green and underlined, in two shades so that one can be told from the next; what is
    given is dim; control tokens are reversed. Without colour the learned ones stand in ⟦brackets⟧, with a
    stroke between any two tokens.

    Args:
      batch: `tokens`, `segment_ids`, int [B, T], and, but for pretraining, `mask` and `value`.
      tokenizer: of the model.
      console: where to.
    """
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    learned = np.asarray(batch.get("mask", segments > 0)) > 0
    learned &= (np.diff(segments, prepend=0) == 0) | ("mask" in batch)  # nothing predicts a segment's first
    values = np.asarray(batch["value"]) if "value" in batch else None
    for row, ids in enumerate(segments):
        counted = f"{int((ids > 0).sum())} tokens, {int(learned[row].sum())} learned"
        console.print(
            Text(
                f"row {row}: {int(ids.max(initial=0))} segments, {counted}, {int((ids == 0).sum())} padding"
            ),
            style="bold",
        )
        for segment in range(1, int(ids.max(initial=0)) + 1):
            at = np.flatnonzero(ids == segment)
            value = f", value {values[row, at[-1]]:g}" if values is not None and values[row, at[-1]] else ""
            counted = f"{len(at)} tokens, {int(learned[row, at].sum())} learned"
            console.print(Text(f"  segment {segment}: {counted}{value}"), style="cyan")
            console.print(
                _text(tokens[row, at].tolist(), learned[row, at].tolist(), tokenizer, console), soft_wrap=True
            )


def _text(ids: list[int], learned: list[bool], tokenizer: Tokenizer, console: Console) -> Text:
    control = frozenset(tokenizer.special_tokens.values())
    plain = console.color_system is None
    text = Text()
    for i, (token, learn) in enumerate(zip(ids, learned, strict=True)):
        before = i and learned[i - 1]
        if plain:
            text.append("⟦" if learn and not before else "⟧" if before and not learn else "|" if i else "")
        piece = "".join(
            _SHOWN.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in tokenizer.piece(token)
        )
        style = f"underline {'green' if i % 2 else 'bright_green'}" if learn else "dim"
        text.append(piece, f"{style} reverse" if token in control else style)
    if plain and learned and learned[-1]:
        text.append("⟧")
    return text
