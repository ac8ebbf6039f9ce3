"""What finetuning adds to a run: adapters in place of all weights, and preferences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from llama_jax.adapters import Settings
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.errors import ConfigError

from .checks import at_least, one_of
from .objective import LossType, Objective

AdapterType = Literal["none", "lora", "bottleneck", "prefix"]
Base = Literal["auto", "float32", "bfloat16", "int8", "nf4"]

# The objectives that end in a number or class a segment, which a head of their own gives.
HEADS: tuple[Objective, ...] = ("reward", "classify", "regress")
# What is said of each kind of adapter, beside `kind` and `base`.
_OWN: Mapping[AdapterType, tuple[str, ...]] = {
    "none": (),
    "lora": ("rank", "alpha", "target_modules", "rslora", "dora"),
    "bottleneck": ("bottleneck_size", "target_modules"),
    "prefix": ("prefix_length",),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Whether an adapter is trained in place of the weights, and what the frozen base is held in.

    Attributes:
      type: `none` trains all weights; `lora` low-rank adapters (`rslora` and `dora` vary them); `bottleneck`
        small networks behind attention and feed-forward; `prefix` keys and values before those of the text.
      rank, alpha, target_modules, rslora, dora: as in `llama_jax.adapters.lora.Lora`; `target_modules` of a bottleneck, as there.
      bottleneck_size: as `size` in `llama_jax.adapters.bottleneck.Bottleneck`.
      prefix_length: as `length` in `llama_jax.adapters.prefix.Prefix`.
      base: what the frozen weights are held in: `auto` is the compute dtype; `int8`, or `nf4` for QLoRA.
    """

    type: AdapterType = "none"
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("*",)
    rslora: bool = False
    dora: bool = False
    bottleneck_size: int = 64
    prefix_length: int = 16
    base: Base = "auto"

    def __post_init__(self) -> None:
        one_of("adapter.type", self.type, get_args(AdapterType))
        one_of("adapter.base", self.base, get_args(Base))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        fits = {"type", *_OWN[self.type], *(() if self.type == "none" else ("base",))}
        for field in dataclasses.fields(self):
            if field.name in fits or getattr(self, field.name) == field.default:
                continue
            kinds = [kind for kind, own in _OWN.items() if kind != "none" and field.name in (*own, "base")]
            raise ConfigError(
                f'adapter.{field.name} is given and adapter.type is "{self.type}"; it is for '
                f"{' or '.join(kinds)}: set that, or leave it out"
            )
        _ = self.settings

    @property
    def settings(self) -> Settings | None:
        """The adapter's settings; None where all weights are trained."""
        match self.type:
            case "none":
                return None
            case "lora":
                return Lora(self.rank, self.alpha, self.target_modules, self.rslora, self.dora)
            case "bottleneck":
                return Bottleneck(self.bottleneck_size, self.target_modules)
            case "prefix":
                return Prefix(self.prefix_length)


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How pairs of answers are learned from, by `train.objective = "dpo"`.

    Attributes:
      loss_type: `sigmoid` is DPO (arXiv 2305.18290), `ipo` is IPO (arXiv 2310.12036).
      beta: how strongly the policy is held to the model that training began with.
      label_smoothing: the share of pairs thought to be labelled the wrong way round: conservative DPO.
      precompute_ref_log_probs: compute the reference model's log-probabilities of every pair once, before the
        first step, instead of running it beside the policy in each step.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    precompute_ref_log_probs: bool = False

    def __post_init__(self) -> None:
        one_of("preference.loss_type", self.loss_type, get_args(LossType))
        at_least("preference", self, beta=0, label_smoothing=0)
        if self.beta == 0:
            raise ConfigError("preference.beta is 0; it must be above 0, such as 0.1")
        if self.label_smoothing >= 0.5:
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}; it must be below 0.5, where chosen "
                "and rejected are the same"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}, which is for preference.loss_type "
                '"sigmoid"; leave it out'
            )
