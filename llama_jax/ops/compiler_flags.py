"""The TPU compiler's flags, by generation: THE one table. Those for GPUs are in `gpu_flags`.

libtpu reads them once, when it is loaded, from LIBTPU_INIT_ARGS. So they are set before JAX is first used
(`llama-jax train` does it), and whatever compiles for a TPU without having one sets the same. A flag that the
user has set stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# SparseCore runs all-gathers and reduce-scatters while the TensorCore computes. Without these flags the
# compiler makes every one of them synchronous on v5p and v6e; and a reduce-scatter over more than one side of
# a torus an all-reduce, which moves twice the bytes.
# The names are those of MaxText's recipes for v5p and v6e (AI-Hypercomputer/maxtext,
# benchmarks/xla_flags_library.py: ENABLE_SPARECORE_OFFLOADING_FOR_ALL_REDUCE_AND_ALL_GATHER), and of its
# recipes for several dimensions (2d and 3d all-gathers, nd reduce-scatters). Measured: docs/training.md.
_SPARSE_CORE = {
    # All-gathers as separate operations, not inside of products, where SparseCore cannot run them.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    # Otherwise a v5p slice of 256 chips or more all-reduces gradients with a dimension such as 28,672.
    "xla_tpu_check_legacy_constraints_in_reduce_scatter_legalizer": "false",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    "xla_tpu_enable_reduce_scatter_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disjoint_spmem": "false",
    "xla_sc_disable_megacore_partitioning": "true",
}

# Fast memory that one operation may use; the rest prefetches the operands of the next. With larger tiles
# products read less from HBM: by the compiler's cycles the 7B and 70B steps on v5p take a tenth less. The
# compiler takes three times as long. MaxText's value for dense models (the same file: _DENSE_VMEM_LIMIT); v4
# has a sixth of it and keeps the default.
_SCOPED_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}

# For LIBTPU_INIT_ARGS, by TPU generation.
LIBTPU_FLAGS: Mapping[str, Mapping[str, str]] = {
    "v5p": _SPARSE_CORE | _SCOPED_VMEM,
    "v6e": _SPARSE_CORE | _SCOPED_VMEM,
    # No SparseCore: of the same flags, the one that makes the TensorCore reduce-scatter over both sides.
    "v5e": {"xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true"} | _SCOPED_VMEM,
}


def with_flags(given: str, flags: Mapping[str, str]) -> str:
    """The value of an environment variable with `flags` added; those that it already sets are kept.

    Args:
      given: the variable's value, such as `--xla_a=1 --xla_b`.
      flags: values by name, without dashes.
    """
    names = set(re.findall(r"--(\w+)", given))
    added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    return " ".join([*given.split(), *added])
