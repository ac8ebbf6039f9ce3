"""The Llama model as functions of (config, params, tokens): initialise, run, run against a cache.

Parameters are a nested dict whose layer leaves are stacked [L, ...]; `unstack` turns `layers` into a
tuple of L dicts, which every function here takes just as well. Stacked layers are scanned (one compiled
body whatever L is), unstacked ones are unrolled (no slice of a weight is ever copied: decoding's form).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from llama_jax import kv_cache as kv
from llama_jax import rope, sharding
from llama_jax.attention import AttentionMask, Backend, KeyValues, attention, cached_attention
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, InputError
from llama_jax.layers import Attend, Block, embed, rms_norm, unembed

Params = Any  # the nested dict of arrays that this module's docstring describes
Remat = Literal["none", "save_projections", "attention", "full", "offload"]

# What a backward pass reads again: the products' results, and attention's with its one number a query.
_ATTENTION = ("attention_out", "splash_residuals")
_NAMED = ("q", "k", *_ATTENTION, "gate", "up")
_POLICIES: dict[str, Any] = {
    "save_projections": jax.checkpoint_policies.save_only_these_names(*_NAMED),
    "attention": jax.checkpoint_policies.save_only_these_names(*_ATTENTION),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_NAMED),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How a forward pass is computed, apart from the model; hashable, so static under `jit`.

    Attributes:
      dtype: compute dtype; None is the parameters' own. Norms, rotary angles, softmax and logits are f32 in any
        case.
      attention_backend: `xla`, `blockwise` or `splash`; see `attention.attention`.
      remat: what a layer keeps for its backward pass: `none` rematerialises nothing; `save_projections` keeps the
        outputs of the matrix products and of attention; `attention` attention's output; `full` the layer's input
        alone; `offload` keeps what `save_projections` does, in host memory. It saves memory with stacked layers.
      custom_vjp: take the hand-written backward passes of `ops`, which stay in the compute dtype with f32
        accumulation; what the trainer uses. They rule out forward-mode differentiation (`jax.jvp`).

    Raises:
      ConfigError: for an unknown backend, remat policy or dtype.
    """

    dtype: jax.typing.DTypeLike | None = None
    attention_backend: Backend = "xla"
    remat: Remat = "none"
    custom_vjp: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.attention_backend not in get_args(Backend):
            raise ConfigError(
                f"attention backend {self.attention_backend!r} is unknown; use one of {', '.join(get_args(Backend))}"
            )
        if self.remat not in get_args(Remat):
            raise ConfigError(
                f"remat policy {self.remat!r} is unknown; use one of {', '.join(get_args(Remat))}"
            )

    def override(self, **changes: Any) -> ForwardOptions:
        """These options with those of `changes` that are not None."""
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})


