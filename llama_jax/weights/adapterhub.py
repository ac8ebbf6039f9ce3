"""Reads bottleneck adapters in AdapterHub's format: adapter_config.json and adapter.safetensors.

Only sequential adapters after a layer's attention or feed-forward network are supported, as in the paper
(Houlsby et al., arXiv 1902.00751; AdapterHub's `double_seq_bn`); other variants are refused with the field
that selects them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.errors import CheckpointError
from llama_jax.ops.adapted import Activation
from llama_jax.weights.adapter_file import read_f32
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import TensorInfo, format_list, quote

WEIGHTS = "adapter.safetensors"
# For each location of an adapter: AdapterHub's module name, and the field that enables it.
LOCATIONS = {
    "attention": ("attention_adapters", "mh_adapter"),
    "feed_forward": ("output_adapters", "output_adapter"),
}
LEAF_NAMES = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
ACTIVATIONS: Mapping[str, Activation] = {"swish": "silu", "silu": "silu", "gelu": "gelu", "relu": "relu"}

_NAME = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d{1,4})\.(?P<module>attention_adapters|output_adapters)\.adapters\."
    r"(?P<adapter>[^.]+)\.(?P<leaf>adapter_(?:down\.0|up)\.(?:weight|bias))"
)
# The values of AdapterHub's fields that define the paper's variant, and those that disable other features.
FIXED_FIELDS: Mapping[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
}
_DISABLED_FIELDS: Mapping[str, Any] = {
    "phm_layer": False,
    "use_gating": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "leave_out": [],
}

_Key = tuple[str, str, int]  # module, leaf and layer


def read_bottleneck(config_path: Path, fields: Mapping[str, Any]) -> tuple[Bottleneck, dict[str, Any]]:
    """Reads a bottleneck adapter.

    Args:
      config_path: its adapter_config.json; the weights are in the same directory.
      fields: the contents of that file.

    Returns:
      The settings, and the adapter's tree for `bottleneck.attach`: f32, layers stacked, with `scaling` folded
      into `up` and `up_bias`.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter uses an unsupported feature, or tensors
        are missing, unexpected or of the wrong shape.
    """
    config = fields["config"]
    _check_supported(config_path, config)
    parts = [part for part, (_, field) in LOCATIONS.items() if config.get(field)]
    file = config_path.parent / WEIGHTS
    if not file.exists() and (config_path.parent / "pytorch_adapter.bin").exists():
        raise CheckpointError(
            f"{file}: missing; there is only pytorch_adapter.bin, a pickle: save it with use_safetensors=True"
        )
    stored = read_safetensors_header(file)
    names = _names_by_key(file, stored)
    layers = 1 + max((layer for _, _, layer in names), default=0)
    stacks: dict[tuple[str, str], list[_Key]] = {
        (part, name): [(LOCATIONS[part][0], leaf, layer) for layer in range(layers)]
        for part in parts
        for name, leaf in LEAF_NAMES.items()
    }
    required = {key for stack in stacks.values() for key in stack}
    if unexpected := [quote(names[key]) for key in names if key not in required]:
        raise CheckpointError(
            f"{file}: unexpected tensors according to {config_path.name}: {format_list(unexpected, 4)}"
        )
    if missing := [
        f"layers.{layer}.{module}.*.{leaf}" for module, leaf, layer in sorted(required - set(names))
    ]:
        raise CheckpointError(
            f"{file}: missing tensors: {format_list(missing, 4)}; an adapter must be the same in every layer"
        )
    size, width = (*stored[names[stacks[parts[0], "down"][0]]].shape, 0, 0)[:2]
    shapes = {"down": (size, width), "down_bias": (size,), "up": (width, size), "up_bias": (width,)}
    wrong_shapes = [
        f"{names[key]} {list(stored[names[key]].shape)} should be {list(shapes[name])}"
        for (_, name), stack in stacks.items()
        for key in stack
        if stored[names[key]].shape != shapes[name] or 0 in shapes[name]
    ]
    if wrong_shapes:
        raise CheckpointError(
            f"{file}: wrong shapes: {format_list(wrong_shapes, 3)}; all networks must have the same sizes"
        )
    tree: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for (part, name), stack in stacks.items():
        array = np.stack([read_f32(names[key], stored[names[key]]).T for key in stack])
        tree[part][name] = array * np.float32(config.get("scaling", 1.0)) if name.startswith("up") else array
    settings = Bottleneck(size, tuple(parts), ACTIVATIONS[config["non_linearity"].lower()])
    return settings, jax.tree.map(jnp.asarray, {"layers": tree})


def _names_by_key(file: Path, stored: Mapping[str, TensorInfo]) -> dict[_Key, str]:
    """Returns the stored names of an adapter's tensors.

    Raises:
      CheckpointError: for tensors that do not belong to the file's one adapter.
    """
    names: dict[_Key, str] = {}
    for name in stored:
        match = _NAME.fullmatch(name)
        key = (match["module"], match["leaf"], int(match["layer"])) if match else None
        if key is None or key in names:
            raise CheckpointError(
                f"{file}: unexpected tensor {quote(name)}; the file must hold exactly one adapter"
            )
        names[key] = name
    return names


def _check_supported(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses unsupported variants."""

    def error(key: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} is {quote(str(config.get(key)))}; {rule}")

    if config.get("architecture") is not None:
        raise error("architecture", "only AdapterHub's bottleneck adapters are supported")
    if str(config.get("non_linearity")).lower() not in ACTIVATIONS:
        raise error("non_linearity", f"it must be one of {', '.join(ACTIVATIONS)}")
    for key, expected in {**FIXED_FIELDS, **_DISABLED_FIELDS}.items():
        if config.get(key, expected) not in (expected, None):
            raise error(key, f"only {expected!r}, as in double_seq_bn, is supported")
    scaling = config.get("scaling", 1.0)
    if type(scaling) not in (int, float) or not -1e30 < scaling < 1e30:
        raise error("scaling", "it must be a number")
    if not any(config.get(field) is True for _, field in LOCATIONS.values()):
        raise error("output_adapter", "it or mh_adapter must be true")
