"""What is set before JAX is first used, the device mesh, and what `auto` settings mean on each platform."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax import LlamaConfig
from llama_jax.attention import Backend
from llama_jax.console.exit_status import report_error
from llama_jax.errors import ConfigError, ExitStatus, InputError
from llama_jax.meshes import ALL_AXES, AXES, make_mesh, mesh_sizes
from llama_jax.ops.compiler_flags import LIBTPU_FLAGS, with_flags
from llama_jax.ops.cudnn_attention import refusal
from llama_jax.plan.chips import CHIPS, TPU_KINDS
from llama_jax.sharding import batch_parts

from . import gpu
from .config.distributed import DistributedConfig
from .config.mesh import MeshConfig
from .config.run import RunConfig
from .config.train import TrainConfig

_JAX_GIVES_UP_LATER = 60  # seconds
_MAX_SIMULATED = 64  # llama-jax plan checks the mesh of a pod
# PCI devices of vendor 0x1ae0, Google, as in JAX's own list (jax/_src/hardware_utils.py).
_TPU_PCI_DEVICES = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
_BACKEND_BYTES = 1 << 30  # of address space: JAX's CPU backend and its threads, before the first array


def start_jax(mesh: MeshConfig, distributed: DistributedConfig) -> None:
    """Prepares the environment for this machine's devices, and joins the other processes; before JAX is used.

    Raises:
      InputError: if there is too little memory, or the other processes cannot be reached.
    """
    set_compiler_flags()
    gpu.prepare_environment()
    simulate_devices(mesh, distributed)
    check_address_space()
    join_processes(distributed)


def check_address_space() -> None:
    """Checks that `ulimit -v` leaves room to start JAX, whose threads otherwise abort without a line of ours.

    Raises:
      InputError: if less than 1 GiB is left. What training itself lacks later, XLA reports.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")  # Linux; elsewhere only the limit is known
    used = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    if limit != resource.RLIM_INFINITY and limit - used < _BACKEND_BYTES:
        raise InputError(
            f"not enough memory: of the {limit / 1e9:.1f} GB of address space that `ulimit -v` allows, "
            f"{max(limit - used, 0) / 1e9:.1f} GB are left, and JAX takes 1.1 GB before the first array; "
            "raise the limit"
        )


