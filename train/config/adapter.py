"""`[adapter]`: parameter-efficient finetuning, and the dtype of the frozen base weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from llama_jax.adapters import Settings
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.errors import ConfigError

from .checks import check_one_of

AdapterType = Literal["none", "lora", "bottleneck", "prefix"]
BaseDtype = Literal["auto", "float32", "bfloat16", "int8", "nf4"]

# The settings of each adapter type, besides `type` and `base`.
_SETTINGS_OF_TYPE: Mapping[AdapterType, tuple[str, ...]] = {
    "none": (),
    "lora": ("rank", "alpha", "target_modules", "rslora", "dora"),
    "bottleneck": ("bottleneck_size", "target_modules"),
    "prefix": ("prefix_length",),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Whether an adapter is trained instead of all weights, and the dtype of the frozen base weights.

    Attributes:
      type: `none` trains all weights; `lora` low-rank adapters (`rslora` and `dora` are variants);
        `bottleneck` small MLPs after attention and feed-forward; `prefix` keys and values that precede the
        sequence's own.
      rank, alpha, target_modules, rslora, dora: as in `llama_jax.adapters.lora.Lora`; for `bottleneck`,
        target_modules as in `llama_jax.adapters.bottleneck.Bottleneck`.
      bottleneck_size: hidden width, `size` of `llama_jax.adapters.bottleneck.Bottleneck`.
      prefix_length: learned keys and values per layer, `length` of `llama_jax.adapters.prefix.Prefix`.
      base: dtype or quantization of the frozen base weights: `auto` is the compute dtype; `int8`; `nf4` is
        QLoRA.

    Raises:
      ConfigError: for an invalid value, or a setting that the adapter type does not have.
    """

    type: AdapterType = "none"
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("*",)
    rslora: bool = False
    dora: bool = False
    bottleneck_size: int = 64
    prefix_length: int = 16
    base: BaseDtype = "auto"

    def __post_init__(self) -> None:
        check_one_of("adapter.type", self.type, get_args(AdapterType))
        check_one_of("adapter.base", self.base, get_args(BaseDtype))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        allowed = {"type", *_SETTINGS_OF_TYPE[self.type], *(() if self.type == "none" else ("base",))}
        for field in dataclasses.fields(self):
            if field.name in allowed or getattr(self, field.name) == field.default:
                continue
            types = [
                name
                for name, settings in _SETTINGS_OF_TYPE.items()
                if name != "none" and field.name in (*settings, "base")
            ]
            raise ConfigError(
                f'adapter.{field.name} is set and adapter.type is "{self.type}"; it applies to '
                f"{' or '.join(types)}: set that type, or leave it out"
            )
        _ = self.settings  # validates them

    @property
    def settings(self) -> Settings | None:
        """The adapter's settings; None if all weights are trained."""
        match self.type:
            case "none":
                return None
            case "lora":
                return Lora(self.rank, self.alpha, self.target_modules, self.rslora, self.dora)
            case "bottleneck":
                return Bottleneck(self.bottleneck_size, self.target_modules)
            case "prefix":
                return Prefix(self.prefix_length)
