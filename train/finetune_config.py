"""What finetuning adds to a run: adapters in place of all weights, and preferences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from llama_jax.adapters import Settings
from llama_jax.bottleneck import Bottleneck
from llama_jax.errors import ConfigError
from llama_jax.lora import Lora
from llama_jax.prefix import Prefix
from train.choices import at_least, one_of
from train.data.forms import Objective
from train.preference import Kind

AdapterKind = Literal["none", "lora", "bottleneck", "prefix"]
Reference = Literal["on_the_fly", "precomputed"]
Base = Literal["auto", "float32", "bfloat16", "int8", "nf4"]

# The objectives that end in a number or class a segment, which a head of their own gives.
HEADS: tuple[Objective, ...] = ("reward", "classify", "regress")
# What is said of each kind of adapter, beside `kind` and `base`.
_OWN: Mapping[AdapterKind, tuple[str, ...]] = {
    "none": (),
    "lora": ("rank", "alpha", "targets", "rslora", "dora"),
    "bottleneck": ("bottleneck_size", "targets"),
    "prefix": ("prefix_length",),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Whether an adapter is trained in place of the weights, and what the frozen base is held in.

    Attributes:
      kind: `none` trains all weights; `lora` low-rank adapters (`rslora` and `dora` vary them); `bottleneck`
        small networks behind attention and feed-forward; `prefix` keys and values before those of the text.
      rank, alpha, targets, rslora, dora: as in `llama_jax.lora.Lora`; `targets` of a bottleneck, as there.
      bottleneck_size: as `size` in `llama_jax.bottleneck.Bottleneck`.
      prefix_length: as `length` in `llama_jax.prefix.Prefix`.
      base: what the frozen weights are held in: `auto` is the compute dtype; `int8`, or `nf4` for QLoRA.
    """

    kind: AdapterKind = "none"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)
    rslora: bool = False
    dora: bool = False
    bottleneck_size: int = 64
    prefix_length: int = 16
    base: Base = "auto"

    def __post_init__(self) -> None:
        one_of("adapter.kind", self.kind, get_args(AdapterKind))
        one_of("adapter.base", self.base, get_args(Base))
        object.__setattr__(self, "targets", tuple(self.targets))
        fits = {"kind", *_OWN[self.kind], *(() if self.kind == "none" else ("base",))}
        for field in dataclasses.fields(self):
            if field.name in fits or getattr(self, field.name) == field.default:
                continue
            kinds = [kind for kind, own in _OWN.items() if kind != "none" and field.name in (*own, "base")]
            raise ConfigError(
                f'adapter.{field.name} is given and adapter.kind is "{self.kind}"; it is for '
                f"{' or '.join(kinds)}: set that, or leave it out"
            )
        _ = self.settings

    @property
    def settings(self) -> Settings | None:
        """The adapter's settings; None where all weights are trained."""
        match self.kind:
            case "none":
                return None
            case "lora":
                return Lora(self.rank, self.alpha, self.targets, self.rslora, self.dora)
            case "bottleneck":
                return Bottleneck(self.bottleneck_size, self.targets)
            case "prefix":
                return Prefix(self.prefix_length)


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
