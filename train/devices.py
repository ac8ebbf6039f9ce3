"""Processes, devices and their mesh; and what suits the platform where the configuration says `auto`."""

from __future__ import annotations

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
from llama_jax.sharding import AXES, make_mesh, mesh_sizes

from .config.run import DistributedConfig, MeshConfig, TrainConfig


def join_processes(config: DistributedConfig) -> None:
    """Connects this process to the others of the run, before JAX is first used; alone, does nothing.

    Addresses are given, or found by JAX on Cloud TPU, Slurm, Open MPI and Kubernetes.

    Raises:
      InputError: if the others cannot be reached.
    """
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
        elif _launched_with_others():
            # Open MPI 5 does not say where its first process is; mpi4py asks that process.
            new_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
            jax.distributed.initialize(
                cluster_detection_method="mpi4py" if new_mpi else None,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        where = config.coordinator or "the launcher's coordinator"
        raise InputError(
            f"cannot join the other processes at {where}: {str(error).splitlines()[0]}; check "
            "distributed.coordinator, .processes and .process, or give them, in every process"
        ) from None


def _launched_with_others() -> bool:
    """Whether a launcher that JAX can read has started this process as one of several.

    By the variables that JAX itself reads (jax/_src/clusters). Asked to join a process that is alone, JAX
    would fail, or take a port that another such process on the machine wants too.
    """
    env = os.environ
    slurm = "SLURM_STEP_NODELIST" in env and env.get("SLURM_NTASKS", "1") != "1"
    mpi = env.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return slurm or mpi or kubernetes or _on_tpu_slice()


def _on_tpu_slice() -> bool:
    """Whether this is a host of a TPU slice, which may have others: on Google Compute Engine JAX asks."""
    env = os.environ
    if "MEGASCALE_COORDINATOR_ADDRESS" in env or "TPU_PROCESS_ADDRESSES_PATH" in env:
        return True
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts
    # JAX sets both by itself: the platforms where there are chips, the variable where there are none.
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    return "tpu" in platforms and "TPU_SKIP_MDS_QUERY" not in env


def run_mesh(config: MeshConfig, devices: Any = None) -> Mesh | None:
    """The mesh of a run: None for one device, which needs none.

    With several slices, `data` goes over the slices first, so that only its gradients' sum crosses the
    data-centre network.

    Raises:
      ConfigError: if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    try:
        sizes = mesh_sizes({name: getattr(config, name) for name in AXES}, len(devices))
    except ConfigError as error:
        raise ConfigError(f"{error}; set mesh.data, mesh.fsdp, mesh.context, mesh.tensor") from None
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if config.slices == 1 and found > 1 and getattr(devices[0], "platform", "tpu") != "tpu":
        # A GPU's "slice" is its host: any axis may cross hosts, and devices come in their order.
        return _explicit(np.asarray(devices).reshape(tuple(sizes.values())))
    if found > config.slices:
        raise ConfigError(
            f"mesh.slices is {config.slices} and the devices are of {found} slices; set mesh.slices to "
            f"{found}"
        )
    if config.slices > 1:
        return _over_slices(sizes, config.slices, devices)
    return make_mesh(sizes, devices=devices) if len(devices) > 1 else None


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
    return _explicit(grid)


def _explicit(grid: np.ndarray) -> Mesh:
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
