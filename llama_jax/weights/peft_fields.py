"""The fields of PEFT's adapter_config.json, checked, and what they say of a module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.adapters.lora import Lora
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights import adapter_head
from llama_jax.weights.json_fields import JsonFields
from llama_jax.weights.merged import Initial
from llama_jax.weights.module_expressions import UnsupportedExpression, compile_expression
from llama_jax.weights.source import quote

MERGE_HINT = "merge it in PEFT with merge_and_unload(), and load the model that it saves"

# Fields that are read below, or that do not affect what a trained adapter computes. `bias` says which biases
# are trained, and a Llama has none; `fan_in_fan_out` has no effect on torch's linear layers.
_KNOWN = {"r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"}
_KNOWN |= {"init_lora_weights", "bias", "lora_dropout", "exclude_modules", "layers_pattern", "eva_config"}
_KNOWN |= {"layers_to_transform", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"}
_KNOWN |= {"trainable_token_indices", "megatron_config", "megatron_core", "qalora_group_size"}
_KNOWN |= {"runtime_config", "token_indices", "init_weights", "target_parameters"}
_COMMON_FIELDS = {"peft_type", "task_type", "modules_to_save", "auto_mapping", "base_model_name_or_path"}
_COMMON_FIELDS |= {"revision", "peft_version", "inference_mode"}
_UNCHANGED_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # by initialization
_CHANGED_BASE = ("pissa", "olora")


def check_fields(path: Path, fields: Mapping[str, Any], known: set[str]) -> None:
    """Checks that an adapter_config.json has no unknown fields.

    Unknown fields are accepted only with a value that means "not used", so that new features of PEFT are
    never silently ignored.

    Args:
      path: the file, for the error message.
      fields: its contents.
      known: the known fields of this adapter type, besides those of every type.

    Raises:
      CheckpointError: for the first unknown field.
    """
    for key, value in fields.items():
        if key not in known | _COMMON_FIELDS and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{path}: {quote(key)} is {quote(str(value))}, which llama_jax does not support; {MERGE_HINT}"
            )


class PeftFields(JsonFields):
    """The fields of an adapter_config.json."""

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(key, default)  # PEFT writes null only where it is a value of its own

    def check_supported(self) -> None:
        """Refuses unsupported features.

        Raises:
          CheckpointError: naming the field.
        """
        adapter_head.check_task(self.path, self.fields)
        init = self.get("init_lora_weights")
        name = init.lower() if isinstance(init, str) else init
        if name not in _UNCHANGED_BASE + _CHANGED_BASE:
            raise self.error(
                f"init_lora_weights is {quote(str(init))}, which changes the base weights in a way that the "
                f"adapter does not record; {MERGE_HINT}"
            )
        check_fields(self.path, self.fields, _KNOWN)

    def settings(self, rank: int, names: list[str]) -> Lora:
        return Lora(rank, self.alpha(), tuple(names), self.flag("use_rslora"), self.flag("use_dora"))

    def alpha(self) -> float:
        return self.number("lora_alpha", 8, positive=True)

    def flag(self, key: str) -> bool:
        return self.fields.get(key) is not None and super().flag(key)

    def initial(self, rank: int, scale: float) -> Initial | None:
        """Returns what the initialization took from the base of a module; None if nothing."""
        init = self.get("init_lora_weights")
        name = init.lower() if isinstance(init, str) else init
        return Initial(name, rank, scale) if name in _CHANGED_BASE else None

    def is_saved(self, module: str) -> bool:
        """Whether `modules_to_save` names a module: it is trained itself, and never adapted."""
        saved = self.get("modules_to_save") or ()
        return any(f".{name}." in f".{module}." for name in map(str, saved))

    def targets(self) -> list[str]:
        """The names in the list target_modules; empty if it is a regular expression."""
        value = self.get("target_modules")
        return list(map(str, value)) if isinstance(value, list) else []

    def target_parameters(self) -> list[str]:
        """The names in the list target_parameters."""
        value = self.get("target_parameters") or []
        if not isinstance(value, list):
            raise self.error(f"target_parameters is {quote(str(value))}; it must be a list of names")
        return list(map(str, value))

    def leaves_out(self, module: str, layer: int) -> bool:
        """Whether the configuration may leave out a module, in which case PEFT does not adapt it.

        Regular expressions of modules are not evaluated: what they leave out is what the file has not.
        """
        targets, excluded = self.get("target_modules"), self.get("exclude_modules")
        layers = self.get("layers_to_transform")
        if (isinstance(targets, str) and targets != "all-linear") or isinstance(excluded, str):
            return True
        if layers not in (None, []) and layer not in (layers if isinstance(layers, list) else [layers]):
            return True
        if self.is_saved(module) or (isinstance(targets, list) and not _names(self.targets(), module)):
            return True
        return isinstance(excluded, list) and _names(list(map(str, excluded)), module)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Returns a module's rank and scaling factor."""
        rank = self.pattern("rank_pattern", module, self.get("r", 8))
        alpha = self.pattern("alpha_pattern", module, self.alpha())
        if type(rank) is not int or not 0 < rank < 1 << 31:
            raise self.error(f"r is {quote(str(rank))}; it must be a whole number, at least 1")
        if type(alpha) not in (int, float):
            raise self.error(f"alpha_pattern has {quote(str(alpha))}; it must be a number")
        try:
            return rank, Lora(rank, float(alpha), rslora=self.flag("use_rslora")).scale
        except (ConfigError, OverflowError):
            raise self.error(
                f"lora_alpha is {quote(str(alpha))}; it must be a finite number above 0"
            ) from None

    def pattern(self, key: str, module: str, default: Any) -> Any:
        """Returns the value of the first pattern that matches a module's name, or the end of it."""
        for matches, value in self._patterns[key]:
            try:
                if matches(module):
                    return value
            except UnsupportedExpression as error:
                raise self._unsupported(key, error) from None
        return default

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[Callable[[str], bool], Any]]]:
        return {key: self._compile(key) for key in ("rank_pattern", "alpha_pattern")}

    def _compile(self, key: str) -> list[tuple[Callable[[str], bool], Any]]:
        patterns = self.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.error(f"{key} is {quote(str(patterns))}; it must be an object")
        try:
            return [
                (compile_expression(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()
            ]
        except UnsupportedExpression as error:
            raise self._unsupported(key, error) from None

    def _unsupported(self, key: str, error: UnsupportedExpression) -> CheckpointError:
        return self.error(f"{key} has an expression that is not supported: {error}; {MERGE_HINT}")


def _names(names: list[str], module: str) -> bool:
    """Whether one of the names is a module's, or the end of it."""
    return any(module == name or module.endswith(f".{name}") for name in names)
