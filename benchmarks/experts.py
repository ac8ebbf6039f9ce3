"""Times the experts' layer on this machine: dropless, with a capacity, and by `jax.lax.ragged_dot` alone.

`python -m benchmarks.experts [--tokens N ...] [--hidden D --ffn F --experts E --top K --dtype T]`
times one layer's forward pass, and for more than 64 tokens its gradient too, with random weights and routing;
the median of 5 runs. What is dropped at a capacity is printed beside its time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.ops.experts import experts, route, router_logits
from llama_jax.ops.swiglu import swiglu


def ragged(x: jax.Array, logits: jax.Array, *weights: jax.Array, top: int) -> jax.Array:
    """The same layer with `jax.lax.ragged_dot` on rows sorted by expert, without blocks."""
    rows = x.reshape(-1, x.shape[-1])
    mixture, ids = route(logits.reshape(len(rows), -1), top)
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = (ids.reshape(-1, 1) == jnp.arange(weights[0].shape[0])).sum(0)
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    taken = rows[order // top]
    gate, up = (product(taken, weight).astype(x.dtype) for weight in weights[:2])
    out = product(swiglu(gate, up), weights[2])[jnp.argsort(order)].reshape(*ids.shape, -1)
    return (mixture[..., None] * out).sum(1).astype(x.dtype).reshape(x.shape)


def seconds(function: Callable[..., Any], *args: jax.Array) -> float:
    """The median of 5 runs, after one that compiles."""
    compiled, times = jax.jit(function).lower(*args).compile(), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 1024])
    for name, value in (("hidden", 512), ("ffn", 1792), ("experts", 8), ("top", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    d, f, e, dtype = args.hidden, args.ffn, args.experts, jnp.dtype(args.dtype)
    keys = jax.random.split(jax.random.key(0), 5)
    normal: Any = partial(jax.random.normal, dtype=dtype)
    router, shapes = normal(keys[0], (d, e)), ((e, d, f), (e, d, f), (e, f, d))
    weights = [0.02 * normal(key, shape) for key, shape in zip(keys[1:], shapes, strict=False)]
    for count in args.tokens:
        x = normal(keys[4], (1, count, d))
        logits = router_logits(x, router)
        layer: Any = partial(experts, num_experts_per_tok=args.top, custom_vjp=True)
        forms: dict[str, Any] = {"dropless": layer, "ragged_dot": partial(ragged, top=args.top)}
        for factor in (1.0, 1.25, 2.0):
            room = min(-(-factor * count * args.top // e), count)
            sizes = (route(logits[0], args.top)[1].reshape(-1, 1) == jnp.arange(e)).sum(0)
            dropped = float(jnp.maximum(sizes - room, 0).sum() / (count * args.top))
            forms[f"capacity {factor}, {dropped:.1%} dropped"] = partial(layer, capacity_factor=factor)
        for name, form in forms.items():
            text = f"{count:6} tokens  {name:32} forward {1e3 * seconds(form, x, logits, *weights):9.2f} ms"
            if count > 64:
                total = lambda *args, form=form: form(*args).astype(jnp.float32).sum()  # noqa: E731
                gradient = jax.grad(total, argnums=(0, 2, 3, 4))
                text += f"  gradient {1e3 * seconds(gradient, x, logits, *weights):9.2f} ms"
            print(text, flush=True)


if __name__ == "__main__":
    main()
