"""On-policy distillation: rows of a student's own completions, which a teacher judges token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..config.run import RunConfig
from ..step import StepMetrics
from ..trainable import Trainable
from . import packing
from .rolled import Rolled
from .rollouts import Rollouts
from .samples import SampleRecord


class StudentRollouts(Rollouts):
    """Completions without rewards; their rows are those of supervised finetuning."""

    def updated(self, seconds: float, metrics: StepMetrics) -> None:
        tokens = float(metrics.tokens)
        self._measure({"update_seconds": seconds, "update_tokens_per_second": tokens / seconds})

    def evaluate(self, trainable: Any) -> dict[str, float]:
        """Nothing: the validation prompts have no answers."""
        del trainable
        return {}

    def _roll(self, trainable: Trainable, key: jax.Array, step: int) -> Callable[[], Rolled]:
        prompts, rows = self._next_prompts()
        sampled, measured = self._sample(trainable, prompts, rows, key)
        arrays = packing.pack([row.ids for row in rows], sampled, self._run.train.seq_len)
        arrays["value"] = np.zeros(arrays["tokens"].shape, np.float32)  # a field of examples, unused
        completions = [tokens[:n].tolist() for tokens, n in zip(sampled.tokens, sampled.lengths, strict=True)]
        samples = [
            SampleRecord(
                step=step + 1,
                prompt=row.prompt,
                completion=self._judge.text(row.ids, tokens),
                rewards={},
                reward=None,
                advantages=(0.0,) * len(tokens),
                prompt_ids=row.ids,
                completion_ids=tuple(tokens),
            )
            for row, tokens in zip(rows, completions, strict=True)
        ]
        return lambda: Rolled(arrays, measured, samples)


def rollouts_of(run: RunConfig) -> type[Rollouts]:
    """The class of a run's rollouts."""
    return StudentRollouts if run.distillation.on_policy else Rollouts
