"""By which rule and at which rates a run learns."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import at_least, one_of

Optimizer = Literal["adamw", "muon", "lion", "adafactor"]
Schedule = Literal["cosine", "wsd", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule; the defaults are Llama 2's (arXiv 2307.09288, section 2.2).

    Attributes:
      name: `adamw`, `muon` (matrices by Muon, the rest by AdamW with Nesterov momentum), `lion`, or
        `adafactor`.
      learning_rate: the peak; Adafactor's is a fraction of each tensor's root mean square.
      schedule: `cosine` down to `min_lr_ratio` of the peak; `wsd` (warm-up, stable, decay: linear over
        the last `decay_fraction` of the steps, arXiv 2405.18392); or `constant`.
      schedule_steps: what the schedule is laid out over, whenever the run ends; 0 is `train.steps`. Set it
        where a run is to be lengthened later: the rates of the steps before then stay what they were.
      warmup_steps: linear from 0; never more than the schedule has.
      b1, b2, eps: Adam's; b1 and b2 are Lion's and Muon's too.
      weight_decay: decoupled; not on norm scales.
      max_grad_norm: global norm that gradients are clipped to; 0 is off.
      freeze: patterns of parameters that stay as they are, such as `embed.*`, `layers.attention.*`, `*norm*`.
      layer_decay: each layer learns at this share of the rate of the layer above it, the embedding at that
        of the first layer's (ULMFiT's discriminative rates, arXiv 1801.06146); 1 is one rate for all.
      ema_decay: what is evaluated and saved is a running average of the weights, each step's counting
        1 - ema_decay, more in the first steps: (1 + step) / (10 + step) is the decay while that is less; 0 is
        the weights themselves.
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
        one_of("optimizer.name", self.name, get_args(Optimizer))
        one_of("optimizer.schedule", self.schedule, get_args(Schedule))
        at_least(
            "optimizer",
            self,
            schedule_steps=0,
            warmup_steps=0,
            eps=0,
            weight_decay=0,
            max_grad_norm=0,
            learning_rate=0,
        )
        for name in ("b1", "b2", "ema_decay", "min_lr_ratio", "decay_fraction"):
            value, below = getattr(self, name), name in ("b1", "b2", "ema_decay")
            if not 0 <= value <= 1 or (below and value == 1):
                most = "below 1" if below else "at most 1"
                raise ConfigError(f"optimizer.{name} is {value}; it must be at least 0 and {most}")
