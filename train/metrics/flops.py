"""How many operations a token costs, and how many a device can do: what MFU is made of."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig

# Dense bf16 FLOP/s of one JAX device, from the makers' data sheets, by the beginning of `device_kind`.
_PEAKS = {
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
    """Operations of a forward and backward pass for each token, rematerialisation not counted.

    6 for every weight of a matrix product (the output projection included, the embedding look-up not), and
    12 L N H T for attention's two products (PaLM, arXiv 2204.02311, appendix B), half of it if `causal`: a
    token sees half of the row on average. Both conventions are in use; compare like with like.

    Weights that are `frozen` under an adapter have no gradient, 4 in place of 6, and the adapter's own are
    not counted; a `reference` model's forward pass beside the policy's is 2 more, and 4 more of attention.
    """
    looked_up = model.has_output or model.labels  # alone: a tied table is the output projection too
    embedding = model.vocab_size * model.hidden_size if looked_up else 0
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
    """FLOP/s of all devices: the data sheet's, or, as for a CPU, what a matrix product reaches here."""
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAKS.items():
        if kind.startswith(name):
            return peak * jax.device_count()
    # Simulated devices share the processor of their process.
    return _measured(dtype) * (jax.process_count() if kind == "cpu" else jax.device_count())


def _measured(dtype: jnp.dtype) -> float:
    size = 1024
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32))
        product(x).block_until_ready()
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
