"""The objectives that a run can have, and the losses of preference training."""

from __future__ import annotations

from typing import Literal

Objective = Literal["pretrain", "sft", "dpo", "reward", "classify", "regress"]
PAIRS: tuple[Objective, ...] = ("dpo", "reward")

# Losses of `dpo`: sigmoid (arXiv 2305.18290) and IPO (arXiv 2310.12036).
LossType = Literal["sigmoid", "ipo"]
