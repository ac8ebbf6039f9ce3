"""Public training runs on TPUs: what MaxText was given, and what was measured.

Each is a recipe of AI-Hypercomputer/maxtext (src/maxtext/configs/tpu, benchmarks/*_model_configs.py and
docs/reference/models/tiering.md, whose MFU counts attention in full, before its pull request 1988). Imports
nothing, so that `maxtext_dump` can read it in MaxText's environment.
"""

from __future__ import annotations

import dataclasses

# benchmarks/xla_flags_library.py
_VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"
_ASYNC = (
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
# The recipes fuse all-gathers into products everywhere, which libtpu 0.0.52 refuses but on v5e.
_FUSED_GATHERS = _ASYNC.replace("fuse_all_gather=false", "fuse_all_gather=true")
_DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
_REDUCE_SCATTER_LAYOUT = (
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 "
    "--xla_tpu_assign_all_reduce_scatter_layout=true"
)
_SPARSE_CORE_ALL_REDUCE = (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_all_reduce_offload_tracing=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_sc_enable_instruction_fusion=false --xla_sc_disjoint_spmem=false "
    "--xla_sc_disable_megacore_partitioning=true"
)
_HOST_OFFLOAD = (
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true --xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED --xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED --xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2"
)
# The recipe of 32B.
_V5P = (
    f"{_ASYNC} {_DATA_PARALLEL} --xla_tpu_megacore_fusion_allow_ags=false "
    "--xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true "
    "--xla_sc_disable_megacore_partitioning=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true"
)
_V5E = f"{_DATA_PARALLEL} {_FUSED_GATHERS}"
_TILES_4096 = {"sa_block_q": 1024, "sa_block_q_dkv": 2048, "sa_block_q_dq": 2048}
_TILES_8192 = {
    "sa_block_q": 2048,
    "sa_block_kv": 2048,
    "sa_block_kv_compute": 2048,
    "sa_block_q_dkv": 2048,
    "sa_block_kv_dkv": 2048,
    "sa_block_kv_dkv_compute": 2048,
    "sa_block_q_dq": 2048,
    "sa_block_kv_dq": 2048,
    "sa_use_fused_bwd_kernel": True,
}
_OFFLOADED = dict.fromkeys(("decoder_layer_input", "query_proj", "key_proj", "value_proj"), "offload")


@dataclasses.dataclass(frozen=True)
class Published:
    """A run.

    Attributes:
      title: for a table.
      slice_name: MaxText's `compile_topology`.
      topology: the same as `llama_jax.plan.topology` reads it.
      settings: of MaxText.
      flags: of libtpu.
      mfu: that was published, attention counted in full.
      source: where.
    """

    title: str
    slice_name: str
    topology: str
    settings: dict[str, object]
    flags: str
    mfu: float
    source: str


_README_V5P, _README_V5E = "configs/tpu/v5p/README.md", "configs/tpu/v5e/README.md"
_TIERING = "docs/reference/models/tiering.md"
_2048, _4096, _8192 = ({"max_target_length": length} for length in (2048, 4096, 8192))


def _scaled(scale: int, batch: int, remat: str, **more: object) -> dict[str, object]:
    return {
        "global_parameter_scale": scale,
        "per_device_batch_size": batch,
        "remat_policy": remat,
        **_2048,
        **more,
    }


def _model(name: str, batch: int, remat: str, **more: object) -> dict[str, object]:
    return {"model_name": name, "per_device_batch_size": batch, "remat_policy": remat, **more}


PUBLISHED = {
    "32b-v5p-128": Published(
        "32B, v5p-128",
        "v5p-128",
        "v5p:4x4x4",
        _scaled(32, 6, "minimal", ici_tensor_parallelism=4),
        _V5P,
        0.7147,
        _README_V5P,
    ),
    "64b-v5p-128": Published(
        "64B, v5p-128",
        "v5p-128",
        "v5p:4x4x4",
        _scaled(64, 3, "minimal", ici_tensor_parallelism=4),
        _V5P,
        0.7031,
        _README_V5P,
    ),
    "llama2-70b-v5p-128": Published(
        "Llama 2 70B, v5p-128",
        "v5p-128",
        "v5p:4x4x4",
        _model("llama2-70b", 4, "save_dot_except_mlpwi", **_4096),
        _V5P,
        0.65,
        "configs/tpu/v5p/llama2_70b.sh",
    ),
    "llama2-70b-v5p-1024": Published(
        "Llama 2 70B, 512 chips of v5p",
        "v5p-1024",
        "v5p:8x8x8",
        _model("llama2-70b", 4, "save_dot_except_mlpwi", **_4096),
        _V5P,
        0.654,
        _TIERING,
    ),
    "16b-v5e-256": Published(
        "16B, v5e-256",
        "v5e-256",
        "v5e:16x16",
        _scaled(16, 6, "full"),
        _V5E,
        0.611,
        _README_V5E,
    ),
    "32b-v5e-256": Published(
        "32B, v5e-256",
        "v5e-256",
        "v5e:16x16",
        _scaled(32, 4, "full"),
        _V5E,
        0.6686,
        _README_V5E,
    ),
    "llama2-70b-v6e-256": Published(
        "Llama 2 70B, v6e-256",
        "v6e-256",
        "v6e:16x16",
        _model(
            "llama2-70b",
            4,
            "full",
            ici_fsdp_parallelism=1,
            ici_fsdp_transpose_parallelism=-1,
            **_4096,
            **_TILES_4096,
        ),
        f"{_VMEM} {_ASYNC}",
        0.438,
        _TIERING,
    ),
    "llama3.1-8b-v6e-256": Published(
        "Llama 3.1 8B, v6e-256",
        "v6e-256",
        "v6e:16x16",
        _model("llama3.1-8b", 4, "custom", **_OFFLOADED, out_proj="offload", **_8192, **_TILES_8192),
        f"{_VMEM} {_REDUCE_SCATTER_LAYOUT} {_DATA_PARALLEL} {_ASYNC} {_SPARSE_CORE_ALL_REDUCE} "
        f"{_HOST_OFFLOAD}",
        0.4546,
        _TIERING,
    ),
    "llama3.1-70b-v6e-256": Published(
        "Llama 3.1 70B, v6e-256",
        "v6e-256",
        "v6e:16x16",
        _model("llama3.1-70b", 5, "custom", **_OFFLOADED, **_8192, **_TILES_8192),
        f"{_VMEM} {_REDUCE_SCATTER_LAYOUT} {_DATA_PARALLEL} {_ASYNC} {_HOST_OFFLOAD}",
        0.5033,
        _TIERING,
    ),
}
