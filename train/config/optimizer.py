"""`[optimizer]`: the optimizer and its learning-rate schedule."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_at_least, check_one_of

Optimizer = Literal["adamw", "muon", "lion", "adafactor"]
Schedule = Literal["cosine", "wsd", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer; the defaults are Llama 2's (arXiv 2307.09288, section 2.2).

    Attributes:
      name: `adamw`, `muon` (Muon for matrices, AdamW with Nesterov momentum for the rest), `lion`, or
        `adafactor`.
      learning_rate: the peak; Adafactor's is a fraction of each tensor's root mean square.
      schedule: `cosine` down to `min_lr_ratio` of the peak; `wsd` (warmup, stable, decay: linear over
        the last `decay_fraction` of the steps, arXiv 2405.18392); or `constant`.
      schedule_steps: length of the schedule, independent of when the run ends; 0 is `train.steps`. Set it if
        the run may be extended later: the learning rates of earlier steps then stay the same.
      warmup_steps: steps of linear warmup from 0, at most the length of the schedule.
      min_lr_ratio: final learning rate of `cosine` and `wsd`, as a fraction of the peak.
      decay_fraction: fraction of the steps over which `wsd` decays.
      b1, b2, eps: Adam's; b1 and b2 are also Lion's and Muon's.
      weight_decay: decoupled; not applied to norm scales and biases.
      max_grad_norm: global norm to which gradients are clipped; 0 is off.
      freeze: glob patterns of parameters to freeze, such as `embed.*`, `layers.attention.*`, `*norm*`.
      layer_decay: layer-wise learning-rate decay: each layer's learning rate is this factor times that of the
        layer above it, the embedding's this factor times the first layer's (ULMFiT's discriminative
        finetuning, arXiv 1801.06146); 1 is off.
      ema_decay: decay of an exponential moving average of the weights, which is what is evaluated and saved;
        in the first steps (1 + step) / (10 + step) is the decay while that is smaller. 0 is off.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    name: Optimizer = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    schedule_steps: int = 0
    warmup_steps: int = 2000
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", tuple(self.freeze))
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optimizer.layer_decay is {self.layer_decay}; it must be above 0, at most 1")
        check_one_of("optimizer.name", self.name, get_args(Optimizer))
        check_one_of("optimizer.schedule", self.schedule, get_args(Schedule))
        check_at_least("optimizer", self, schedule_steps=0, warmup_steps=0, eps=0, weight_decay=0)
        check_at_least("optimizer", self, max_grad_norm=0, learning_rate=0)
        for name in ("b1", "b2", "ema_decay", "min_lr_ratio", "decay_fraction"):
            value, excludes_one = getattr(self, name), name in ("b1", "b2", "ema_decay")
            if not 0 <= value <= 1 or (excludes_one and value == 1):
                limit = "below 1" if excludes_one else "at most 1"
                raise ConfigError(f"optimizer.{name} is {value}; it must be at least 0 and {limit}")
