"""Programs lowered for NVIDIA GPUs on a machine without one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

CUSTOM_CALLS = tuple(
    f"__cudnn$fmha{scaled}Softmax{backward}" for scaled in ("", "ScaleBias") for backward in ("", "Backward")
)


@contextlib.contextmanager
def cudnn(version: int = 91500) -> Iterator[None]:
    """JAX takes cuDNN for installed, in this version; it asks before it traces attention by cuDNN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: version)
        yield


def lowered(jitted: Any, *args: Any, **kwargs: Any) -> str:
    """The StableHLO of a jitted function for CUDA, as JAX exports it."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    with cudnn():
        exported = jax.export.export(jitted, platforms=["cuda"], disabled_checks=allowed)(*args, **kwargs)
    return exported.mlir_module()


def attention_calls(text: str) -> tuple[int, int]:
    """The numbers of cuDNN's forward and backward calls in a program's text."""
    names = re.findall(r"custom_call @(__cudnn\$fmha\w+)", text)
    backward = sum(name.endswith("Backward") for name in names)
    return len(names) - backward, backward


def shapes(text: str) -> set[tuple[int, ...]]:
    """The shapes of all values of a program."""
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return {tuple(int(size) for size in shape.rstrip("x").split("x")) for shape in found}
