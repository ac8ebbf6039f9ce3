"""The Flax modules of one Llama block: they own the parameters; the maths is in plain functions.

Modules have no state. Caches, scanning and rematerialization are in `model.py`, which passes an `attend`
function to the attention module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax import rope, sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.eight_bits import EightBitWeight
from llama_jax.ops.embedding import embed_custom_vjp
from llama_jax.ops.experts import experts, router_logits
from llama_jax.ops.layouts import materialize_cotangent, row_major
from llama_jax.ops.linear import apply_bottleneck, contract, project_all, project_heads
from llama_jax.ops.quantization import Quantized
from llama_jax.ops.swiglu import swiglu_down
from llama_jax.taps import Tapping, untapped

# (q [B,T,N,H], k [B,K,T,H], v [B,K,T,H]) -> (out [B,T,N,H], auxiliary output); in a layer with a prefix also
# `prefix`, its `attention.KeyValues`, and with edits or captures `tap`.
Attend = Callable[..., tuple[jax.Array, Any]]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in f32 (arXiv 1910.07467).

    No mean is subtracted and there is no bias. Returns x's dtype.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def embed(
    table: jax.Array | Quantized, tokens: jax.Array, *, dtype: jax.typing.DTypeLike, custom_vjp: bool = False
) -> jax.Array:
    """Rows of the embedding table [V, D] for tokens int [B, T] -> [B, T, D] in `dtype`.

    An id outside the vocabulary, a negative one too, gives a row of NaN.
    """
    out_spec = sharding.out_sharding(sharding.ACT_BTD, (*tokens.shape, 0))
    if isinstance(table, Quantized):
        return table.take_rows(tokens, out_spec).astype(dtype)
    if custom_vjp:
        return embed_custom_vjp(table, tokens, dtype=dtype)
    rows = jnp.asarray(table).at[tokens]
    found = rows.get(out_sharding=out_spec, mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return found.astype(dtype)


def output_matrix(params: Any) -> jax.Array | Quantized:
    """The output projection [D, V], or the tied embedding table [V, D].

    Raises:
      ConfigError: if the parameters are a classifier's, which has neither.
    """
    if "score" in params:
        raise ConfigError(
            "the model is a classifier or reward model "
            f"with {params['score']['kernel'].shape[1]} outputs and no output projection, "
            "so it has no logits; use llama_jax.train.scorer.Scorer, or a language model"
        )
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]


def unembed(x: jax.Array, params: Any) -> jax.Array:
    """Hidden states [B, T, D] -> logits f32 [B, T, V], by `lm_head` or the tied embedding table."""
    weight = output_matrix(params)
    if "lm_head" in params:
        return contract("btd,dv->btv", x, weight, weight_spec=sharding.HEAD_DV, out_spec=sharding.LOGITS_BTV)
    return contract("btd,vd->btv", x, weight, weight_spec=sharding.EMBEDDING_VD, out_spec=sharding.LOGITS_BTV)


class RMSNorm(nn.Module):
    """`rms_norm` with its scale [D]."""

    eps: float
    custom_vjp: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = rms_norm(x, scale, eps=self.eps)
        return materialize_cotangent(y) if self.custom_vjp else y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: wq [D,N,H], wk and wv [D,K,H], wo [N,H,D].

    By configuration there are biases bq [N,H], bk and bv [K,H] and bo [D], and norms of queries and keys with
    scales [H]. Without a table of rotary angles, queries and keys are not rotated.
    """

    config: LlamaConfig
    custom_vjp: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, table: rope.Rotary | None, attend: Attend, tap: Tapping = untapped
    ) -> tuple[jax.Array, Any]:
        c = self.config
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        wq = _matrix(self, "wq", _normal(), (d, n, h))
        wk = _matrix(self, "wk", _normal(), (d, k, h))
        wv = _matrix(self, "wv", _normal(), (d, k, h))
        wo = _matrix(self, "wo", _residual_normal(c), (n, h, d))

        matrices = [
            ("btd,dnh->btnh", wq, sharding.WQ_DNH),
            ("btd,dkh->btkh", wk, sharding.WKV_DKH),
            ("btd,dkh->btkh", wv, sharding.WKV_DKH),
        ]
        q, keys, values = project_all(x, matrices, out_spec=sharding.ACT_BTNH, custom_vjp=self.custom_vjp)
        if c.qkv_bias:
            q, keys = _add_bias(self, "bq", q), _add_bias(self, "bk", keys)
            values = _add_bias(self, "bv", values)
        if c.qk_norm:
            q, keys = self._normalize("q_norm", q), self._normalize("k_norm", keys)
        if table is not None:
            rotate = functools.partial(rope.rotate, table=table, custom_vjp=self.custom_vjp)
            q, keys = rotate(q), rotate(keys)
        q, keys, values = tap("block.q", q), tap("block.k", keys), tap("block.v", values)
        q, keys, values = checkpoint_name(q, "q"), checkpoint_name(keys, "k"), checkpoint_name(values, "v")
        # A query reads all keys before it: `attend` moves them over `context`, and nothing else does.
        keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
        prefix: Any = self.get_variable("params", "prefix")
        more = {} if tap is untapped else {"tap": tap}
        out, aux = attend(q, keys, values, **more, **({} if prefix is None else {"prefix": prefix}))
        out = project_heads(tap("block.attention_heads", out), wo, custom_vjp=self.custom_vjp)
        return _add_bias(self, "bo", out) if c.out_bias else out, aux

    def _normalize(self, name: str, y: jax.Array) -> jax.Array:
        """RMSNorm of each head of y [B, T, N, H]; the heads share a scale [H]."""
        scale = self.param(name, nn.initializers.ones, y.shape[-1:], jnp.float32)
        return rms_norm(y, scale, eps=self.config.rms_norm_eps)


