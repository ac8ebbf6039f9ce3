"""`[log]`: where metrics are reported."""

from __future__ import annotations

import dataclasses

from .checks import check_at_least


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often metrics are logged, and to which trackers besides `metrics.jsonl`.

    Attributes:
      every: steps between lines of `metrics.jsonl`; each line aggregates the steps since the line before.
      tensorboard: also write TensorBoard event files, to `tensorboard/` in the run directory; to view them:
        `pip install tensorboard`, then `tensorboard --logdir RUN`.
      wandb: a Weights & Biases project to log to (needs the `wandb` extra); empty for none.
      plot: plot the losses to `loss.png` in the run directory at the end (needs the `plot` extra).

    Raises:
      ConfigError: if every is not positive.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    plot: bool = True

    def __post_init__(self) -> None:
        check_at_least("log", self, every=1)