def set_compiler_flags(pci: Path = Path("/sys/bus/pci/devices")) -> None:
    """Sets the XLA flags of this machine's accelerator, but for those that the user has set.

    To be called before JAX is first used: libtpu reads them when it is loaded.

    Args:
      pci: the folder in which the kernel lists the PCI devices.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    flags = with_flags(given, LIBTPU_FLAGS.get(_tpu_generation(pci), {}))
    if flags != given:
        os.environ["LIBTPU_INIT_ARGS"] = flags


def _tpu_generation(pci: Path) -> str:
    """The TPUs of this machine, such as `v5p`; empty without any."""
    for vendor in sorted(pci.glob("*/vendor")):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == "0x1ae0":
                device = vendor.with_name("device").read_text().strip()
                if device in _TPU_PCI_DEVICES:
                    return _TPU_PCI_DEVICES[device]
    return ""


def join_processes(config: DistributedConfig) -> None:
    """Initializes `jax.distributed` before JAX is first used; does nothing in a single-process run.

    Addresses are configured, or detected by JAX on Cloud TPU, Slurm, Open MPI and Kubernetes.

    Where one does not start, the others end after `distributed.join_seconds` with `ExitStatus.LOST`.

    Raises:
      InputError: if the addresses are wrong.
    """
    timer = threading.Timer(config.join_seconds, _give_up_joining, (config,))
    timer.daemon = True
    timer.start()
    try:
        if config.coordinator:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                initialization_timeout=config.join_seconds + _JAX_GIVES_UP_LATER,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
        elif _is_multi_process():
            # Open MPI 5 does not export the address of its first process; mpi4py asks that process for it.
            is_open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
            jax.distributed.initialize(
                cluster_detection_method="mpi4py" if is_open_mpi_5 else None,
                initialization_timeout=config.join_seconds + _JAX_GIVES_UP_LATER,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        address = config.coordinator or "the launcher's coordinator"
        raise InputError(
            f"cannot join the other processes at {address}: {str(error).splitlines()[0]}; check or set "
            "distributed.coordinator, distributed.num_processes and distributed.process_id in every process"
        ) from None
    finally:
        timer.cancel()


def _give_up_joining(config: DistributedConfig) -> None:
    """Ends this process with one line: JAX would abort it with a stack trace of its own, somewhat later."""
    count = f"all {config.num_processes} processes" if config.num_processes else "all processes"
    place = config.coordinator or "their coordinator"
    report_error(
        f"not {count} have met at {place} within {config.join_seconds} s: see whether the others have "
        "started and reach that address; or raise distributed.join_seconds"
    )
    sys.stderr.flush()
    os._exit(ExitStatus.LOST)


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


def simulate_devices(mesh: MeshConfig, distributed: DistributedConfig) -> None:
    """Gives the CPU backend as many simulated devices as the mesh of a single-process run needs.

    To be called before JAX is first used. It has no effect on a GPU or TPU, nor where the user has set the
    number (`XLA_FLAGS=--xla_force_host_platform_device_count=8`).
    """
    sizes = [size for name in ALL_AXES if (size := getattr(mesh, name)) > 0]
    count = math.prod(sizes)
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or not 1 < count <= _MAX_SIMULATED or distributed.coordinator or _is_multi_process():
        return
    with contextlib.suppress(RuntimeError):  # JAX has been used: the devices are as they are
        if jax.config.jax_num_cpu_devices < 0:  # type: ignore[attr-defined]  # not set by the user
            jax.config.update("jax_num_cpu_devices", count)


def run_mesh(config: MeshConfig, devices: Any = None) -> Mesh | None:
    """The run's mesh; None for a single device.

    With several slices, `data` spans the slices first, so that only its gradient all-reduce crosses the
    data-center network.

    Raises:
      ConfigError: if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    try:
        given = {name: getattr(config, name) for name in ALL_AXES}
        sizes = mesh_sizes(given, len(devices), platform=getattr(devices[0], "platform", ""))
    except ConfigError as error:
        raise ConfigError(f"{error}; set {', '.join(f'mesh.{name}' for name in AXES)}") from None
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if config.slices == 1 and num_slices > 1 and getattr(devices[0], "platform", "tpu") != "tpu":
        # A GPU's slice_index is its host: any axis may span hosts, and devices are in host order.
        return _explicit_mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes))
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
    inner = (sizes["data"] // slices, *(size for name, size in sizes.items() if name != "data"))
    if getattr(devices[0], "slice_index", None) is None:  # simulated devices: by id
        grid = np.asarray(devices).reshape(slices * inner[0], *inner[1:])
    else:
        create = functools.partial(
            mesh_utils.create_hybrid_device_mesh, inner, (slices, *(1,) * len(inner[1:])), devices
        )
        try:
            try:
                grid = create()
            except NotImplementedError:  # as in `make_mesh`
                grid = create(allow_split_physical_axes=True)
        except ValueError as error:
            raise ConfigError(f"mesh.slices is {slices}: {str(error).splitlines()[0]}") from None
    return _explicit_mesh(grid, tuple(sizes))


def _explicit_mesh(grid: np.ndarray, names: tuple[str, ...]) -> Mesh:
    return Mesh(grid, names, axis_types=(AxisType.Explicit,) * len(names))


def compute_dtype(config: TrainConfig, platform: str) -> jnp.dtype:
    """The dtype of matrix products and activations."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.bfloat16 if platform != "cpu" or _cpu_has_bf16() else jnp.float32)


def attention_backend(config: TrainConfig, platform: str) -> Backend:
    """The attention backend; `auto` is resolved by platform, for GPUs by `resolve_attention` before."""
    if config.attention != "auto":
        return config.attention
    return "splash" if platform == "tpu" else "blockwise"


def resolve_attention(
    run: RunConfig, model: LlamaConfig, mesh: Mesh | None, device: Any, log: Callable[[str], None]
) -> RunConfig:
    """The run with `train.attention` as its devices need it; logs why a GPU does without cuDNN's.

    Args:
      run: the configuration.
      model: the model's configuration.
      mesh: the mesh; None for a single device.
      device: one of the devices that the run is compiled for.
      log: prints a line.

    Raises:
      ConfigError: if attention was asked for by name that the devices do not have.
    """
    asked, train = run.train.attention, run.train
    if device.platform != {"splash": "tpu", "cudnn": "gpu"}.get(asked, device.platform):
        needs = "TPUs" if asked == "splash" else "NVIDIA GPUs"
        raise ConfigError(
            f'train.attention is "{asked}", which needs {needs}, and the device is {device.device_kind}; use '
            '"auto" or "blockwise"'
        )
    if device.platform != "gpu" or asked not in ("auto", "cudnn") or run.adapter.type == "prefix":
        return run
    axes = dict.fromkeys(AXES, 1) if mesh is None else dict(mesh.shape)
    why_not = refusal(
        batch=-(-train.global_batch_size // batch_parts(axes)),  # evaluation does not accumulate
        length=train.seq_len,
        heads=model.num_attention_heads // axes["tensor"],
        kv_heads=max(model.num_key_value_heads // axes["tensor"], 1),
        head_dim=model.head_dim,
        dtype=compute_dtype(train, device.platform),
        shards=axes["context"],
        device=device,
    )
    if why_not is not None and asked == "cudnn":
        raise ConfigError(f'train.attention is "cudnn": {why_not}; use "auto" or "blockwise"')
    if why_not is not None:
        log(f"cuDNN attention is not used: {why_not}")
    choice: Backend = "cudnn" if why_not is None else "blockwise"
    return dataclasses.replace(run, train=dataclasses.replace(train, attention=choice))


def check_quantization(train: TrainConfig, chip: str, *, has_fp8: bool) -> None:
    """Checks that the chip has units for the products that `train.quantization` asks for.

    Args:
      train: the section.
      chip: its name, for the error.
      has_fp8: whether it has units for fp8; all chips multiply int8.

    Raises:
      ConfigError: if it has none, and emulation is not allowed.
    """
    if train.quantization == "fp8" and not has_fp8 and not train.quantization_emulated:
        raise ConfigError(
            f'train.quantization is "fp8", which {chip} has no units for: TPU7x (Ironwood) has, and NVIDIA '
            'GPUs from Ada and Hopper on; use "int8", or allow slow products with train.quantization_emulated'
        )


def has_fp8(device: Any) -> bool:
    """Whether a device multiplies fp8; a CPU emulates it, and a TPU of an unknown kind is a newer one."""
    if device.platform == "gpu":  # an AMD GPU's is a name, such as gfx942
        capability = str(getattr(device, "compute_capability", ""))
        return not re.fullmatch(r"\d+\.\d+", capability) or tuple(map(int, capability.split("."))) >= (8, 9)
    known = [name for kind, name in TPU_KINDS.items() if device.device_kind.startswith(kind)]
    return device.platform != "tpu" or not known or CHIPS[known[0]].fp8_speed > 0


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
