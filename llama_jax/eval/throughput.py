"""How fast a model runs here, beside how fast it could: tokens/s and the share of memory bandwidth.

Decoding one row reads every weight once a token, so memory bandwidth bounds it: tokens/s x bytes per
token <= bandwidth. All three are measured here.
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
from llama_jax.decoding.arguments import capacity
from llama_jax.decoding.generation import generate
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError

DECODE_PROMPT = 18  # tokens before the decoded ones; short, as in a chat's first turn


@dataclasses.dataclass(frozen=True)
class Speed:
    """What `measure` found; each time behind it is the median of the repeats.

    Attributes:
      batch: rows decoded together.
      prompt_tokens: tokens a row in the prefill measurement.
      new_tokens: tokens a row in the decoding measurement, after a prompt of 18.
      prefill_tokens_per_second: of all rows together.
      decode_tokens_per_second: of all rows together.
      bytes_per_step: weights and key/value cache that one decoding step reads.
      bytes_per_second: bytes_per_step times steps a second.
      memory_bandwidth: bytes/s, the better of `memory_bandwidth()` before and after.
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
    less that of the first, so neither holds the other. A first run of each, which compiles, does not count.

    Args:
      config: the model.
      params: its parameters, unstacked, or each call copies them.
      batch: rows at once.
      prompt_tokens: of the prefill; None is 512, or half the model's context if that is less.
      new_tokens: to decode, at least 2; None is 128, or half the model's context if that is less.
      repeats: of each measurement.

    Raises:
      InputError: for fewer than 2 new tokens, or more positions than the model's context.
    """
    half = config.max_position_embeddings // 2
    prompt_tokens = min(512, half) if prompt_tokens is None else prompt_tokens
    new_tokens = min(128, half) if new_tokens is None else new_tokens
    if new_tokens < 2:
        raise InputError(f"new_tokens is {new_tokens}; decoding speed needs at least 2")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, max(prompt_tokens, DECODE_PROMPT)))

    def run(prompt: int, new: int) -> float:
        tokens, lengths = jnp.asarray(ids[:, :prompt], jnp.int32), jnp.full((batch,), prompt, jnp.int32)
        key, greedy = jax.random.key(0), Sampling(temperature=0.0)
        work = functools.partial(generate, config, params, tokens, lengths, key, greedy, max_new_tokens=new)
        return statistics.median(_seconds(work, repeats))

    bandwidth = memory_bandwidth()
    prefill = run(prompt_tokens, 1)
    step = (run(DECODE_PROMPT, new_tokens) - run(DECODE_PROMPT, 1)) / (new_tokens - 1)
    streamed = bytes_per_step(config, params, batch, capacity(DECODE_PROMPT + new_tokens))
    bandwidth = max(bandwidth, memory_bandwidth())  # twice, lest a busy moment make decoding look better
    return Speed(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=batch * prompt_tokens / prefill,
        decode_tokens_per_second=batch / step,
        bytes_per_step=streamed,
        bytes_per_second=streamed / step,
        memory_bandwidth=bandwidth,
        bandwidth_share=streamed / step / bandwidth,
    )


def bytes_per_step(config: LlamaConfig, params: dict[str, Any], batch: int, cache_length: int) -> int:
    """Returns the bytes that one decoding step reads: each weight once, and the whole key/value cache.

    An untied embedding table is read one row a token, which does not count.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_word_embeddings:
        weights -= params["embed"]["embedding"].nbytes
    itemsize = params["embed"]["embedding"].dtype.itemsize
    return weights + kv_cache_bytes(config, batch, cache_length, itemsize)


def kv_cache_bytes(config: LlamaConfig, batch: int, length: int, itemsize: int) -> int:
    """Returns the bytes of keys and values: 2 L B S K H itemsize."""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    return batch * length * per_position


def memory_bandwidth(nbytes: int = 1 << 29) -> float:
    """Measures how fast the default device reads memory, in bytes/s.

    The fastest of 7 sums over one float32 array far larger than any cache, on all of the device's cores.
    """
    array = jnp.ones((nbytes // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    return nbytes / min(_seconds(lambda: total(array), 7))


def peak_host_memory() -> int:
    """Returns the most memory this process has held so far, in bytes."""
    try:  # Linux; getrusage would count what the parent process held before exec
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    jax.block_until_ready(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return seconds
