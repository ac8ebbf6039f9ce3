"""Generation throughput in tokens/s, and the fraction of memory bandwidth that decoding reaches.

Decoding a single row reads every weight once per token, so memory bandwidth bounds it: tokens/s x bytes
per token <= bandwidth. All three are measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.decoding.arguments import cache_capacity
from llama_jax.decoding.generation import generate
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError
from llama_jax.kv_cache import layer_slots

DECODE_PROMPT = 18  # prompt tokens of the decoding measurement; short, as in a chat's first turn


@dataclasses.dataclass(frozen=True)
class Speed:
    """The result of `measure`; times are medians over the repeats.

    Attributes:
      batch: batch size.
      prompt_tokens: prompt tokens per row in the prefill measurement.
      new_tokens: generated tokens per row in the decoding measurement, after a prompt of 18.
      prefill_tokens_per_second: summed over the batch.
      decode_tokens_per_second: summed over the batch.
      bytes_per_step: bytes of weights and key/value cache that a decoding step reads.
      bytes_per_second: bytes_per_step times steps per second.
      memory_bandwidth: bytes/s, the larger of `memory_bandwidth()` before and after.
      bandwidth_share: bytes_per_second / memory_bandwidth.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    bytes_per_step: int
    bytes_per_second: float
    memory_bandwidth: float
    bandwidth_share: float


def measure(
    config: LlamaConfig,
    params: dict[str, Any],
    *,
    batch: int = 1,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
) -> Speed:
    """Measures greedy generation from random prompts.

    Prefill is the time to the first token after `prompt_tokens`; decoding is the time of `new_tokens`
    minus that of the first token, so neither includes the other. The first run of each compiles and is
    discarded.

    Args:
      config: the model.
      params: its parameters, unstacked; otherwise each call copies them.
      batch: batch size.
      prompt_tokens: prompt length of the prefill; None is 512, or half the model's context if that is less.
      new_tokens: tokens to decode, at least 2; None is 128, or half the model's context if that is less.
      repeats: runs of each measurement.

    Raises:
      InputError: for fewer than 2 new tokens, or more positions than the model's context.
    """
    half = config.max_position_embeddings // 2
    prompt_tokens = min(512, half) if prompt_tokens is None else prompt_tokens
    new_tokens = min(128, half) if new_tokens is None else new_tokens
    if new_tokens < 2:
        raise InputError(f"new_tokens is {new_tokens}; decoding speed needs at least 2")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, max(prompt_tokens, DECODE_PROMPT)))

    def generate_seconds(length: int, new_tokens: int) -> float:
        tokens, lengths = jnp.asarray(ids[:, :length], jnp.int32), jnp.full((batch,), length, jnp.int32)
        arguments = config, params, tokens, lengths, jax.random.key(0), Sampling(temperature=0.0)
        run = functools.partial(generate, *arguments, max_new_tokens=new_tokens)
        return statistics.median(_seconds(run, repeats))

    bandwidth = memory_bandwidth()
    prefill = generate_seconds(prompt_tokens, 1)
    decode = generate_seconds(DECODE_PROMPT, new_tokens) - generate_seconds(DECODE_PROMPT, 1)
    step = decode / (new_tokens - 1)
    step_bytes = bytes_per_step(config, params, batch, cache_capacity(DECODE_PROMPT + new_tokens))
    bandwidth = max(bandwidth, memory_bandwidth())  # twice: a busy machine would overstate the fraction
    return Speed(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=batch * prompt_tokens / prefill,
        decode_tokens_per_second=batch / step,
        bytes_per_step=step_bytes,
        bytes_per_second=step_bytes / step,
        memory_bandwidth=bandwidth,
        bandwidth_share=step_bytes / step / bandwidth,
    )


def bytes_per_step(config: LlamaConfig, params: dict[str, Any], batch: int, cache_length: int) -> int:
    """Returns the bytes that a decoding step reads: each weight once, and the whole key/value cache.

    An untied embedding table is not counted: a step reads one row of it per token.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_word_embeddings:
        weights -= params["embed"]["embedding"].nbytes
    itemsize = params["embed"]["embedding"].dtype.itemsize
    return weights + kv_cache_bytes(config, batch, cache_length, itemsize)


def kv_cache_bytes(config: LlamaConfig, batch: int, length: int, itemsize: int) -> int:
    """Returns the bytes of keys and values: 2 L B S K H itemsize; S is smaller in layers with a window."""
    slots = sum(layer_slots(kind.window, length) for kind in config.layer_kinds)
    return 2 * batch * slots * config.num_key_value_heads * config.head_dim * itemsize


def memory_bandwidth(nbytes: int = 1 << 29) -> float:
    """Measures the default device's memory read bandwidth in bytes/s.

    The fastest of 7 sums over a float32 array far larger than any processor cache, on all cores.
    """
    array = jnp.ones((nbytes // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    return nbytes / min(_seconds(lambda: total(array), 7))


def peak_host_memory() -> int:
    """Returns the peak resident memory of this process in bytes."""
    try:  # on Linux getrusage would include the parent's memory before exec
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds
