"""The Flax modules of one Llama block: shells that own parameters; the maths is in plain functions.

Modules keep no state and know nothing of caches, scanning or rematerialisation: attention is handed
its `attend` function, and `model.py` decides the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import rope, sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.ops import spmd
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.linear import contract, project, swiglu, swiglu_down, through
from llama_jax.ops.products import materialize_cotangent, row_major
from llama_jax.ops.quantization import Quantized

# (q [B,T,N,H], k [B,K,T,H], v [B,K,T,H]) -> (out [B,T,N,H], whatever the caller wants back); with a prefix
# on the layer, an `attention.KeyValues` is the fourth argument.
Attend = Callable[..., tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in f32 (arXiv 1910.07467).

    No mean is subtracted and there is no bias. Returns x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def embed(table: jax.Array | Quantized, tokens: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of the embedding table [V, D] for tokens int [B, T] -> [B, T, D] in `dtype`.

    Ids outside the vocabulary, negative ones too, give NaN rows rather than somebody else's embedding.
    """
    out = sharding.out_sharding(sharding.ACT_BTD, (*tokens.shape, 0))
    if isinstance(table, Quantized):
        return table.rows(tokens, out).astype(dtype)
    rows = jnp.asarray(table).at[tokens]
    return rows.get(out_sharding=out, mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(
        dtype
    )


def embed_custom_vjp(
    table: jax.Array | Quantized, tokens: jax.Array, *, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`embed` for training: the table is gathered in `dtype`; its gradient is summed in f32."""
    if isinstance(table, Quantized):  # which is frozen
        return embed(table, tokens, dtype=dtype)
    return _embed(jnp.dtype(dtype), *spmd.pvary_all(table, tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    axes = sharding.explicit_axes()

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = table.at[_local_ids(table.shape[0], tokens, axes)]
        if "tensor" not in axes:  # ids outside the vocabulary give NaN, as in `embed`
            return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return jax.lax.psum(rows.get(mode="fill", fill_value=0, wrap_negative_indices=False), "tensor")

    # One device reads the rows it needs and no more; several each need the whole of their part.
    table = sharding.gather(table.astype(dtype), sharding.EMBEDDING_VD) if axes else table
    whole = P("tensor", None)
    return spmd.shard_map_or_call(local, (whole, sharding.TOKENS_BT), sharding.ACT_BTD)(table, tokens).astype(
        dtype
    )


def _embed_forward(dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> Any:
    return _embed(dtype, table, tokens), (table, tokens)


def _embed_backward(dtype: jnp.dtype, saved: Any, d_out: jax.Array) -> Any:
    table, tokens = saved
    axes = sharding.explicit_axes()
    vocabulary = table.shape[0] // axes.get("tensor", 1)

    def local(d_out: jax.Array, tokens: jax.Array) -> jax.Array:
        d_out, tokens = spmd.pvary_all(d_out, tokens)
        d_table = spmd.pvary_like(jnp.zeros((vocabulary, d_out.shape[-1]), jnp.float32), d_out)
        at = d_table.at[_local_ids(vocabulary, tokens, axes)]
        d_table = at.add(d_out.astype(jnp.float32), mode="drop", wrap_negative_indices=False)
        return spmd.reduce_scatter_grad(d_table, 1, axes)

    specs = (sharding.ACT_BTD, sharding.TOKENS_BT)
    return spmd.shard_map_or_call(local, specs, sharding.EMBEDDING_VD)(d_out, tokens).astype(
        table.dtype
    ), None


_embed.defvjp(_embed_forward, _embed_backward)


def _local_ids(vocabulary: int, tokens: jax.Array, axes: Mapping[str, int]) -> jax.Array:
    """Ids as rows of this device's part of the table, and out of its range where another has the row."""
    return tokens - jax.lax.axis_index("tensor") * vocabulary if "tensor" in axes else tokens


def output_matrix(params: Any) -> jax.Array | Quantized:
    """The output projection [D, V], or the tied embedding table [V, D].

    Raises:
      ConfigError: if the parameters are a classifier's, which has neither.
    """
    if "score" in params:
        raise ConfigError(
            f"the model is a classifier or reward model, with a head of {params['score']['kernel'].shape[1]} "
            "numbers and no output projection, so it predicts no tokens; ask llama_jax.train.scorer.Scorer for its "
            "numbers, or give a language model"
        )
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]


def unembed(x: jax.Array, params: Any) -> jax.Array:
    """Hidden states [B, T, D] -> logits f32 [B, T, V], by `lm_head` or the tied embedding table."""
    weight = output_matrix(params)
    if "lm_head" in params:
        return contract("btd,dv->btv", x, weight, stored=sharding.HEAD_DV, out=sharding.LOGITS_BTV)
    return contract("btd,vd->btv", x, weight, stored=sharding.EMBEDDING_VD, out=sharding.LOGITS_BTV)


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
    custom_vjp: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, table: rope.Rotary, attend: Attend) -> tuple[jax.Array, Any]:
        c, linear = self.config, functools.partial(project, custom_vjp=self.custom_vjp)
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        wq = _matrix(self, "wq", _normal(), (d, n, h))
        wk = _matrix(self, "wk", _normal(), (d, k, h))
        wv = _matrix(self, "wv", _normal(), (d, k, h))
        wo = _matrix(self, "wo", _residual_normal(c), (n, h, d))

        q = linear("btd,dnh->btnh", x, wq, stored=sharding.WQ_DNH, out=sharding.ACT_BTNH)
        keys = linear("btd,dkh->btkh", x, wk, stored=sharding.WKV_DKH, out=sharding.ACT_BTNH)
        values = linear("btd,dkh->btkh", x, wv, stored=sharding.WKV_DKH, out=sharding.ACT_BTNH)
        rotate = rope.rotate_custom_vjp if self.custom_vjp else rope.rotate
        q, keys = rotate(q, table), rotate(keys, table)
        q, keys, values = checkpoint_name(q, "q"), checkpoint_name(keys, "k"), checkpoint_name(values, "v")
        # Every query needs every key before it, so `context` is gathered here and nowhere else.
        keys, values = (
            sharding.constrain(kv.transpose(0, 2, 1, 3), sharding.CACHE_BKSH) for kv in (keys, values)
        )
        prefix: Any = self.get_variable("params", "prefix")
        out, kept = attend(q, keys, values, *(() if prefix is None else (prefix,)))
        if self.custom_vjp:  # TPU: the kernel's [B, N, T, H] is not turned into [B, T, N*H]
            return linear("btnh,nhd->btd", out, wo, stored=sharding.WO_NHD, out=sharding.ACT_BTD), kept
        # As one matrix [N*H, D]: contracting two axes of wo makes XLA:CPU transpose it at every token.
        out, wo = out.reshape(*x.shape[:2], n * h), wo.reshape(n * h, d)
        return linear("btf,fd->btd", out, wo, stored=sharding.DOWN_FD, out=sharding.ACT_BTD), kept


