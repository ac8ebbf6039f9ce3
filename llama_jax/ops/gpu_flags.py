"""What NVIDIA's users of JAX set for training: environment and XLA's compiler options, THE one table.

Environment variables are read when JAX opens its CUDA client. Compiler options are passed with the program
instead of in `XLA_FLAGS`: a process whose XLA does not know a flag of `XLA_FLAGS` is aborted, and some depend
on the model. What the user has set, here or there, stays as it is.

Sources, as read in November 2026:
  toolbox: NVIDIA/JAX-Toolbox, docs/GPU_performance.md ("Tips for High-Performance LLMs with JAX and XLA")
  llama2: NVIDIA/JAX-Toolbox, rosetta/rosetta/projects/maxtext/xla_flags/llama2-7b-1N8G.env
  maxtext: AI-Hypercomputer/maxtext, MaxText/configs/a3/llama_2_7b/1vm.sh (8 H100)
  jax: docs.jax.dev, "GPU performance tips"

Not taken over, and why: `xla_gpu_enable_triton_gemm=false` (llama2, maxtext; jax recommends the opposite):
XLA times both and takes the faster; `xla_disable_hlo_passes=rematerialization` (llama2, maxtext): it only
saves runs that would not fit; asynchronous collectives, their stream's priority and CUDA graphs are XLA's
defaults now (toolbox); NCCL's protocols are chosen by NCCL.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax

from llama_jax.config import LlamaConfig

MIB = 1 << 20

# XLA's share of the GPU's memory; JAX's default is 0.75 (toolbox, llama2: 0.9).
MEMORY_FRACTION = "0.9"
# Both names are read, and JAX refuses to start with both; the others choose another way to allocate.
_MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def environment(given: Mapping[str, str], *, blackwell: bool = False) -> dict[str, str]:
    """The variables to set before JAX opens its CUDA client.

    Args:
      given: the environment as it is.
      blackwell: whether the GPUs are Blackwell or newer.

    Returns:
      Those that `given` does not already decide.
    """
    added = {}
    if not any(name in given for name in _MEMORY_VARIABLES):
        added["XLA_CLIENT_MEM_FRACTION"] = MEMORY_FRACTION
    # One queue: kernels start in the order in which they were launched, so that a collective is not kept
    # waiting by the compute that it should run beside (toolbox, maxtext). Slower on Blackwell (toolbox).
    if not blackwell and "CUDA_DEVICE_MAX_CONNECTIONS" not in given:
        added["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return added


def compiler_options(
    model: LlamaConfig, *, devices: int, compute_capability: str, xla_flags: str = ""
) -> dict[str, Any]:
    """The XLA options of a training step on NVIDIA GPUs.

    Args:
      model: the model; collectives are combined up to the size of its layers.
      devices: the number of GPUs; all but one of the options concern collectives.
      compute_capability: of the GPUs, such as `9.0`.
      xla_flags: the value of `XLA_FLAGS`, whose flags are left out.
    """
    options: dict[str, Any] = {}
    if int(compute_capability.partition(".")[0]) >= 10:
        # CUDA graphs of these alone cost the least time to launch on Blackwell (toolbox).
        options["xla_gpu_enable_command_buffer"] = "FUSION,CUSTOM_CALL"
    if devices > 1:
        layer = _layer_bytes(model)
        options |= {
            # Collectives run beside compute (jax, toolbox, llama2, maxtext).
            "xla_gpu_enable_latency_hiding_scheduler": True,
            # A layer's weights are gathered during the layer before it (toolbox, llama2, maxtext). JAX 0.12
            # has no such options: there the optimization level below does it.
            "xla_gpu_enable_pipelined_all_gather": True,
            "xla_gpu_enable_pipelined_reduce_scatter": True,
            "xla_gpu_enable_pipelined_all_reduce": True,
            "xla_gpu_enable_while_loop_double_buffering": True,
            # At least a layer's weights and gradients at once (toolbox: 436 MB for 7B).
            "xla_gpu_all_gather_combine_threshold_bytes": layer,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": layer,
            # The sum over `data` once a step: as large as possible and still beside compute (llama2: 1 GiB).
            "xla_gpu_all_reduce_combine_threshold_bytes": 1024 * MIB,
        }
        if level := getattr(jax, "CompilerEffortLevel", None):
            options["optimization_level"] = level.O1  # "O1" (toolbox)
    given = set(re.findall(r"--(\w+)", xla_flags))
    return {name: value for name, value in options.items() if name not in given}


def without_unknown(options: Mapping[str, Any], message: str) -> dict[str, Any] | None:
    """`options` without the one that an XLA does not know, from its error; None if that is not the error."""
    found = re.search(r"No such compile option: '(\w+)'", message)
    if found is None or found[1] not in options:
        return None
    return {name: value for name, value in options.items() if name != found[1]}


def _layer_bytes(model: LlamaConfig) -> int:
    """Bytes of a layer's weights in bf16, rounded up to MiB."""
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    return -(-2 * model.hidden_size * (heads + 3 * model.intermediate_size) // MIB) * MIB
