"""`[model.rope_scaling]`: how rotary frequencies are scaled, with the names of a config.json."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError

from .checks import check_one_of

RopeType = Literal["default", "linear", "ntk", "yarn", "llama3"]
_NAME = "model.rope_scaling"
_YARN = ("beta_fast", "beta_slow", "attention_factor", "truncate")
_OWN = {"yarn": _YARN, "llama3": ("low_freq_factor", "high_freq_factor")}  # fields of one type only


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are scaled for contexts longer than that of pretraining.

    What is not set is that of `model.init_from` if it is scaled by the same type.

    Attributes:
      rope_type: `linear`, `ntk`, `yarn` or `llama3`, see `RopeScaling`; `default` is no scaling. By default
        that of `model.init_from`. Also read as `kind` and `type`.
      factor: the scaling factor, at least 1; by default max_position_embeddings / original.
      original_max_position_embeddings: the context of pretraining in tokens; by default the model's own.
      low_freq_factor and the rest: as in `RopeScaling`.

    Raises:
      ConfigError: for an unknown type, or a field that the type does not have.
    """

    rope_type: RopeType | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if not self._set:
            raise ConfigError(
                f"{_NAME} is empty; set {_NAME}.rope_type and {_NAME}.factor, or rope_type "
                '"default" for no scaling'
            )
        if self.rope_type is None:
            return
        if str(self.rope_type) == "dynamic":  # Hugging Face's, which scales nothing within the context
            raise ConfigError(
                f'{_NAME}.rope_type is "dynamic", which scales only texts beyond the context; to train on '
                'them use "ntk" or "yarn"'
            )
        check_one_of(f"{_NAME}.rope_type", self.rope_type, ("default", "linear", "ntk", "yarn", "llama3"))
        self._check_fields(self.rope_type)

    @property
    def _set(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def _check_fields(self, kind: str) -> None:
        """Refuses fields that other types have: they would have no effect."""
        for owner, names in _OWN.items():
            for name in names:
                if kind not in (owner, "default") and getattr(self, name) is not None:
                    raise ConfigError(
                        f'{_NAME}.{name} is set, which only "{owner}" has, and rope_type is "{kind}"; remove '
                        "it"
                    )

    def resolve(
        self, base: LlamaConfig, max_position_embeddings: int | None, *, context: int | None
    ) -> tuple[RopeScaling | None, int]:
        """Completes the settings with those of a base model.

        Args:
          base: the model that is scaled; its own scaling is replaced.
          max_position_embeddings: the context that is asked for, if it is.
          context: the context of `base` in tokens; None if nothing says.

        Returns:
          The scaling and the model's context: by default `factor` times the original context.

        Raises:
          ConfigError: for values that are missing, invalid, or contradict each other.
        """
        ours, theirs = self._set, base.rope_scaling
        kind = ours.pop("rope_type", None if theirs is None else theirs.kind)
        if kind is None:
            raise ConfigError(f'{_NAME}.rope_type is missing; give "yarn", "linear", "ntk" or "llama3"')
        if kind == "default":
            return None, max_position_embeddings or base.max_position_embeddings
        self._check_fields(kind)
        reach = max_position_embeddings
        if theirs is not None:
            context = theirs.original_max_position_embeddings
        if theirs is not None and theirs.kind == kind:
            factor = ours.get("factor", theirs.factor if reach is None else None)
            same = dataclasses.asdict(theirs) | {"factor": factor}
            if factor == theirs.factor:
                reach = reach or base.max_position_embeddings
            else:
                same["attention_factor"] = None  # that of their factor
            ours = same | ours
        original, factor = ours.get("original_max_position_embeddings") or context, ours.get("factor")
        if factor is None:
            if reach is None or original is None:
                raise ConfigError(
                    f"{_NAME}.factor is missing; give it, or model.max_position_embeddings and "
                    f"{_NAME}.original_max_position_embeddings"
                )
            factor = reach / original
        if original is None:
            if kind in _OWN or reach is None:
                raise ConfigError(
                    f"{_NAME}.original_max_position_embeddings is missing, and nothing says what the context "
                    "was before scaling; give it in tokens"
                )
            return self._make(kind, factor, None, ours), reach
        return self._make(kind, factor, original, ours), reach or int(factor * original)

    def _make(self, kind: Any, factor: float, original: int | None, others: dict[str, Any]) -> RopeScaling:
        names = _OWN.get(kind, ())
        own = {name: value for name, value in others.items() if name in names}
        try:
            return RopeScaling(kind, factor, original if names else None, **own)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from None


def check_reach(config: LlamaConfig) -> None:
    """Checks that a model's context is what its scaling reaches.

    YaRN's must be factor times the original context: transformers 4 takes their ratio for the factor.

    Raises:
      ConfigError: with the factor that fits.
    """
    scaling, context = config.rope_scaling, config.max_position_embeddings
    if scaling is None or scaling.kind != "yarn":
        return
    original = scaling.original_max_position_embeddings
    assert original is not None  # checked by RopeScaling
    if not math.isclose(scaling.factor * original, context, rel_tol=1e-3):
        raise ConfigError(
            f"model.max_position_embeddings is {context} and {_NAME} scales {original} tokens by "
            f"{scaling.factor:g} to {int(scaling.factor * original)}; leave it out, or set {_NAME}.factor to "
            f"{context / original:g}"
        )
