"""Reads bottleneck adapters in AdapterHub's format: adapter_config.json and adapter.safetensors.

Only what stands behind a layer's attention or feed-forward network and reads its output, as in the paper
(Houlsby et al., arXiv 1902.00751; AdapterHub's `double_seq_bn`), is taken; any other kind is refused by the
field that makes it one.
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
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import TensorInfo, brief, quote, read_f32

WEIGHTS = "adapter.safetensors"
# Where AdapterHub puts them, the field that says whether they are there, and what it calls their leaves.
PLACES = {
    "attention": ("attention_adapters", "mh_adapter"),
    "feed_forward": ("output_adapters", "output_adapter"),
}
LEAVES = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}
ACTIVATIONS: Mapping[str, Activation] = {"swish": "silu", "silu": "silu", "gelu": "gelu", "relu": "relu"}

_NAME = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d{1,4})\.(?P<place>attention_adapters|output_adapters)\.adapters\."
    r"(?P<adapter>[^.]+)\.(?P<leaf>adapter_(?:down\.0|up)\.(?:weight|bias))"
)
# What an adapter of the paper's is by; and what makes one another, with the value that does not.
PLAIN: Mapping[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
}
_UNUSED: Mapping[str, Any] = {
    "phm_layer": False,
    "use_gating": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "leave_out": [],
}

_At = tuple[str, str, int]  # place, leaf and layer


def read_bottleneck(description: Path, fields: Mapping[str, Any]) -> tuple[Bottleneck, dict[str, Any]]:
    """Reads an adapter.

    Args:
      description: its adapter_config.json; the tensors lie beside it.
      fields: what that holds.

    Returns:
      Its settings, and its tree as `bottleneck.attach` takes it: f32, layers stacked, its scaling put into
      `up` and `up_bias`.

    Raises:
      CheckpointError: if a file is missing or malformed, if the adapter does what llama_jax does not, or if
        tensors are missing, unexpected or of the wrong shape.
    """
    config = fields["config"]
    _check(description, config)
    parts = [part for part, (_, field) in PLACES.items() if config.get(field)]
    file = description.parent / WEIGHTS
    if not file.exists() and (description.parent / "pytorch_adapter.bin").exists():
        raise CheckpointError(
            f"{file}: is not there, only pytorch_adapter.bin, a pickle; save it with use_safetensors=True"
        )
    stored = read_safetensors_header(file)
    found = _find(file, stored)
    layers = 1 + max((layer for _, _, layer in found), default=0)
    stacks: dict[tuple[str, str], list[_At]] = {
        (part, name): [(PLACES[part][0], leaf, layer) for layer in range(layers)]
        for part in parts
        for name, leaf in LEAVES.items()
    }
    wanted = {at for stack in stacks.values() for at in stack}
    if unexpected := [quote(found[at]) for at in found if at not in wanted]:
        raise CheckpointError(f"{file}: unexpected tensors by {description.name}: {brief(unexpected, 4)}")
    if missing := [f"layers.{layer}.{place}.*.{leaf}" for place, leaf, layer in sorted(wanted - set(found))]:
        raise CheckpointError(
            f"{file}: missing tensors: {brief(missing, 4)}; an adapter here is the same in every layer"
        )
    size, width = (*stored[found[stacks[parts[0], "down"][0]]].shape, 0, 0)[:2]
    shapes = {"down": (size, width), "down_bias": (size,), "up": (width, size), "up_bias": (width,)}
    wrong = [
        f"{found[at]} {list(stored[found[at]].shape)} should be {list(shapes[name])}"
        for (_, name), stack in stacks.items()
        for at in stack
        if stored[found[at]].shape != shapes[name] or 0 in shapes[name]
    ]
    if wrong:
        raise CheckpointError(f"{file}: wrong shapes: {brief(wrong, 3)}; every network has the same here")
    made: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for (part, name), stack in stacks.items():
        array = np.stack([read_f32(found[at], stored[found[at]]).T for at in stack])
        made[part][name] = array * np.float32(config.get("scaling", 1.0)) if name.startswith("up") else array
    settings = Bottleneck(size, tuple(parts), ACTIVATIONS[config["non_linearity"].lower()])
    return settings, jax.tree.map(jnp.asarray, {"layers": made})


def _find(file: Path, stored: Mapping[str, TensorInfo]) -> dict[_At, str]:
    """The names of an adapter's tensors by what they are.

    Raises:
      CheckpointError: for tensors that are none of one adapter's.
    """
    found: dict[_At, str] = {}
    for name in stored:
        match = _NAME.fullmatch(name)
        at = (match["place"], match["leaf"], int(match["layer"])) if match else None
        if at is None or at in found:
            raise CheckpointError(
                f"{file}: unexpected tensor {quote(name)}; it must hold one adapter's networks alone"
            )
        found[at] = name
    return found


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses what cannot be represented."""

    def error(key: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} is {quote(str(config.get(key)))}; {rule}")

    if config.get("architecture") is not None:
        raise error("architecture", "of AdapterHub's adapters only bottlenecks can be read")
    if str(config.get("non_linearity")).lower() not in ACTIVATIONS:
        raise error("non_linearity", f"it must be one of {', '.join(ACTIVATIONS)}")
    for key, plain in {**PLAIN, **_UNUSED}.items():
        if config.get(key, plain) not in (plain, None):
            raise error(key, f"only {plain!r}, as in double_seq_bn, can be read")
    scaling = config.get("scaling", 1.0)
    if type(scaling) not in (int, float) or not -1e30 < scaling < 1e30:
        raise error("scaling", "only a number can be read")
    if not any(config.get(field) is True for _, field in PLACES.values()):
        raise error("output_adapter", "it or mh_adapter must be true")