def init(config: LlamaConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
    """Random parameters: normal with deviation 0.02, residual outputs 0.02 / sqrt(2L), norms one.

    Under a mesh (`jax.set_mesh`) each device makes its own shards; the values are the same bits as
    without one.

    Args:
      config: the model.
      key: a key from `jax.random.key`.
      dtype: of every leaf.

    Returns:
      The parameter tree, layers stacked.
    """

    def make(key: jax.Array) -> Params:
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        v, d = config.vocab_size, config.hidden_size
        x, positions = jnp.zeros((1, 1, d), jnp.float32), jnp.zeros((1, 1), jnp.int32)
        attend: Attend = lambda q, k, v: (q, None)  # noqa: E731  # init asks for shapes alone

        def layer(key: jax.Array) -> Any:
            return Block(config).init(key, x, rope.rotary(config, positions), attend)["params"]

        params = {
            "embed": {"embedding": 0.02 * jax.random.normal(embed_key, (v, d), jnp.float32)},
            "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_hidden_layers)),
            "final_norm": {"scale": jnp.ones((d,), jnp.float32)},
        }
        if config.has_output:
            params["lm_head"] = {"kernel": 0.02 * jax.random.normal(head_key, (d, v), jnp.float32)}
        if config.labels:
            shape = (d, len(config.labels))
            params["score"] = {"kernel": 0.02 * jax.random.normal(head_key, shape, jnp.float32)}
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    if not sharding.explicit_axes():
        return jax.jit(make)(key)
    sharding.check_mesh(config, jax.sharding.get_abstract_mesh())
    specs = jax.tree.map(sharding.out_sharding, sharding.param_specs(config), is_leaf=sharding.is_spec)
    # Made in automatic mode: the partitioner then has each device compute its own shards' numbers alone.
    return jax.jit(jax.sharding.auto_axes(make, out_sharding=specs))(key)


@functools.partial(
    jax.jit, static_argnames=("config", "options", "dtype", "attention_backend", "remat", "custom_vjp")
)
def forward(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    dtype: jax.typing.DTypeLike | None = None,
    attention_backend: Backend | None = None,
    remat: Remat | None = None,
    custom_vjp: bool | None = None,
) -> jax.Array:
    """Logits of every next token.

    Args:
      config: the model.
      params: its parameters, stacked or not.
      tokens: int [B, T].
      positions: int [B, T], each token's position in its document; 0..T-1 by default. With packed
        documents they restart, and `segment_ids` must keep the documents apart.
      segment_ids: int [B, T]; a token attends only within its own segment. None: each row is one.
      options: how it is computed.
      dtype, attention_backend, remat, custom_vjp: fields of `options`, which they override where given.

    Returns:
      f32 [B, T, V].

    Raises:
      ConfigError: for an unknown backend or remat policy, parameters of another model, or a model or
        batch that the mesh does not divide.
      InputError: for tokens, positions or segment_ids that are not [B, T].
    """
    options = options.override(
        dtype=dtype, attention_backend=attention_backend, remat=remat, custom_vjp=custom_vjp
    )
    x = hidden_states(config, params, tokens, positions, segment_ids, options=options)
    return unembed(x, params)


def hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    embedding_noise: jax.Array | None = None,
) -> jax.Array:
    """`forward` without its last product: normalised hidden states [B, T, D] in the compute dtype.

    `embedding_noise` [B, T, D] is added to the embeddings, as NEFTune does in training (arXiv 2310.05914).
    """
    _check(config, params, tokens)
    sharding.check_batch(tokens.shape[0])
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and jnp.shape(array) != jnp.shape(tokens):
            raise InputError(f"{name} has shape {jnp.shape(array)}; tokens has {jnp.shape(tokens)}")
    tokens = sharding.constrain(jnp.asarray(tokens), sharding.TOKENS_BT)
    order = _sequence_positions(tokens)
    positions = order if positions is None else sharding.constrain(jnp.asarray(positions), sharding.TOKENS_BT)
    if segment_ids is not None:
        segment_ids = sharding.constrain(jnp.asarray(segment_ids), sharding.TOKENS_BT)
    # Causality goes by the place in the row, not by the position in the document: with packing,
    # positions restart.
    where = AttentionMask(order, order, segment_ids, segment_ids)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, prefix: KeyValues | None = None
    ) -> tuple[jax.Array, None]:
        return attention(q, k, v, where, prefix, backend=options.attention_backend), None

    dtype = options.dtype or compute_dtype(params)
    x = embed(params["embed"]["embedding"], tokens, dtype=dtype, custom_vjp=options.custom_vjp)
    if embedding_noise is not None:
        x = x + sharding.constrain(embedding_noise, sharding.ACT_BTD).astype(x.dtype)
    x, _ = _run_layers(
        config,
        params,
        x,
        rope.rotary(config, positions + _prefix_length(params)),
        lambda layer: attend,
        options=options,
    )
    return rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps)


