"""The Flax modules of one Llama block: shells that own parameters; the maths is in plain functions.

Modules keep no state and know nothing of caches, scanning or rematerialisation: attention is handed
its `attend` function, and `model.py` decides the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import rope, sharding
from llama_jax.config import LlamaConfig

# (q [B,T,N,H], k [B,K,T,H], v [B,K,T,H]) -> (out [B,T,N,H], whatever the caller wants back)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in f32 (arXiv 1910.07467).

    No mean is subtracted and there is no bias. Returns x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def contract(equation: str, x: jax.Array, weight: jax.Array, *, stored: P, out: P) -> jax.Array:
    """einsum of an activation [B, T, ...] with a weight, computed in x's dtype, accumulated in f32.

    Args:
      equation: the einsum; its letters are the shapes.
      x: the activation, in the compute dtype.
      weight: the parameter, cast to the compute dtype and then gathered over `fsdp`.
      stored: the weight's row of the sharding table.
      out: the result's row.

    Returns:
      f32 [B, T, ...].
    """
    weight = sharding.gather(weight.astype(x.dtype), stored)
    layout = sharding.out_sharding(out, x.shape[:2] + (0,) * (len(out) - 2))
    rows = x.shape[0] * x.shape[1]
    if rows == 1 and x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        # XLA:CPU has a bf16 matmul but no bf16 matvec worth the name: two rows are 2-10x faster than one.
        x = jnp.concatenate([x, x], axis=1)
    result = jnp.einsum(
        equation,
        x,
        weight,
        preferred_element_type=jnp.float32,  # bf16 dots fall off XLA:CPU's fast path without it
        out_sharding=layout,
    )
    return result[:, :1] if rows == 1 else result


def project(equation: str, x: jax.Array, weight: jax.Array, *, stored: P, out: P) -> jax.Array:
    """`contract`, rounded to x's dtype."""
    return contract(equation, x, weight, stored=stored, out=out).astype(x.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in f32, in gate's dtype (arXiv 2002.05202)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def embed(table: jax.Array, tokens: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of the embedding table [V, D] for tokens int [B, T] -> [B, T, D] in `dtype`.

    Ids outside the vocabulary, negative ones too, give NaN rows rather than somebody else's embedding.
    """
    out = sharding.out_sharding(sharding.ACT_BTD, (*tokens.shape, 0))
    rows = jnp.asarray(table).at[tokens]
    return rows.get(out_sharding=out, mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(
        dtype
    )


def unembed(x: jax.Array, params: Any) -> jax.Array:
    """Hidden states [B, T, D] -> logits f32 [B, T, V], by `lm_head` or the tied embedding table."""
    if "lm_head" in params:
        equation, weight, stored = "btd,dv->btv", params["lm_head"]["kernel"], sharding.HEAD_DV
    else:
        equation, weight, stored = "btd,vd->btv", params["embed"]["embedding"], sharding.EMBEDDING_VD
    return contract(equation, x, weight, stored=stored, out=sharding.LOGITS_BTV)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale [D]."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(
            x, self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), eps=self.eps
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: wq [D,N,H], wk and wv [D,K,H], wo [N,H,D]."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: rope.Rotary, attend: Attend) -> tuple[jax.Array, Any]:
        c = self.config
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        wq = self.param("wq", _normal(), (d, n, h))
        wk = self.param("wk", _normal(), (d, k, h))
        wv = self.param("wv", _normal(), (d, k, h))
        wo = self.param("wo", _residual_normal(c), (n, h, d))

        q = project("btd,dnh->btnh", x, wq, stored=sharding.WQ_DNH, out=sharding.ACT_BTNH)
        keys = project("btd,dkh->btkh", x, wk, stored=sharding.WKV_DKH, out=sharding.ACT_BTNH)
        values = project("btd,dkh->btkh", x, wv, stored=sharding.WKV_DKH, out=sharding.ACT_BTNH)
        q, keys = rope.rotate(q, table), rope.rotate(keys, table)
        # Every query needs every key before it, so `context` is gathered here and nowhere else.
        keys, values = (
            sharding.constrain(kv.transpose(0, 2, 1, 3), sharding.CACHE_BKSH) for kv in (keys, values)
        )
        out, kept = attend(q, keys, values)
        out = checkpoint_name(out, "attention_out")
        # As one matrix [N*H, D]: contracting two axes of wo makes XLA:CPU transpose it at every token.
        out, wo = out.reshape(*x.shape[:2], n * h), wo.reshape(n * h, d)
        return project("btf,fd->btd", out, wo, stored=sharding.DOWN_FD, out=sharding.ACT_BTD), kept


class FeedForward(nn.Module):
    """SwiGLU: w_down (silu(w_gate x) * w_up x), w_gate and w_up [D,F], w_down [F,D]."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        w_gate = self.param("w_gate", _normal(), (d, f))
        w_up = self.param("w_up", _normal(), (d, f))
        w_down = self.param("w_down", _residual_normal(self.config), (f, d))
        gate = project("btd,df->btf", x, w_gate, stored=sharding.GATE_UP_DF, out=sharding.ACT_BTF)
        up = project("btd,df->btf", x, w_up, stored=sharding.GATE_UP_DF, out=sharding.ACT_BTF)
        return project("btf,fd->btd", swiglu(gate, up), w_down, stored=sharding.DOWN_FD, out=sharding.ACT_BTD)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, table: rope.Rotary, attend: Attend) -> tuple[jax.Array, Any]:
        eps = self.config.rms_norm_eps
        attention, kept = Attention(self.config, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), table, attend
        )
        x = x + attention
        return x + FeedForward(self.config, name="feed_forward")(RMSNorm(eps, name="ffn_norm")(x)), kept


def _normal() -> nn.initializers.Initializer:
    # Meta does not publish its initialisation; 0.02 is Hugging Face's `initializer_range` for Llama.
    return nn.initializers.normal(0.02, dtype=jnp.float32)


def _residual_normal(config: LlamaConfig) -> nn.initializers.Initializer:
    # GPT-2's rule: what 2L layers add to the residual stream has the variance of one.
    return nn.initializers.normal(0.02 / (2 * config.num_hidden_layers) ** 0.5, dtype=jnp.float32)
