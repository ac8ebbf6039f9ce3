"""Reads LoRA adapters in the format of Hugging Face's PEFT: adapter_config.json, adapter_model.safetensors.

What PEFT's `save_pretrained` writes of a LoRA, rsLoRA or DoRA adapter for a Llama becomes the settings and
the tree of `llama_jax.lora`. Fields that change what an adapter computes, and that cannot be honoured, are
refused by name; the tensors have to be all there, no others, and of shapes that agree.
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
from llama_jax.weights.names import LEAVES, Leaf
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import TensorInfo, brief, quote, read_f32

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrappers around the model
# What PEFT calls the leaves of an adapter; the magnitude's name has had either form.
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_LEAF_OF = {leaf.hf.split(".")[-2]: leaf for leaf in LEAVES if leaf.path[-1] in PROJECTIONS}
_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>model\.layers\.(?P<layer>\d{{1,4}})\.(?:self_attn|mlp)\.(?P<hf>\w+))"
    rf"\.(?P<kind>{re.escape(A)}|{re.escape(B)}|{MAGNITUDE})(?:(?<=vector)\.weight)?"
)
# Fields that are read below, or that change nothing of what a finished adapter computes.
_KNOWN = {"r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"}
_KNOWN |= {"init_lora_weights", "bias", "lora_dropout", "exclude_modules", "layers_pattern", "eva_config"}
_KNOWN |= {"megatron_config", "megatron_core", "qalora_group_size", "runtime_config"}
_OF_ANY_KIND = {"peft_type", "task_type", "modules_to_save", "auto_mapping", "base_model_name_or_path"}
_OF_ANY_KIND |= {"revision", "peft_version", "inference_mode"}
_MOST_PADDING = 64  # how many times its own size an adapter may take, for all modules to have one rank
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it is


def read_lora(description: Path, found: Mapping[str, Any]) -> tuple[Lora, dict[str, Any]]:
    """Reads an adapter.

    Args:
      description: its adapter_config.json; the tensors lie beside it.
      found: what that holds.

    Returns:
      Its settings, and its tree as `lora.attach` takes it: f32, layers stacked. Modules of other ranks than
      the rest (rank_pattern) are padded to the largest, and what they count (alpha_pattern) is put into `b`.

    Raises:
      CheckpointError: if a file is missing or malformed, if the adapter does what llama_jax does not, or if
        tensors are missing, unexpected or of the wrong shape.
    """
    fields = _Fields(description, found)
    fields.check()
    file = tensors_file(description)
    stored = adapter_head.without_head(found, read_safetensors_header(file))
    modules, layers = _modules(file, stored, fields)
    rank = max(module.rank for module in modules)
    names = [name for name in PROJECTIONS if any(module.leaf.path[-1] == name for module in modules)]
    settings = fields.settings(rank, names)
    stated = sum(info.nbytes for info in stored.values())
    padded = sum(4 * rank * (module.inputs + module.outputs) for module in modules)
    if padded > _MOST_PADDING * stated:
        raise CheckpointError(
            f"{file}: {stated:,} bytes become {padded:,} when every module is padded to the largest rank, "
            f"{rank}; keep the ranks of rank_pattern closer together"
        )
    made: dict[str, Any] = {}
    for name in names:
        own = sorted((m for m in modules if m.leaf.path[-1] == name), key=lambda module: module.layer)
        leaf: dict[str, np.ndarray] = {
            "a": np.zeros((layers, own[0].inputs, rank), np.float32),
            "b": np.zeros((layers, rank, own[0].outputs), np.float32),
        }
        if settings.dora:
            leaf["magnitude"] = np.zeros((layers, own[0].outputs), np.float32)
        for module in own:
            arrays = {kind: read_f32(name, stored[name]) for kind, name in module.names.items()}
            leaf["a"][module.layer, :, : module.rank] = arrays[A].T
            leaf["b"][module.layer, : module.rank] = arrays[B].T * np.float32(module.scale / settings.scale)
            if settings.dora:
                leaf["magnitude"][module.layer] = arrays[MAGNITUDE]
        made.setdefault(own[0].leaf.path[1], {})[name] = leaf
    return settings, jax.tree.map(jnp.asarray, {"layers": made})


def check_known(path: Path, fields: Mapping[str, Any], known: set[str]) -> None:
    """Checks that a description says nothing but what is known.

    Of any other field, only a value that means "not used" is taken: PEFT's next invention must not be left
    out in silence.

    Args:
      path: the description.
      fields: what it holds.
      known: the fields of its kind; those of every kind are known.

    Raises:
      CheckpointError: for the first field that is not.
    """
    for key, value in fields.items():
        if key not in known | _OF_ANY_KIND and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{path}: {quote(key)} is {quote(str(value))}, which llama_jax does not know or do"
            )


def tensors_file(description: Path) -> Path:
    """Where an adapter's tensors are.

    Raises:
      CheckpointError: if they are there as a pickle alone.
    """
    file = description.parent / WEIGHTS
    if not file.exists() and file.with_suffix(".bin").exists():
        raise CheckpointError(
            f"{file}: is not there, only adapter_model.bin, a pickle; save it with safe_serialization"
        )
    return file


@dataclasses.dataclass(frozen=True)
class _Module:
    """One matrix's adapter, as it is stored.

    Attributes:
      leaf: the matrix.
      layer: its layer.
      names: the stored name of each of `lora_A`, `lora_B` and the magnitude.
      rank, inputs, outputs: the sizes of its factors.
      scale: how much their product counts.
    """

    leaf: Leaf
    layer: int
    names: Mapping[str, str]
    rank: int
    inputs: int
    outputs: int
    scale: float


def _modules(file: Path, stored: Mapping[str, TensorInfo], fields: _Fields) -> tuple[list[_Module], int]:
    """Finds every module's tensors, and how many layers there are.

    Raises:
      CheckpointError: for tensors that are missing, unexpected or of the wrong shape.
    """
    found: defaultdict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    kinds = (A, B, MAGNITUDE) if fields.flag("use_dora") else (A, B)
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
            f"{file}: unexpected tensors: {brief(unexpected, 4)}; an adapter here has {' and '.join(kinds)} "
            f"of {', '.join(_LEAF_OF)} in every layer, and nothing else"
        )
    projections = {hf for hf, _ in found} | fields.targets()
    layers = 1 + max((layer for _, layer in found), default=0)
    missing = [
        f"{PREFIX}model.layers.{layer}.*.{hf}.{kind}"
        for hf in sorted(projections)
        for layer in range(layers)
        for kind in kinds
        if kind not in found.get((hf, layer), {})
    ]
    if missing or not found:
        what = brief(missing, 4) if missing else "it has none at all"
        raise CheckpointError(
            f"{file}: missing tensors: {what}; an adapter here has the same projections in every layer"
        )
    wrong, modules = [], []
    for (hf, layer), names in found.items():
        like = [stored[found[hf, 0][kind]].shape for kind in (A, B)]
        inputs, outputs = (like[0] + (0, 0))[1], (like[1] + (0,))[0]
        leaf = _LEAF_OF[hf]
        rank, scale = fields.rank_and_scale(leaf.name("hf", layer).removesuffix(".weight"))
        want = {A: (rank, inputs), B: (outputs, rank), MAGNITUDE: (outputs,)}
        wrong += [
            f"{name} {list(stored[name].shape)} should be {list(want[kind])}"
            for kind, name in names.items()
            if stored[name].shape != want[kind] or 0 in want[kind]
        ]
        modules.append(_Module(leaf, layer, names, rank, inputs, outputs, scale))
    if wrong:
        raise CheckpointError(
            f"{file}: wrong shapes by {fields.path.name}: {brief(wrong, 3)}; use those saved together"
        )
    return modules, layers


class _Fields:
    """The fields of an adapter_config.json, each checked for its type."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def check(self) -> None:
        """Refuses what cannot be represented."""
        adapter_head.check_task(self.path, self.fields)
        if self.fields.get("bias", "none") != "none":
            raise self.error(
                f"bias is {quote(str(self.fields['bias']))}; Llama has no biases, only 'none' can be read"
            )
        start = self.fields.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise self.error(
                f"init_lora_weights is {quote(str(start))}, which changes the base's weights too; convert "
                "the adapter with PEFT's path_initial_model_for_weight_conversion"
            )
        check_known(self.path, self.fields, _KNOWN)

    def settings(self, rank: int, names: list[str]) -> Lora:
        return Lora(
            rank, self.number("lora_alpha"), tuple(names), self.flag("use_rslora"), self.flag("use_dora")
        )

    def targets(self) -> set[str]:
        """The projections that the list of target_modules names. Nothing of a regular expression."""
        value = self.fields.get("target_modules")
        if not isinstance(value, list):
            return set()
        return {str(name).rpartition(".")[2] for name in value} & _LEAF_OF.keys()

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """A module's own rank, and how much its product counts."""
        rank = self.pattern("rank_pattern", module, self.fields.get("r", 8))
        alpha = self.pattern("alpha_pattern", module, self.number("lora_alpha"))
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
        """The value of the first of the patterns that a module's name ends with."""
        patterns = self.fields.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.error(f"{key} is {quote(str(patterns))}; it must be an object")
        for pattern, value in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+", pattern):
                raise self.error(
                    f"{key} has {quote(pattern)}; only names of modules can be read, no expressions"
                )
            whole = pattern.removeprefix("^")
            if module == whole or (whole == pattern and module.endswith(f".{whole}")):
                return value
        return default

    def flag(self, key: str) -> bool:
        value = self.fields.get(key, False)
        if value not in (None, True, False):
            raise self.error(f"{key} is {quote(str(value))}; it must be true or false")
        return bool(value)

    def number(self, key: str) -> float:
        value = self.fields.get(key, 8)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(f"{key} is {quote(str(value))}; it must be a finite number above 0")
        return float(value)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")