class FeedForward(nn.Module):
    """SwiGLU: w_down (silu(w_gate x) * w_up x), w_gate and w_up [D,F], w_down [F,D].

    By configuration each product has a bias: b_gate and b_up [F], b_down [D].
    """

    config: LlamaConfig
    custom_vjp: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tapping = untapped) -> jax.Array:
        d, f, has_biases = self.config.hidden_size, self.config.intermediate_size, self.config.mlp_bias
        w_gate = _matrix(self, "w_gate", _normal(), (d, f))
        w_up = _matrix(self, "w_up", _normal(), (d, f))
        w_down = _matrix(self, "w_down", _residual_normal(self.config), (f, d))
        matrices = [("btd,df->btf", w, sharding.GATE_UP_DF) for w in (w_gate, w_up)]
        gate, up = project_all(x, matrices, out_spec=sharding.ACT_BTF, custom_vjp=self.custom_vjp)
        if has_biases:
            gate, up = _add_bias(self, "b_gate", gate), _add_bias(self, "b_up", up)
        gate, up = tap("block.gate", gate), tap("block.up", up)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        y = swiglu_down(gate, up, w_down, custom_vjp=self.custom_vjp)
        return _add_bias(self, "b_down", y) if has_biases else y


class Experts(nn.Module):
    """A mixture of E SwiGLU layers: router [D,E], w_gate and w_up [E,D,F], w_down [E,F,D].

    Returns the output, and the router's logits f32 [B, T, E].
    """

    config: LlamaConfig
    custom_vjp: bool = False
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tapping = untapped) -> tuple[jax.Array, jax.Array]:
        c = self.config
        d, f, e = c.hidden_size, c.intermediate_size, c.num_experts
        logits = tap("block.router", router_logits(x, self.param("router", _normal(), (d, e))))
        y = experts(
            x,
            logits,
            _matrix(self, "w_gate", _normal(), (e, d, f)),
            _matrix(self, "w_up", _normal(), (e, d, f)),
            _matrix(self, "w_down", _residual_normal(c), (e, f, d)),
            num_experts_per_tok=c.num_experts_per_tok,
            capacity_factor=self.capacity,
            custom_vjp=self.custom_vjp,
        )
        return y, logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), which may be a mixture of experts.

    Returns x, and what `attend` returned beside its output with the router's logits, None without experts.
    """

    config: LlamaConfig
    custom_vjp: bool = False
    expert_capacity: float | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, table: rope.Rotary | None, attend: Attend, tap: Tapping = untapped
    ) -> tuple[jax.Array, tuple[Any, jax.Array | None]]:
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.custom_vjp)
        attention = Attention(self.config, self.custom_vjp, name="attention")
        feed_forward: nn.Module
        if self.config.num_experts:
            feed_forward = Experts(self.config, self.custom_vjp, self.expert_capacity, name="feed_forward")
        else:
            feed_forward = FeedForward(self.config, self.custom_vjp, name="feed_forward")
        x = tap("block.residual_pre", row_major(x) if self.custom_vjp else x)
        y, aux = attention(norm(name="attention_norm")(x), table, attend, tap)
        y = tap("block.attention_out", self._apply_adapter(attention, y))
        x = checkpoint_name(tap("block.residual_mid", x + y), "residual")
        result: Any = feed_forward(norm(name="ffn_norm")(x), tap)
        y, logits = result if self.config.num_experts else (result, None)
        y = tap("block.ffn_out", self._apply_adapter(feed_forward, y))
        return tap("block.residual_post", x + y), (aux, logits)

    def _apply_adapter(self, sublayer: nn.Module, y: jax.Array) -> jax.Array:
        """The output y of a sublayer after its bottleneck adapter, if it has one."""
        weights: Any = sublayer.get_variable("params", "bottleneck")
        return y if weights is None else apply_bottleneck(weights, y, custom_vjp=self.custom_vjp)


def _matrix(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Any:
    """A parameter that may be of another type than an array, which would fail Flax's check of the shape."""
    weight: Any = module.get_variable("params", name)
    if isinstance(weight, Quantized | Adapted | EightBitWeight):
        return weight
    return module.param(name, initializer, shape)


def _add_bias(module: nn.Module, name: str, y: jax.Array) -> jax.Array:
    """y [B, T, ...] plus a bias of its other dimensions, added in f32."""
    bias = module.param(name, nn.initializers.zeros, y.shape[2:], jnp.float32)
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


def _normal() -> nn.initializers.Initializer:
    # Meta did not publish its initialization; 0.02 is Hugging Face's `initializer_range` for Llama.
    return nn.initializers.normal(0.02, dtype=jnp.float32)


def _residual_normal(config: LlamaConfig) -> nn.initializers.Initializer:
    # GPT-2's rule: the sum of 2L residual branches then has the variance of one.
    return nn.initializers.normal(0.02 / (2 * config.num_hidden_layers) ** 0.5, dtype=jnp.float32)
