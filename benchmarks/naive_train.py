"""A plain training step: library attention, automatic differentiation, all logits at once.

The baseline of `train_vs_hf.py`, with the model, parameters, optimizer and dtypes of the trainer's step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import llama_jax as lj
from llama_jax import rope


def logits(config: lj.LlamaConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """f32 [B, T, V] from bf16 products."""
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    table = rope.rotary(config, positions)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.rms_norm_eps) * scale

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        h, a = norm(x, w["attention_norm"]["scale"]), w["attention"]
        q = rope.rotate(jnp.einsum("btd,dnh->btnh", h, a["wq"]), table)
        k = rope.rotate(jnp.einsum("btd,dkh->btkh", h, a["wk"]), table)
        v = jnp.einsum("btd,dkh->btkh", h, a["wv"])
        x += jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), a["wo"])
        h, f = norm(x, w["ffn_norm"]["scale"]), w["feed_forward"]
        return x + (jax.nn.silu(h @ f["w_gate"]) * (h @ f["w_up"])) @ f["w_down"], None

    x = cast["embed"]["embedding"][tokens]
    x, _ = jax.lax.scan(layer, x, cast["layers"])
    x = norm(x, cast["final_norm"]["scale"])
    return jnp.einsum("btd,vd->btv", x, cast["embed"]["embedding"]).astype(jnp.float32)


def make_step(config: lj.LlamaConfig, optimizer: optax.GradientTransformation) -> Any:
    """(params, opt_state, tokens) -> (params, opt_state, loss), jitted and donated."""

    def step(params: Any, opt_state: Any, tokens: jax.Array) -> Any:
        def mean(params: Any) -> jax.Array:
            scores = logits(config, params, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

        loss, grads = jax.value_and_grad(mean)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))