class FeedForward(nn.Module):
    """SwiGLU: w_down (silu(w_gate x) * w_up x), w_gate and w_up [D,F], w_down [F,D]."""

    config: LlamaConfig
    custom_vjp: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(project, custom_vjp=self.custom_vjp)
        d, f = self.config.hidden_size, self.config.intermediate_size
        w_gate = _matrix(self, "w_gate", _normal(), (d, f))
        w_up = _matrix(self, "w_up", _normal(), (d, f))
        w_down = _matrix(self, "w_down", _residual_normal(self.config), (f, d))
        gate = linear("btd,df->btf", x, w_gate, stored=sharding.GATE_UP_DF, out=sharding.ACT_BTF)
        up = linear("btd,df->btf", x, w_up, stored=sharding.GATE_UP_DF, out=sharding.ACT_BTF)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        if self.custom_vjp and isinstance(w_down, jax.Array):
            return swiglu_down(gate, up, w_down)
        y = swiglu(gate, up)
        return linear("btf,fd->btd", y, w_down, stored=sharding.DOWN_FD, out=sharding.ACT_BTD)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: LlamaConfig
    custom_vjp: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, table: rope.Rotary, attend: Attend) -> tuple[jax.Array, Any]:
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps)
        attention = Attention(self.config, self.custom_vjp, name="attention")
        feed_forward = FeedForward(self.config, self.custom_vjp, name="feed_forward")
        fast = self.custom_vjp
        x = row_major(x) if fast else x
        hand = materialize_cotangent if fast else lambda y: y
        y, kept = attention(hand(norm(name="attention_norm")(x)), table, attend)
        x = x + self._adapted(attention, y)
        y = feed_forward(hand(norm(name="ffn_norm")(x)))
        return x + self._adapted(feed_forward, y), kept

    def _adapted(self, part: nn.Module, y: jax.Array) -> jax.Array:
        """What a part gives, through the bottleneck adapter that may stand behind it."""
        network: Any = part.get_variable("params", "bottleneck")
        return y if network is None else through(network, y, custom_vjp=self.custom_vjp)


def _matrix(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Any:
    """A parameter that may be quantised or adapted, which Flax would take for one of another shape."""
    held: Any = module.get_variable("params", name)
    if isinstance(held, Quantized | Adapted):
        return held
    return module.param(name, initializer, shape)


def _normal() -> nn.initializers.Initializer:
    # Meta does not publish its initialisation; 0.02 is Hugging Face's `initializer_range` for Llama.
    return nn.initializers.normal(0.02, dtype=jnp.float32)


def _residual_normal(config: LlamaConfig) -> nn.initializers.Initializer:
    # GPT-2's rule: what 2L layers add to the residual stream has the variance of one.
    return nn.initializers.normal(0.02 / (2 * config.num_hidden_layers) ** 0.5, dtype=jnp.float32)
