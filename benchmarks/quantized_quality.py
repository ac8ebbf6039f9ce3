"""Perplexity of quantized weights and cache: `python -m benchmarks.quantized_quality --text FILE [--json]`.

SmolLM2-135M reads the text in windows, through a KV cache as decoding does, once per dtype of weights and
cache; all dtypes read the same windows.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import llama_jax as lj
from llama_jax import kv_cache as kv
from llama_jax.model import forward_cached

CHUNK = 256  # tokens per forward pass
# Bits of the weights, dtype of the cache, and the maximum rise of perplexity above f32, in percent.
VARIANTS: dict[str, tuple[Any, str, float | None]] = {
    "f32": (None, "float32", None),
    "8-bit weights": (8, "float32", 0.5),
    "4-bit weights": (4, "float32", 5.0),
    "int8 cache": (None, "int8", 0.5),
    "fp8 cache": (None, "float8_e4m3fn", 1.0),
    "bf16 cache": (None, "bfloat16", None),
    "8-bit weights, int8 cache": (8, "int8", None),
}


@functools.partial(jax.jit, static_argnames=("config", "cache_dtype"))
def negative_log_likelihood(
    config: lj.LlamaConfig, params: Any, windows: jax.Array, cache_dtype: str
) -> jax.Array:
    """Sum of -log p over every token but the first of each of windows int32 [B, T + 1]."""
    batch, length = windows.shape[0], windows.shape[1] - 1

    def chunk(carry: tuple[jax.Array, kv.KVCache], offset: jax.Array) -> Any:
        total, cache = carry
        ids = jax.lax.dynamic_slice_in_dim(windows, offset, CHUNK + 1, axis=1)
        start = jnp.full(batch, offset)
        logits, cache = forward_cached(config, params, ids[:, :-1], start, cache, used=offset + CHUNK)
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return (total + (jax.nn.logsumexp(logits, axis=-1) - picked).sum(), cache), None

    empty = kv.init_cache(config, batch, length, cache_dtype)
    (total, _), _ = jax.lax.scan(chunk, (jnp.zeros(()), empty), jnp.arange(0, length, CHUNK))
    return total


def measure(model: lj.Model, text: str, tokens: int, window: int, batch: int) -> list[dict[str, Any]]:
    """Perplexity of each variant on the first `tokens` tokens of the text."""
    count = tokens // (window * batch) * batch
    ids = np.array(model.tokenizer.encode(text)[: count * window + 1], np.int32)
    if len(ids) <= count * window or not count:
        raise SystemExit(
            f"error: the text has {len(ids)} tokens; {max(count, batch) * window + 1} are needed"
        )
    windows = np.stack([ids[i * window : (i + 1) * window + 1] for i in range(count)])
    results: list[dict[str, Any]] = []
    for name, (bits, cache_dtype, goal) in VARIANTS.items():
        params = model.params if bits is None else lj.quantize(model.params, bits)
        run = functools.partial(negative_log_likelihood, model.config, params, cache_dtype=cache_dtype)
        batches = windows.reshape(-1, batch, window + 1)
        total = sum(float(run(jnp.asarray(rows))) for rows in track(batches, name, transient=True))
        perplexity = math.exp(total / (count * window))
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        rise = 100 * (perplexity / results[0]["perplexity"] - 1) if results else 0.0
        results.append(
            {
                "name": name,
                "tokens": count * window,
                "perplexity": perplexity,
                "rise_percent": rise,
                "goal_percent": goal,
                "weight_bytes": nbytes,
                "cache_bytes_per_position": kv_bytes(model.config, cache_dtype),
            }
        )
    return results


def kv_bytes(config: lj.LlamaConfig, dtype: str) -> int:
    """Bytes of keys and values of one position, scales included."""
    shapes = jax.eval_shape(lambda: kv.init_cache(config, 1, 1, dtype))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Perplexity of quantized weights and KV caches, compared with f32."
    )
    parser.add_argument("--text", type=Path, required=True, help="a file of English")
    parser.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    parser.add_argument("--tokens", type=int, default=100_352, help="tokens to read (default: 100352)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context (default: 1024)")
    parser.add_argument("--batch", type=int, default=2, help="batch size (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    model = lj.load(args.model, scan_layers=False)
    text = args.text.read_text(encoding="utf-8")
    results = measure(model, text, args.tokens, args.window, args.batch)
    if args.json:
        print(json.dumps({"text": args.text.name, "window": args.window, "results": results}, indent=1))
        return
    table = Table(title=f"{args.model}, {results[0]['tokens']} tokens of {args.text.name}")
    for column in ("", "perplexity", "above f32", "goal", "weights", "cache per position"):
        table.add_column(column, justify="right" if column else "left")
    for row in results:
        goal = row["goal_percent"]
        table.add_row(
            row["name"],
            f"{row['perplexity']:.4f}",
            f"{row['rise_percent']:+.2f}%",
            "" if goal is None else f"{goal}%",
            f"{row['weight_bytes'] / 1e6:.0f} MB",
            f"{row['cache_bytes_per_position'] / 1e3:.1f} kB",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
