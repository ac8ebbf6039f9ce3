"""Prints a batch token by token, and marks the tokens that are trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.text import Text

from llama_jax.tokenizer import Tokenizer

from ..config.objective import PAIR_OBJECTIVES, Objective

_SEPARATOR = "╎"  # rare in texts, unlike |
VISIBLE = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}  # replacements for invisible characters


def show_batch(
    batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, console: Console, objective: Objective = "sft"
) -> None:
    """Prints the rows of a batch, segment by segment.

    Tokens that are trained on are green and underlined, in two alternating shades; the others are dim;
    control tokens are reversed. Without color, tokens that are trained on are in ⟦brackets⟧, and ╎
    separates tokens.

    Args:
      batch: `tokens`, `segment_ids`, int [B, T], and for finetuning `mask` and `value`.
      tokenizer: the model's.
      console: the output.
      objective: the run's.
    """
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    trained = np.asarray(batch.get("mask", segments > 0)) > 0
    trained &= (np.diff(segments, prepend=0) == 0) | (
        "mask" in batch
    )  # the first token of a segment is not predicted
    if objective == "kto":
        trained &= segments % 2 == 1
    values = np.asarray(batch["value"]) if "value" in batch else None
    for row, ids in enumerate(segments):
        counts = f"{int((ids > 0).sum())} tokens, {int(trained[row].sum())} trained on"
        console.print(
            Text(f"row {row}: {int(ids.max(initial=0))} segments, {counts}, {int((ids == 0).sum())} padding"),
            style="bold",
        )
        for segment in range(1, int(ids.max(initial=0)) + 1):
            index = np.flatnonzero(ids == segment)
            value = 0.0 if values is None else float(values[row, index[-1]])
            counts = f"{len(index)} tokens, {int(trained[row, index].sum())} trained on"
            console.print(Text(f"  {_title(objective, segment, value)}: {counts}"), style="cyan")
            console.print(
                _styled_tokens(tokens[row, index].tolist(), trained[row, index].tolist(), tokenizer, console),
                soft_wrap=True,
            )


def _title(objective: Objective, segment: int, value: float) -> str:
    """What a segment is, with its value."""
    number, is_first = (segment + 1) // 2, segment % 2 == 1
    if objective == "kto":
        label = "desirable" if value else "undesirable"
        return f"example {number}, {label if is_first else 'mismatched, for the KL estimate'}"
    title = f"segment {segment}"
    if objective in PAIR_OBJECTIVES:
        title = f"pair {number}, {'chosen' if is_first else 'rejected'}"
    return f"{title}, value {value:g}" if value else title


def _styled_tokens(ids: list[int], trained: list[bool], tokenizer: Tokenizer, console: Console) -> Text:
    control = frozenset(tokenizer.special_tokens.values())
    plain = console.color_system is None
    text = Text()
    for i, (token, train) in enumerate(zip(ids, trained, strict=True)):
        previous = i and trained[i - 1]
        if plain:
            text.append(
                "⟦" if train and not previous else "⟧" if previous and not train else _SEPARATOR if i else ""
            )
        piece = "".join(
            VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in tokenizer.piece(token)
        )
        style = f"underline {'green' if i % 2 else 'bright_green'}" if train else "dim"
        text.append(piece, f"{style} reverse" if token in control else style)
    if plain and trained and trained[-1]:
        text.append("⟧")
    return text
