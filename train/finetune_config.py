"""What finetuning adds to a run: adapters in place of all weights, and preferences."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError
from llama_jax.lora import Lora
from train.choices import at_least, one_of
from train.data.forms import Objective
from train.preference import Kind

Reference = Literal["on_the_fly", "precomputed"]
AdapterKind = Literal["none", "lora"]
Base = Literal["auto", "float32", "bfloat16", "int8", "nf4"]

# The objectives that end in a number or class a segment, which a head of their own gives.
HEADS: tuple[Objective, ...] = ("reward", "classify", "regress")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Whether an adapter is trained in place of the weights, and what the frozen base is held in.

    Attributes:
      kind: `none` trains all weights; `lora` low-rank adapters (`rslora` and `dora` vary them).
      rank, alpha, targets, rslora, dora: as in `llama_jax.lora.Lora`.
      base: what the frozen weights are held in: `auto` is the compute dtype; `int8`, or `nf4` for QLoRA.
    """

    kind: AdapterKind = "none"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    rslora: bool = False
    dora: bool = False
    base: Base = "auto"

    def __post_init__(self) -> None:
        one_of("adapter.kind", self.kind, get_args(AdapterKind))
        one_of("adapter.base", self.base, get_args(Base))
        object.__setattr__(self, "targets", tuple(self.targets))
        _ = self.lora
        changed = [
            f.name
            for f in dataclasses.fields(self)
            if f.name != "kind" and getattr(self, f.name) != f.default
        ]
        if self.kind == "none" and changed:
            raise ConfigError(
                f'adapter.{changed[0]} is given and adapter.kind is "none"; set it to "lora", or leave it out'
            )

    @property
    def lora(self) -> Lora:
        """The adapter's settings."""
        return Lora(self.rank, self.alpha, self.targets, self.rslora, self.dora)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How pairs of answers are learned from, by `train.objective = "dpo"`.

    Attributes:
      kind: `sigmoid` is DPO (arXiv 2305.18290), `ipo` is IPO (arXiv 2310.12036).
      beta: how strongly the policy is held to the model that training began with.
      label_smoothing: the share of pairs thought to be labelled the wrong way round: conservative DPO.
      reference: whether each step runs the model that training began with beside the policy, or its
        log-probabilities are `precomputed`: once, of every pair, before the first step.
    """

    kind: Kind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: Reference = "on_the_fly"

    def __post_init__(self) -> None:
        one_of("preference.kind", self.kind, get_args(Kind))
        one_of("preference.reference", self.reference, get_args(Reference))
        at_least("preference", self, beta=0, label_smoothing=0)
        if self.beta == 0:
            raise ConfigError("preference.beta is 0; it must be above 0, such as 0.1")
        if self.label_smoothing >= 0.5:
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}; it must be below 0.5, where chosen "
                "and rejected are the same"
            )
        if self.label_smoothing and self.kind != "sigmoid":
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}, which is for preference.kind "
                '"sigmoid"; leave it out'
            )
