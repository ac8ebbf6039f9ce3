"""Processes, devices and their mesh; and what suits the platform where the configuration says `auto`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.attention import Backend
from llama_jax.errors import ConfigError, InputError
from llama_jax.sharding import AXES, make_mesh
from train.config import DistributedConfig, MeshConfig, TrainConfig

# Variables by which a launcher that JAX can read shows itself, with more than one process.
_LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "PMIX_NAMESPACE", "JOBSET_NAME")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


def join_processes(config: DistributedConfig) -> None:
    """Connects this process to the others of the run, before JAX is first used; alone, does nothing.

    Addresses are given, or detected by JAX on Cloud TPU, Slurm, Open MPI and Kubernetes.

    Raises:
      InputError: if the others cannot be reached.
    """
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.processes,
                config.process,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
        elif _launched_with_others():
            jax.distributed.initialize(heartbeat_timeout_seconds=config.heartbeat_seconds)
    except (RuntimeError, ValueError) as error:
        where = config.coordinator or "the launcher's coordinator"
        raise InputError(
            f"cannot join the other processes at {where}: {str(error).splitlines()[0]}; check "
            "distributed.coordinator, .processes and .process, which every process gives"
        ) from None


def _launched_with_others() -> bool:
    several = any("," in os.environ.get(name, "") for name in _TPU_HOSTS[:1]) or _TPU_HOSTS[1] in os.environ
    if os.environ.get("SLURM_NTASKS", "1") == "1" and "SLURM_NTASKS" in os.environ:
        return several
    return several or any(name in os.environ for name in _LAUNCHERS)


def run_mesh(config: MeshConfig, devices: Any = None) -> Mesh | None:
    """The mesh of a run: None for one device, which needs none.

    With several slices, `data` goes over the slices first, so that only its gradients' sum crosses the
    data-centre network.

    Raises:
      ConfigError: if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    try:
        mesh = make_mesh(sizes, devices=devices if config.slices == 1 else np.asarray(devices))
    except ConfigError as error:
        raise ConfigError(f"{error}; set mesh.data, mesh.fsdp, mesh.context, mesh.tensor") from None
    if config.slices > 1:
        mesh = _over_slices(dict(zip(AXES, mesh.axis_sizes, strict=True)), config.slices, devices)
    return mesh if math.prod(mesh.axis_sizes) > 1 else None


def _over_slices(sizes: dict[str, int], slices: int, devices: Any) -> Mesh:
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh.data is {sizes['data']}, not a multiple of mesh.slices {slices}, which divide it"
        )
    inner = (sizes["data"] // slices, *(sizes[name] for name in AXES[1:]))
    if getattr(devices[0], "slice_index", None) is None:  # simulated devices: slices in order of id
        grid = np.asarray(devices).reshape(slices * inner[0], *inner[1:])
    else:
        try:
            grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
        except ValueError as error:
            raise ConfigError(f"mesh.slices is {slices}: {str(error).splitlines()[0]}") from None
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compute_dtype(config: TrainConfig, platform: str) -> jnp.dtype:
    """The dtype of products and activations."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.bfloat16 if platform != "cpu" or _cpu_has_bf16() else jnp.float32)


def attention_backend(config: TrainConfig, platform: str) -> Backend:
    """The attention that suits the platform, unless one is named."""
    if config.attention != "auto":
        return config.attention
    return "splash" if platform == "tpu" else "blockwise"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
