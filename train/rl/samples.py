"""What was sampled: a line of JSON for each completion in the run's directory, and completions in color."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from llama_jax.tokenizer import Tokenizer

from ..data.show import VISIBLE

SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class SampleRecord:
    """One completion.

    Attributes:
      step: the first step that trains on it.
      prompt: a text, or messages.
      completion: its text.
      rewards: by function; NaN where one does not apply.
      reward: their weighted sum.
      advantage: of all its tokens.
      prompt_ids, completion_ids: its tokens.
    """

    step: int
    prompt: Any
    completion: str
    rewards: dict[str, float]
    reward: float
    advantage: float
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The line in `samples.jsonl`; null where a function does not apply."""
        return {
            "step": self.step,
            "prompt": self.prompt,
            "completion": self.completion,
            "tokens": len(self.completion_ids),
            "reward": self.reward,
            "advantage": round(self.advantage, 6),
            "rewards": {name: None if math.isnan(x) else x for name, x in self.rewards.items()},
        }


def show_samples(samples: Sequence[SampleRecord], tokenizer: Tokenizer, console: Console) -> None:
    """Prints completions token by token: green ones are made likelier, red ones less likely, prompts are dim.

    Without color, the tokens of completions that are made likelier are in ⟦+ ⟧, the others in ⟦- ⟧; a
    completion whose advantage is 0 is in ⟦0 ⟧.
    """
    for number, sample in enumerate(samples):
        scores = ", ".join(f"{name} {value:g}" for name, value in sample.rewards.items())
        title = f"completion {number}: reward {sample.reward:g} ({scores}), advantage {sample.advantage:+.3f}"
        title += f", {len(sample.completion_ids)} tokens after {len(sample.prompt_ids)}"
        console.print(Text(title), style="bold")
        console.print(_styled(sample, tokenizer, plain=console.color_system is None), soft_wrap=True)


def _styled(sample: SampleRecord, tokenizer: Tokenizer, *, plain: bool) -> Text:
    sign = "+" if sample.advantage > 0 else "-" if sample.advantage < 0 else "0"
    shades = {"+": ("green", "bright_green"), "-": ("red", "bright_red"), "0": ("white", "bright_white")}[
        sign
    ]
    text = Text()
    for token in sample.prompt_ids:
        text.append(_piece(tokenizer, token), "dim")
    if plain:
        text.append(f"⟦{sign} ")
    for i, token in enumerate(sample.completion_ids):
        text.append("╎" if plain and i else "")
        text.append(_piece(tokenizer, token), f"underline {shades[i % 2]}")
    return text.append("⟧" if plain else "")


def _piece(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.piece(token)
    return "".join(VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in piece)
