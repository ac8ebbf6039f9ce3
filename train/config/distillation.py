"""`[distillation]`: the teacher of a run, and the divergence from it."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_at_least, check_one_of
from .objective import Objective

DistillationData = Literal["pretrain", "sft"]


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The teacher of `train.objective = "distill"`, and the divergence from its distribution.

    Attributes:
      teacher: the teacher: a path, a run's directory, or a known name. Any architecture and size with the
        run's vocabulary; it is frozen, in the compute dtype, and sharded like the model.
      data: the rows that the divergence is averaged over: those of `pretrain`, or the answers of `sft`.
      on_policy: the student answers prompts, as in reinforcement learning, and learns what the teacher would
        have said in its place (GKD's lambda = 1, with beta 1 for reverse KL). How it samples is in `[rl]`.
      beta: 0 is forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence (GKD, arXiv
        2306.13649).
      temperature: the logits of both models are divided by it.
      top_k: compare the teacher's most likely tokens, and all others as one; 0 compares the whole vocabulary.

    Raises:
      ConfigError: for a value out of range.
    """

    teacher: str = ""
    data: DistillationData = "sft"
    on_policy: bool = False
    beta: float = 0.0
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_one_of("distillation.data", self.data, get_args(DistillationData))
        check_at_least("distillation", self, beta=0, temperature=0, top_k=0)
        if self.beta > 1:
            raise ConfigError(
                f"distillation.beta is {self.beta}; it must be from 0, forward KL, to 1, reverse KL"
            )
        if self.on_policy and self.data != "sft":
            raise ConfigError(
                f'distillation.on_policy is true and distillation.data "{self.data}"; the data are prompts: '
                "leave it out"
            )
        if self.temperature == 0:
            raise ConfigError("distillation.temperature is 0; it must be above 0, such as 1.0")

    def check_objective(self, objective: Objective) -> None:
        """Checks that there is a teacher where one is needed, and no setting where none is.

        Raises:
          ConfigError: naming the setting.
        """
        if objective == "distill":
            if not self.teacher:
                raise ConfigError(
                    'train.objective is "distill" and distillation.teacher is not set; give the path or the '
                    "name of the teacher"
                )
            return
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
                raise ConfigError(
                    f'distillation.{field.name} is {shown} and train.objective "{objective}", which has no '
                    'teacher; it applies to "distill": leave it out'
                )
