"""FLOPs per token and peak FLOP/s of the devices, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets, by prefix of `device_kind`.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def flops_per_token(
    model: LlamaConfig, seq_len: int, *, causal: bool, frozen: bool = False, reference: bool = False
) -> float:
    """FLOPs of the forward and backward pass per token, without rematerialization.

    6 per weight of a matrix product (including the output projection, not the embedding lookup), and
    12 L N H T for attention's two products (PaLM, arXiv 2204.02311, appendix B), half of that if `causal`: a
    token attends to half of the sequence on average. Both conventions are in use; compare like with like.

    Args:
      model: the model's configuration.
      seq_len: T.
      causal: whether to count attention's masked half not at all.
      frozen: base weights are frozen under an adapter: no weight gradients, so 4 per weight instead of 6; the
        adapter's own weights are not counted.
      reference: a reference model's forward pass runs beside the policy's: 2 more per weight, and 4 L N H T.
    """
    lookup_only = model.has_output or model.labels  # a tied embedding is also the output projection
    embedding = model.vocab_size * model.hidden_size if lookup_only else 0
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    weights = model.num_params - embedding - norms
    attention = (
        (16 if reference else 12)
        * model.num_hidden_layers
        * model.num_attention_heads
        * model.head_dim
        * seq_len
    )
    return (6 - 2 * frozen + 2 * reference) * weights + attention * (0.5 if causal else 1.0)


def peak_flops(dtype: jnp.dtype) -> float:
    """Peak FLOP/s of all devices: from the data sheet, or measured with a matrix product, as on CPUs."""
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAK_FLOPS.items():
        if kind.startswith(name):
            return peak * jax.device_count()
    # Simulated CPU devices share the processor of their process.
    return _measured_flops(dtype) * (jax.process_count() if kind == "cpu" else jax.device_count())


def _measured_flops(dtype: jnp.dtype) -> float:
    size = 1024
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32))
        product(x).block_until_ready()
        fastest = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            product(x).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
