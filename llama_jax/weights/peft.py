"""Reads LoRA adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

A LoRA, rsLoRA or DoRA adapter for a Llama, as PEFT's `save_pretrained` writes it, becomes the settings and
the tree of `adapters.lora`. Unsupported fields that change what an adapter computes are refused by name;
missing, unexpected and misshapen tensors are errors.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters.lora import Lora
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.ops.adapted import PROJECTIONS
from llama_jax.weights import adapter_head
from llama_jax.weights.json_fields import JsonFields
from llama_jax.weights.names import LEAVES, Leaf
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import TensorInfo, format_list, quote, read_f32

WEIGHTS = "adapter_model.safetensors"
NAME_PREFIX = "base_model.model."  # PEFT's wrappers around the model
# PEFT's tensor names; some versions add ".weight" to the magnitude's name.
LORA_A, LORA_B, LORA_MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_LEAF_OF = {leaf.hf.split(".")[-2]: leaf for leaf in LEAVES if leaf.path[-1] in PROJECTIONS}
_NAME = re.compile(
    rf"{re.escape(NAME_PREFIX)}(?P<module>model\.layers\.(?P<layer>\d{{1,4}})\.(?:self_attn|mlp)\.(?P<hf>\w+))"
    rf"\.(?P<kind>{re.escape(LORA_A)}|{re.escape(LORA_B)}|{LORA_MAGNITUDE})(?:(?<=vector)\.weight)?"
)
# Fields that are read below, or that do not affect what a trained adapter computes.
_KNOWN = {"r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"}
_KNOWN |= {"init_lora_weights", "bias", "lora_dropout", "exclude_modules", "layers_pattern", "eva_config"}
_KNOWN |= {"layers_to_transform"}  # `bias` says which biases are trained; a Llama has none
_KNOWN |= {"megatron_config", "megatron_core", "qalora_group_size", "runtime_config"}
_COMMON_FIELDS = {"peft_type", "task_type", "modules_to_save", "auto_mapping", "base_model_name_or_path"}
_COMMON_FIELDS |= {"revision", "peft_version", "inference_mode"}
_MAX_PADDING = 64  # how much larger an adapter may become when all modules are padded to one rank
_SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # these leave the base unchanged


def read_lora(
    config_path: Path, config: Mapping[str, Any], num_layers: int | None = None
) -> tuple[Lora, dict[str, Any]]:
    """Reads a LoRA, rsLoRA or DoRA adapter.

    Args:
      config_path: its adapter_config.json; the weights are in the same directory.
      config: the contents of that file.
      num_layers: of the base model, for an adapter that leaves out its last layers; None if unknown.

    Returns:
      The settings, and the adapter's tree for `lora.attach`: f32, layers stacked. Modules of smaller rank
      (rank_pattern) are zero-padded to the largest rank, and per-module alphas (alpha_pattern) are folded
      into `b`. Modules that the adapter leaves out (exclude_modules, layers_to_transform, a regular
      expression of target_modules) are zero.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter uses an unsupported feature, or tensors
        are missing, unexpected or of the wrong shape.
    """
    fields = _Fields(config_path, config)
    fields.check_supported()
    file = weights_path(config_path)
    stored = adapter_head.exclude_head(config, read_safetensors_header(file))
    modules, layers = _find_modules(file, stored, fields, num_layers)
    rank = max(module.rank for module in modules)
    names = [name for name in PROJECTIONS if any(module.leaf.path[-1] == name for module in modules)]
    settings = fields.settings(rank, names)
    stored_bytes = sum(info.nbytes for info in stored.values())
    padded_bytes = sum(4 * rank * (module.inputs + module.outputs) for module in modules)
    if padded_bytes > _MAX_PADDING * stored_bytes:
        raise CheckpointError(
            f"{file}: {stored_bytes:,} bytes become {padded_bytes:,} when every module is padded to the "
            f"largest rank, {rank}; keep the ranks of rank_pattern closer together"
        )
    tree: dict[str, Any] = {}
    for name in names:
        by_layer = sorted((m for m in modules if m.leaf.path[-1] == name), key=lambda module: module.layer)
        first = by_layer[0]
        leaf: dict[str, np.ndarray] = {
            "a": np.zeros((layers, first.inputs, rank), np.float32),
            "b": np.zeros((layers, rank, first.outputs), np.float32),
        }
        if settings.dora:
            leaf["magnitude"] = np.zeros((layers, first.outputs), np.float32)
        for module in by_layer:
            arrays = {kind: read_f32(name, stored[name]) for kind, name in module.names.items()}
            leaf["a"][module.layer, :, : module.rank] = arrays[LORA_A].T
            leaf["b"][module.layer, : module.rank] = arrays[LORA_B].T * np.float32(
                module.scale / settings.scale
            )
            if settings.dora:
                leaf["magnitude"][module.layer] = arrays[LORA_MAGNITUDE]
        tree.setdefault(first.leaf.path[1], {})[name] = leaf
    return settings, jax.tree.map(jnp.asarray, {"layers": tree})


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
                f"{path}: {quote(key)} is {quote(str(value))}, which llama_jax does not support"
            )


def weights_path(config_path: Path) -> Path:
    """Returns the path of an adapter's weights.

    Raises:
      CheckpointError: if the adapter has only a pickle.
    """
    file = config_path.parent / WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        raise CheckpointError(
            f"{file}: missing; there is only adapter_model.bin, a pickle: save with safe_serialization=True"
        )
    return file


@dataclasses.dataclass(frozen=True)
class _Module:
    """The stored adapter of one matrix.

    Attributes:
      leaf: the matrix.
      layer: its layer.
      names: the stored names of `lora_A`, `lora_B` and the magnitude.
      rank, inputs, outputs: the dimensions of the low-rank factors.
      scale: the scaling factor of the low-rank product.
    """

    leaf: Leaf
    layer: int
    names: Mapping[str, str]
    rank: int
    inputs: int
    outputs: int
    scale: float


def _find_modules(
    file: Path, stored: Mapping[str, TensorInfo], fields: _Fields, num_layers: int | None
) -> tuple[list[_Module], int]:
    """Returns the adapted modules and the number of layers.

    Raises:
      CheckpointError: for tensors that are missing, unexpected or of the wrong shape.
    """
    found: defaultdict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    kinds = (LORA_A, LORA_B, LORA_MAGNITUDE) if fields.flag("use_dora") else (LORA_A, LORA_B)
    unexpected = []
    for name in stored:
        match = _NAME.fullmatch(name)
        leaf = _LEAF_OF.get(match["hf"]) if match else None
        if (
            match is None
            or leaf is None
            or match["kind"] not in kinds
            or leaf.name("hf", int(match["layer"])) != f"{match['module']}.weight"
            or match["kind"] in found[match["hf"], int(match["layer"])]
        ):
            unexpected.append(quote(name))
        else:
            found[match["hf"], int(match["layer"])][match["kind"]] = name
    if unexpected:
        raise CheckpointError(
            f"{file}: unexpected tensors: {format_list(unexpected, 4)}; only {' and '.join(kinds)} of "
            f"{', '.join(_LEAF_OF)} are supported"
        )
    projections = {hf for hf, _ in found} | fields.targets()
    layers = 1 + max((layer for _, layer in found), default=0)
    if fields.selects_layers() and num_layers is not None:
        layers = max(layers, num_layers)
    missing = [
        f"{NAME_PREFIX}model.layers.{layer}.*.{hf}.{kind}"
        for hf in sorted(projections)
        for layer in range(layers)
        for kind in kinds
        if kind not in found.get((hf, layer), {})
        and ((hf, layer) in found or not fields.leaves_out(_LEAF_OF[hf].name("hf", layer)))
    ]
    if missing or not found:
        listed = format_list(missing, 4) if missing else "the file has none"
        raise CheckpointError(
            f"{file}: missing tensors: {listed}, which {fields.path.name} does not leave out; use the files "
            "that were saved together"
        )
    if fields.flag("use_dora") and len(found) < layers * len({hf for hf, _ in found}):
        raise CheckpointError(
            f"{file}: a DoRA adapter of some layers only; merge it into its base model in PEFT"
        )
    wrong_shapes, modules = [], []
    for (hf, layer), names in found.items():
        first = next(key for key in found if key[0] == hf)
        shape_a, shape_b = (stored[found[first][kind]].shape for kind in (LORA_A, LORA_B))
        inputs, outputs = (*shape_a, 0, 0)[1], (*shape_b, 0)[0]
        leaf = _LEAF_OF[hf]
        rank, scale = fields.rank_and_scale(leaf.name("hf", layer).removesuffix(".weight"))
        expected = {LORA_A: (rank, inputs), LORA_B: (outputs, rank), LORA_MAGNITUDE: (outputs,)}
        wrong_shapes += [
            f"{name} {list(stored[name].shape)} should be {list(expected[kind])}"
            for kind, name in names.items()
            if stored[name].shape != expected[kind] or 0 in expected[kind]
        ]
        modules.append(_Module(leaf, layer, names, rank, inputs, outputs, scale))
    if wrong_shapes:
        raise CheckpointError(
            f"{file}: wrong shapes according to {fields.path.name}: {format_list(wrong_shapes, 3)}; use the "
            "files that were saved together"
        )
    return modules, layers


class _Fields(JsonFields):
    """The fields of an adapter_config.json."""

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(key, default)  # PEFT writes null only where it is a value of its own

    def check_supported(self) -> None:
        """Refuses unsupported features."""
        adapter_head.check_task(self.path, self.fields)
        init = self.fields.get("init_lora_weights")
        if init not in _SUPPORTED_INITS:
            raise self.error(
                f"init_lora_weights is {quote(str(init))}, which changes the base weights too; convert the "
                "adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        check_fields(self.path, self.fields, _KNOWN)

    def settings(self, rank: int, names: list[str]) -> Lora:
        return Lora(rank, self.alpha(), tuple(names), self.flag("use_rslora"), self.flag("use_dora"))

    def alpha(self) -> float:
        return self.number("lora_alpha", 8, positive=True)

    def flag(self, key: str) -> bool:
        return self.fields.get(key) is not None and super().flag(key)

    def targets(self) -> set[str]:
        """The projections in the list target_modules; empty if it is a regular expression."""
        value = self.fields.get("target_modules")
        if not isinstance(value, list):
            return set()
        return {str(name).rpartition(".")[2] for name in value} & _LEAF_OF.keys()

    def selects_layers(self) -> bool:
        """Whether the configuration may name some layers only."""
        return self.fields.get("layers_to_transform") is not None or isinstance(
            self.fields.get("target_modules"), str
        )

    def leaves_out(self, name: str) -> bool:
        """Whether the configuration may leave out the matrix of this name, in which case PEFT adapts it not.

        Regular expressions are not evaluated, as a hostile one takes unbounded time: what they leave out is
        what the file has not.
        """
        module, layer = name.removesuffix(".weight"), int(name.split(".")[2])
        targets, excluded = self.fields.get("target_modules"), self.fields.get("exclude_modules")
        layers = self.fields.get("layers_to_transform")
        if (isinstance(targets, str) and targets != "all-linear") or isinstance(excluded, str):
            return True
        if layers is not None and layer not in (layers if isinstance(layers, list) else [layers]):
            return True
        return isinstance(excluded, list) and any(
            module == name or module.endswith(f".{name}") for name in map(str, excluded)
        )

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Returns a module's rank and scaling factor."""
        rank = self.pattern("rank_pattern", module, self.fields.get("r", 8))
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
        """Returns the value of the first pattern that matches the end of a module's name."""
        patterns = self.fields.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.error(f"{key} is {quote(str(patterns))}; it must be an object")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise self.error(
                    f"{key} has {quote(pattern)}; only module names are supported, no regular expressions"
                )
            name = pattern.removeprefix("^")
            if module == name or (name == pattern and module.endswith(f".{name}")):
                return value
        return default