def forward_cached(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    cache: kv.KVCache,
    *,
    used: jax.Array | None = None,
    positions: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, kv.KVCache]:
    """Runs T new tokens of each row against the cache, which they join.

    The compute dtype is the parameters'; the cache may have another.

    Args:
      config: the model.
      params: its parameters, unstacked (see `unstack`): a scan would copy every weight at every token.
      tokens: int [B, T], written to slots start..start+T-1 of each row.
      start: int [B].
      cache: holds the keys and values of slots 0..start-1 of each row.
      used: int [], how many of the cache's first slots to read, at least max(start) + T, for many tokens
        at once; None reads all, which for a few tokens is quicker.
      positions: int [B, T], where the tokens stand in their text; by default in their slots' order.
      allowed: bool [B, T, S], which slots each token attends to, its own included; by default the
        slots up to its own. With `positions` it lets one row of the cache hold several continuations of
        one prompt: beams, or a tree of drafts.

    Returns:
      logits f32 [B, T, V], whose cost vanishes under `jit` where they are not used; and the cache with
      the new tokens in it.
    """
    _check(config, params, tokens)
    batch, length = tokens.shape
    tokens = sharding.constrain(tokens, sharding.TOKENS_BT)
    start = sharding.constrain(start, sharding.ROWS_B)
    order = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    slots = jnp.broadcast_to(jnp.arange(cache.length, dtype=jnp.int32), (batch, cache.length))
    where = AttentionMask(order, slots, allowed=allowed)
    positions = order if positions is None else sharding.constrain(positions, sharding.TOKENS_BT)

    def attend_at(layer: int) -> Attend:
        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, prefix: KeyValues | None = None
        ) -> tuple[jax.Array, Any]:
            keys, values = kv.write(cache.k[layer], k, start), kv.write(cache.v[layer], v, start)
            return cached_attention(q, keys, values, where, prefix, used=used), (keys, values)

        return attend

    x = embed(params["embed"]["embedding"], tokens, dtype=compute_dtype(params))
    table = rope.rotary(config, positions + _prefix_length(params))
    x, kept = _run_layers(config, unstack(params), x, table, attend_at)
    keys, values = zip(*kept, strict=True)
    x = rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps)
    return unembed(x, params), kv.KVCache(k=keys, v=values)


def unstack(params: Params) -> Params:
    """Splits stacked layers into a tuple of L dicts; parameters that are unstacked pass through.

    Under `jit` this copies the weights once, so do it outside the loop that uses them.
    """
    layers = params["layers"]
    if not isinstance(layers, Mapping):
        return params
    count = jax.tree.leaves(layers)[0].shape[0]
    take = lambda i: jax.tree.map(lambda leaf: leaf[i], layers)  # noqa: E731
    return {**params, "layers": tuple(take(i) for i in range(count))}


def compute_dtype(params: Params) -> jnp.dtype:
    """The dtype of the embedding table, which stands for the whole tree's."""
    return params["embed"]["embedding"].dtype


def _check(config: LlamaConfig, params: Params, tokens: jax.Array) -> None:
    """Checks by their shapes alone that tokens, parameters, configuration and mesh belong together."""
    dtype = jnp.result_type(tokens)
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(
            f"tokens is {dtype} of shape {jnp.shape(tokens)}; it must be whole numbers [batch, length]"
        )
    layers = params["layers"]
    stacked = isinstance(layers, Mapping)
    count = jax.tree.leaves(layers)[0].shape[0] if stacked else len(layers)
    found = (count, *params["embed"]["embedding"].shape)
    if found != (config.num_hidden_layers, config.vocab_size, config.hidden_size):
        raise ConfigError(
            f"params are of another model: {found[0]} layers and an embedding of {list(found[1:])}; "
            f"the configuration has num_hidden_layers {config.num_hidden_layers}, vocab_size "
            f"{config.vocab_size} and hidden_size {config.hidden_size}"
        )
    if sharding.explicit_axes():
        sharding.check_mesh(config, jax.sharding.get_abstract_mesh())


def _prefix_length(params: Params) -> int:
    """How many positions a learned prefix takes before the first token's."""
    layers = params["layers"]
    prefix = (layers if isinstance(layers, Mapping) else layers[0])["attention"].get("prefix")
    return 0 if prefix is None else prefix["k"].shape[-2]


def _sequence_positions(tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return sharding.constrain(positions, sharding.TOKENS_BT)


def _run_layers(
    config: LlamaConfig,
    params: Params,
    x: jax.Array,
    table: rope.Rotary,
    attend_at: Callable[[int], Attend],
    *,
    options: ForwardOptions = ForwardOptions(),
) -> tuple[jax.Array, Any]:
    """All blocks over x: scanned where they are stacked (one `attend` for all), unrolled where not."""
    block = Block(config, options.custom_vjp)

    def layer(x: jax.Array, weights: Any, attend: Attend) -> tuple[jax.Array, Any]:
        return block.apply({"params": weights}, x, table, attend)

    layers = params["layers"]
    if isinstance(layers, Mapping):
        return jax.lax.scan(_remat(functools.partial(layer, attend=attend_at(0)), options.remat), x, layers)
    kept = []
    for index, weights in enumerate(layers):
        x, keep = _remat(functools.partial(layer, attend=attend_at(index)), options.remat)(x, weights)
        kept.append(keep)
    return x, kept


def _remat(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    if remat == "none":
        return step
    return jax.checkpoint(step, policy=_POLICIES[remat], prevent_cse=False)
