"""The training objectives, and the groups of them that share a data format or a head."""

from __future__ import annotations

from typing import Literal

Objective = Literal[
    "pretrain",
    "sft",
    "dpo",
    "simpo",
    "orpo",
    "kto",
    "distill",
    "reward",
    "classify",
    "regress",
    "grpo",
    "ppo",
]
# Trained on chosen and rejected answers.
PAIR_OBJECTIVES: tuple[Objective, ...] = ("dpo", "simpo", "orpo", "reward")
REFERENCE_OBJECTIVES: tuple[Objective, ...] = ("dpo", "kto")  # beside a reference model, the initial weights
HEAD_OBJECTIVES: tuple[Objective, ...] = ("reward", "classify", "regress")  # a head replaces the LM head
RL_OBJECTIVES: tuple[Objective, ...] = ("grpo", "ppo")  # trained on completions that the model samples
