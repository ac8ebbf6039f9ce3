"""`[preference]`: the losses that learn from preferences: DPO, SimPO, ORPO and KTO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_applies, check_at_least, check_one_of
from .objective import REFERENCE_OBJECTIVES, Objective

LossType = Literal["sigmoid", "ipo"]

# The objectives that each setting applies to.
_OBJECTIVES: Mapping[str, tuple[Objective, ...]] = {
    "loss_type": ("dpo",),
    "beta": ("dpo", "simpo", "orpo", "kto"),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "precompute_ref_log_probs": REFERENCE_OBJECTIVES,
}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The losses of `train.objective` `dpo`, `simpo` and `orpo`, of pairs of answers, and `kto`, of labels.

    Attributes:
      loss_type: of `dpo`: `sigmoid` is DPO (arXiv 2305.18290), `ipo` is IPO (arXiv 2310.12036).
      beta: of `dpo` and `kto`, strength of the implicit KL penalty that keeps the policy close to the
        reference model; of `simpo`, scale of the reward (arXiv 2405.14734 used 2.0 to 2.5); of `orpo`, weight
        of the odds ratio (lambda of arXiv 2403.07691).
      label_smoothing: of `dpo` and `simpo`, assumed probability that a pair's labels are swapped
        (conservative DPO); below 0.5.
      simpo_gamma: of `simpo`, the margin by which the chosen answer's reward is to exceed the rejected one's.
      desirable_weight, undesirable_weight: of `kto`, weights of the losses of desirable and of undesirable
        completions; the paper advises to balance weight times number, within 1 : 1 and 4 : 3.
      precompute_ref_log_probs: of `dpo` and `kto`, compute the reference model's log-probabilities of every
        record once, before the first step, instead of running it beside the policy in each step.

    Raises:
      ConfigError: for a value out of range, or label smoothing with another loss than `sigmoid`.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    precompute_ref_log_probs: bool = False

    def __post_init__(self) -> None:
        check_one_of("preference.loss_type", self.loss_type, get_args(LossType))
        check_at_least("preference", self, beta=0, label_smoothing=0, simpo_gamma=0)
        check_at_least("preference", self, desirable_weight=0, undesirable_weight=0)
        if self.beta == 0:
            raise ConfigError("preference.beta is 0; it must be above 0, such as 0.1")
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ConfigError(
                "preference.desirable_weight and preference.undesirable_weight are both 0, which leaves no "
                "loss; raise one of them"
            )
        if self.label_smoothing >= 0.5:
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}; it must be below 0.5, at which "
                "chosen and rejected answers are interchangeable"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}, which applies to "
                'preference.loss_type "sigmoid" only; leave it out'
            )

    def check_objective(self, objective: Objective) -> None:
        """Checks that no setting is set that the objective does not have.

        Raises:
          ConfigError: naming the setting, and the objectives that it applies to.
        """
        reasons = {"precompute_ref_log_probs": ", which has no reference model"}
        check_applies("preference", self, _OBJECTIVES, objective, reasons)
