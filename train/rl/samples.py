"""What was sampled: a line of JSON for each completion in the run's directory, and completions in color."""

from __future__ import annotations

import dataclasses
import itertools
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
      reward: their weighted sum; None if nothing is rewarded.
      advantages: of its tokens; with GRPO all the same.
      prompt_ids, completion_ids: its tokens.
    """

    step: int
    prompt: Any
    completion: str
    rewards: dict[str, float]
    reward: float | None
    advantages: tuple[float, ...]
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def advantage(self) -> float:
        """The mean over its tokens."""
        return sum(self.advantages) / max(len(self.advantages), 1)

    def as_json(self) -> dict[str, Any]:
        """The line in `samples.jsonl`; null where a function does not apply."""
        fields = {
            "step": self.step,
            "prompt": self.prompt,
            "completion": self.completion,
            "tokens": len(self.completion_ids),
        }
        if self.reward is None:
            return fields
        return fields | {
            "reward": self.reward,
            "advantage": round(self.advantage, 6),
            "rewards": {name: None if math.isnan(x) else x for name, x in self.rewards.items()},
        }


def show_samples(samples: Sequence[SampleRecord], tokenizer: Tokenizer, console: Console) -> None:
    """Prints completions token by token: green ones are made likelier, red ones less likely, prompts are dim.

    Without color, tokens that are made likelier are in ⟦+ ⟧, others in ⟦- ⟧, those whose advantage is 0 in
    ⟦0 ⟧.
    """
    for number, sample in enumerate(samples):
        scores = ", ".join(f"{name} {value:g}" for name, value in sample.rewards.items())
        title = f"completion {number}: "
        if sample.reward is not None:
            title += f"reward {sample.reward:g} ({scores}), advantage {sample.advantage:+.3f}, "
        title += f"{len(sample.completion_ids)} tokens after {len(sample.prompt_ids)}"
        console.print(Text(title), style="bold")
        console.print(_styled(sample, tokenizer, plain=console.color_system is None), soft_wrap=True)


_SHADES = {"+": ("green", "bright_green"), "-": ("red", "bright_red"), "0": ("white", "bright_white")}


def _styled(sample: SampleRecord, tokenizer: Tokenizer, *, plain: bool) -> Text:
    text = Text()
    for token in sample.prompt_ids:
        text.append(_piece(tokenizer, token), "dim")
    signs = ["+" if a > 0 else "-" if a < 0 else "0" for a in sample.advantages]
    for sign, run in itertools.groupby(
        enumerate(zip(sample.completion_ids, signs, strict=True)), lambda x: x[1][1]
    ):
        text.append(f"⟦{sign} " if plain else "")
        for place, (i, (token, _)) in enumerate(run):
            text.append("╎" if plain and place else "")
            text.append(_piece(tokenizer, token), f"underline {_SHADES[sign][i % 2]}")
        text.append("⟧" if plain else "")
    return text


def _piece(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.piece(token)
    return "".join(VISIBLE.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in piece)
