"""Peak FLOP/s of the devices, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import time
import warnings

import jax
import jax.numpy as jnp

from llama_jax.plan.chips import CHIPS, TPU_KINDS

# Dense bf16 FLOP/s, from NVIDIA's data sheets.
_GPUS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
# Of one JAX device; the first prefix that fits counts.
_PEAK_FLOPS = {kind: CHIPS[name].peak_flops / CHIPS[name].devices for kind, name in TPU_KINDS.items()} | _GPUS


def peak_flops(dtype: jnp.dtype) -> float | None:
    """Peak FLOP/s of all devices: from the data sheet; of a CPU measured with a matrix product.

    None, with a warning, for an accelerator that the table does not have: a product of one size is no peak.
    None for simulated devices as well: they share the processor.
    """
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAK_FLOPS.items():
        if kind.startswith(name):
            return peak * jax.device_count()
    if kind != "cpu":
        if jax.process_index() == 0:
            warnings.warn(f"the peak FLOP/s of {kind!r} is not known: MFU is not reported", stacklevel=2)
        return None
    if jax.local_device_count() > 1:
        return None
    return _measured_flops(dtype) * jax.device_count()


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
