"""A rollout that is ready to be trained on, and as it is kept in a checkpoint."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .packing import Arrays
from .samples import SampleRecord
from .scoring import Scored


@dataclasses.dataclass(frozen=True)
class Rolled:
    """A rollout.

    Attributes:
      arrays: the rows of its batches.
      metrics: what was measured of it.
      samples: its completions.
      scored: what the trainer's forward pass says of each batch, with the weights that sampled it.
    """

    arrays: Arrays
    metrics: Mapping[str, float]
    samples: Sequence[SampleRecord]
    scored: Sequence[Scored] = ()

    def state(self) -> dict[str, Any]:
        """All but `scored`; JSON-serializable."""
        samples = [dataclasses.asdict(sample) for sample in self.samples]
        for sample in samples:
            sample["rewards"] = {n: None if math.isnan(x) else x for n, x in sample["rewards"].items()}
        metrics = {name: float(x) for name, x in self.metrics.items() if not np.isnan(x)}
        return {"arrays": arrays_as_text(self.arrays), "metrics": metrics, "samples": samples}

    @staticmethod
    def restore(state: Mapping[str, Any]) -> Rolled:
        """From `state()`."""
        samples = []
        for sample in state["samples"]:
            tuples = {n: tuple(sample[n]) for n in ("advantages", "prompt_ids", "completion_ids")}
            rewards = {n: math.nan if x is None else x for n, x in sample["rewards"].items()}
            samples.append(SampleRecord(**{**sample, **tuples, "rewards": rewards}))
        return Rolled(arrays_of_text(state["arrays"]), state["metrics"], samples)


def arrays_as_text(arrays: Arrays) -> str:
    """Arrays in base64."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(buffer.getvalue()).decode()


def arrays_of_text(text: str) -> Arrays:
    """From `arrays_as_text`."""
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return dict(arrays)
