"""Multi-process initialization, the device mesh, and what `auto` settings mean on each platform."""

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

from .config.distributed import DistributedConfig
from .config.mesh import MeshConfig
from .config.train import TrainConfig


def join_processes(config: DistributedConfig) -> None:
    """Initializes `jax.distributed` before JAX is first used; does nothing in a single-process run.

    Addresses are configured, or detected by JAX on Cloud TPU, Slurm, Open MPI and Kubernetes.

    Raises:
      InputError: if the other processes cannot be reached.
    """
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
        elif _is_multi_process():
            # Open MPI 5 does not export the address of its first process; mpi4py asks that process for it.
            is_open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
            jax.distributed.initialize(
                cluster_detection_method="mpi4py" if is_open_mpi_5 else None,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        address = config.coordinator or "the launcher's coordinator"
        raise InputError(
            f"cannot join the other processes at {address}: {str(error).splitlines()[0]}; check or set "
            "distributed.coordinator, distributed.num_processes and distributed.process_id in every process"
        ) from None


def _is_multi_process() -> bool:
    """Whether a launcher that JAX supports has started this process as one of several.

    From the variables that JAX itself reads (jax/_src/clusters). `jax.distributed.initialize` in a process
    that is alone would fail, or bind a port that another such process on the machine also needs.
    """
    env = os.environ
    slurm = "SLURM_STEP_NODELIST" in env and env.get("SLURM_NTASKS", "1") != "1"
    mpi = env.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    kubernetes = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return slurm or mpi or kubernetes or _on_tpu_slice()


def _on_tpu_slice() -> bool:
    """Whether this is a host of a TPU slice that may have more; on Google Compute Engine JAX queries that."""
    env = os.environ
    if "MEGASCALE_COORDINATOR_ADDRESS" in env or "TPU_PROCESS_ADDRESSES_PATH" in env:
        return True
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts
    # JAX sets both itself: jax_platforms on hosts with TPU chips, the variable on hosts without.
    # private: tests/test_private_seams.py
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    return "tpu" in platforms and "TPU_SKIP_MDS_QUERY" not in env


def run_mesh(config: MeshConfig, devices: Any = None) -> Mesh | None:
    """The run's mesh; None for a single device.

    With several slices, `data` spans the slices first, so that only its gradient all-reduce crosses the
    data-center network.

    Raises:
      ConfigError: if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    try:
        sizes = mesh_sizes({name: getattr(config, name) for name in AXES}, len(devices))
    except ConfigError as error:
        raise ConfigError(f"{error}; set mesh.data, mesh.fsdp, mesh.context, mesh.tensor") from None
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if config.slices == 1 and num_slices > 1 and getattr(devices[0], "platform", "tpu") != "tpu":
        # A GPU's slice_index is its host: any axis may span hosts, and devices are in host order.
        return _explicit_mesh(np.asarray(devices).reshape(tuple(sizes.values())))
    if num_slices > config.slices:
        raise ConfigError(
            f"mesh.slices is {config.slices} and the devices are in {num_slices} slices; set mesh.slices to "
            f"{num_slices}"
        )
    if config.slices > 1:
        return _hybrid_mesh(sizes, config.slices, devices)
    return make_mesh(sizes, devices=devices) if len(devices) > 1 else None


def _hybrid_mesh(sizes: dict[str, int], slices: int, devices: Any) -> Mesh:
    """A mesh whose outermost factor of `data` is the slices."""
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh.data is {sizes['data']}, which is not a multiple of mesh.slices {slices}; make it one"
        )
    inner = (sizes["data"] // slices, *(sizes[name] for name in AXES[1:]))
    if getattr(devices[0], "slice_index", None) is None:  # simulated devices: by id
        grid = np.asarray(devices).reshape(slices * inner[0], *inner[1:])
    else:
        try:
            grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices)
        except ValueError as error:
            raise ConfigError(f"mesh.slices is {slices}: {str(error).splitlines()[0]}") from None
    return _explicit_mesh(grid)


def _explicit_mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def compute_dtype(config: TrainConfig, platform: str) -> jnp.dtype:
    """The dtype of matrix products and activations."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.bfloat16 if platform != "cpu" or _cpu_has_bf16() else jnp.float32)


def attention_backend(config: TrainConfig, platform: str) -> Backend:
    """The attention backend; `auto` is resolved by platform."""
    if config.attention != "auto":
        return config.attention
    return "splash" if platform == "tpu" else "blockwise"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
