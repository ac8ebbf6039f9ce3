"""What a run on NVIDIA GPUs needs around JAX: environment, the step's compiler options, what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llama_jax import LlamaConfig
from llama_jax.ops import gpu_flags

# As JAX looks for them: bare metal, containers, WSL2.
_GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
_GPU_MODELS = Path("/proc/driver/nvidia/gpus")
_BEFORE_BLACKWELL = re.compile(r"\b([VPTKMLA]\d+|H100|H200|H800|H20|GH200|RTX [2-4]\d|RTX A\d|TITAN|Quadro)")


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, of JAX's use or not."""
    return any(Path(file).exists() for file in _GPU_FILES)


def prepare_environment() -> None:
    """Sets what `gpu_flags.environment` says where JAX may use a GPU; before JAX is first used."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if not has_nvidia_gpu() or (platforms and not {"cuda", "gpu"} & set(platforms.split(","))):
        return
    models = [path.read_text() for path in _GPU_MODELS.glob("*/information")]
    blackwell = bool(models) and not any(_BEFORE_BLACKWELL.search(text) for text in models)
    os.environ.update(gpu_flags.environment(os.environ, blackwell=blackwell))


def compile_step(lowered: Any, model: LlamaConfig) -> Any:
    """Compiles a lowered step, on NVIDIA GPUs with the options of `gpu_flags`; the executable."""
    device = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None or not re.fullmatch(r"\d+\.\d+", str(capability)):
        return lowered.compile()
    options: dict[str, Any] | None = gpu_flags.compiler_options(
        model,
        devices=jax.device_count(),
        compute_capability=capability,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    return compile_with_known(lowered, options)


def compile_with_known(lowered: Any, options: dict[str, Any] | None) -> Any:
    """Compiles with those of the options that this XLA knows; it names one that it does not know."""
    while options:
        try:
            return lowered.compile(compiler_options=options)
        except RuntimeError as error:
            if (fewer := gpu_flags.without_unknown(options, str(error))) is None:
                raise
            options = fewer
    return lowered.compile()


def note_unused_gpu(log: Callable[[str], None]) -> None:
    """Logs that this machine has an NVIDIA GPU that JAX does not use, and what to do."""
    if jax.devices()[0].platform != "cpu" or os.environ.get("JAX_PLATFORMS") or not has_nvidia_gpu():
        return
    log(f"this run uses the CPU, beside an NVIDIA GPU: {_why_unused()}; JAX_PLATFORMS=cpu silences this")


def _why_unused() -> str:
    jaxlib = importlib.metadata.version("jaxlib")
    found = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
        if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", distribution.metadata["Name"] or "")
    }
    if not any(name.endswith("plugin") for name in found):
        return "JAX has no CUDA plugin; pip install 'llama-jax[cuda]'"
    for name, version in sorted(found.items()):
        if version.split(".")[:3] != jaxlib.split(".")[:3]:
            return f"{name} is {version} and jaxlib {jaxlib}; pip install '{name}=={jaxlib}'"
    return "JAX's CUDA plugin does not start; JAX_PLATFORMS=cuda shows its error"
