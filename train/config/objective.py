"""The training objectives, and the groups of them that share a data format or a head."""

from __future__ import annotations

from typing import Literal

Objective = Literal["pretrain", "sft", "dpo", "reward", "classify", "regress", "grpo"]
PAIR_OBJECTIVES: tuple[Objective, ...] = ("dpo", "reward")  # trained on chosen and rejected answers
HEAD_OBJECTIVES: tuple[Objective, ...] = ("reward", "classify", "regress")  # a head replaces the LM head
RL_OBJECTIVES: tuple[Objective, ...] = ("grpo",)  # trained on completions that the model samples
