"""The Llama model as functions of (config, params, tokens): init, forward, forward with a cache.

Parameters are a nested dict whose layer leaves are stacked [L, ...]. `unstack` turns `layers` into a tuple of
L dicts, which every function here accepts too. Stacked layers are scanned (one compiled body whatever L is).
Unstacked ones are unrolled, for decoding: no slice of a weight is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import kv_cache as kv
from llama_jax import rope, sharding
from llama_jax.attention import AttentionMask, Backend, attention, cache_mask, cached_attention, uses_ring
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, InputError
from llama_jax.forward_options import ForwardOptions
from llama_jax.layer_stack import Found, run_layers
from llama_jax.layers import Attend, Block, embed, rms_norm, unembed
from llama_jax.ops import zigzag
from llama_jax.ops.inputs import as_array
from llama_jax.ops.remat import Remat
from llama_jax.ops.router_losses import RouterLosses, router_losses
from llama_jax.taps import EDIT, Edit, Tap, Taps, edited, with_edit

Params = Any  # a nested dict of arrays, see the module's docstring


def init(config: LlamaConfig, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
    """Random parameters: norms 1, others normal with deviation 0.02, or 0.02 / sqrt(2L) in `wo` and `w_down`.

    On a mesh (`jax.set_mesh`) each device initializes its own shards; the values are bitwise those without a
    mesh.

    Args:
      config: the model.
      key: a key from `jax.random.key`.
      dtype: of every leaf.

    Returns:
      The parameter tree, layers stacked.
    """
    if sharding.explicit_axes():
        sharding.check_mesh(config, jax.sharding.get_abstract_mesh())
    return _init(config, jnp.dtype(dtype), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: LlamaConfig, dtype: jax.typing.DTypeLike, key: jax.Array) -> Params:
    def make(key: jax.Array) -> Params:
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        v, d = config.vocab_size, config.hidden_size
        x, positions = jnp.zeros((1, 1, d), jnp.float32), jnp.zeros((1, 1), jnp.int32)
        attend: Attend = lambda q, k, v: (q, None)  # noqa: E731  # only its shapes are used

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
        return make(key)
    specs = jax.tree.map(sharding.out_sharding, sharding.param_specs(config), is_leaf=sharding.is_spec)
    # With automatic axes the partitioner makes each device compute only its own shards.
    return jax.sharding.auto_axes(make, out_sharding=specs)(key)


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
    edit: Edit | None = None,
) -> jax.Array:
    """Logits of the next token after every position.

    Args:
      config: the model.
      params: its parameters, stacked or not.
      tokens: int [B, T], an array or nested lists.
      positions: int [B, T], the position of each token in its document; 0..T-1 by default. In packed rows
        they restart with each document, and `segment_ids` separates the documents.
      segment_ids: int [B, T]; a token attends only to its own segment. None: each row is one segment.
      options: how the forward pass is computed.
      dtype, attention_backend, remat, custom_vjp: replace these fields of `options` where not None.
      edit: replaces values inside the model, see `taps.Edit`.

    Returns:
      f32 [B, T, V].

    Raises:
      ConfigError: for invalid options, parameters of another model, or a model or batch that the mesh does
        not divide.
      InputError: for tokens, positions or segment_ids that are not [B, T].
    """
    options = options.override(
        dtype=dtype, attention_backend=attention_backend, remat=remat, custom_vjp=custom_vjp
    )
    tokens, positions = as_array("tokens", tokens), as_array("positions", positions)
    segment_ids = as_array("segment_ids", segment_ids)
    return _forward(config, with_edit(params, edit), tokens, positions, segment_ids, options=options)


@functools.partial(jax.jit, static_argnames=("config", "options"))
def _forward(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    options: ForwardOptions,
) -> jax.Array:
    x = hidden_states(config, params, tokens, positions, segment_ids, options=options)
    return edited(params, "logits", unembed(x, params))


def hidden_states(
    config: LlamaConfig, params: Params, tokens: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
    """`forward` without the output projection: normalized hidden states [B, T, D] in the compute dtype."""
    return routed_hidden_states(config, params, tokens, *args, **kwargs)[0]


def routed_hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    embedding_noise: jax.Array | None = None,
) -> tuple[jax.Array, RouterLosses | None]:
    """`hidden_states`, and the routers' losses over tokens outside segment 0; None without experts.

    `embedding_noise` [B, T, D] is added to the embeddings, as in NEFTune (arXiv 2310.05914).
    """
    inputs = config, params, tokens, positions, segment_ids
    return tapped_hidden_states(*inputs, options=options, embedding_noise=embedding_noise)[:2]


def tapped_hidden_states(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    embedding_noise: jax.Array | None = None,
    wanted: frozenset[str] = frozenset(),
    layers: tuple[int, ...] | None = None,
) -> tuple[jax.Array, RouterLosses | None, Found]:
    """`routed_hidden_states`, and the values of the sites `wanted`, of these layers or all: [layers, ...]."""
    _check(config, params, tokens)
    sharding.check_batch(tokens.shape[0])
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and jnp.shape(array) != jnp.shape(tokens):
            raise InputError(f"{name} has shape {jnp.shape(array)}; tokens has {jnp.shape(tokens)}")
    tokens = sharding.constrain(jnp.asarray(tokens), sharding.TOKENS_BT)
    constrain = functools.partial(sharding.constrain, spec=sharding.TOKENS_BT)
    row_order = constrain(jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))
    positions = row_order if positions is None else constrain(jnp.asarray(positions))
    segment_ids = None if segment_ids is None else constrain(jnp.asarray(segment_ids))
    # A window that is as long as the row leaves out nothing.
    windows = [w if w is not None and w < tokens.shape[1] else None for w, _ in config.layer_kinds]
    taps = _taps(params, wanted, layers)
    ring = uses_ring(options.attention_backend, prefix=_prefix_length(params) > 0, window=any(windows))
    ring = ring and taps is None  # sites have their tokens in order
    if ring:  # here and at the end, so that no layer moves a token to another device
        tokens, positions, segment_ids = zigzag.enter((tokens, positions, segment_ids))
    # Causal in the order of the row: positions restart with each packed document.
    mask = AttentionMask(row_order, row_order, segment_ids, segment_ids)
    how = functools.partial(attention, mask=mask, backend=options.attention_backend, ring=ring, in_order=True)

    def attend_in_layer(layer: int) -> Attend:
        return lambda q, k, v, **kwargs: (how(q, k, v, window=windows[layer], **kwargs), None)

    dtype = options.dtype or compute_dtype(params)
    x = embed(params["embed"]["embedding"], tokens, dtype=dtype, custom_vjp=options.custom_vjp)
    if embedding_noise is not None:
        noise = zigzag.enter(embedding_noise) if ring else embedding_noise
        x = x + sharding.constrain(noise, sharding.ACT_BTD).astype(x.dtype)
    outside = Tap(params.get(EDIT), wanted)
    x = outside("embedding", x)
    table = rope.rotary(config, positions + _prefix_length(params))
    x, outputs, found = run_layers(config, params, x, table, attend_in_layer, options=options, taps=taps)
    x = rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps)
    x = outside("final_norm", zigzag.leave(x) if ring else x)
    found |= outside.found
    if not config.num_experts:
        return x, None, found
    is_token = None if segment_ids is None else segment_ids > 0
    return x, router_losses(outputs, config.num_experts_per_tok, is_token), found


def _taps(params: Params, wanted: frozenset[str], layers: tuple[int, ...] | None = None) -> Taps | None:
    edit = params.get(EDIT)
    return Taps(edit, wanted, layers) if edit is not None or wanted else None


def forward_cached(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    cache: kv.KVCache,
    *,
    used: jax.Array | None = None,
    end: jax.Array | None = None,
    positions: jax.Array | None = None,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, kv.KVCache]:
    """Runs T new tokens of each row in the parameters' dtype, and adds their keys and values to the cache.

    Args:
      config: the model.
      params: its parameters, unstacked (see `unstack`): a scan would copy every weight at every token.
      tokens: int [B, T], written to slots start..start+T-1 of each row.
      start: int [B].
      cache: the keys and values of slots 0..start-1 of each row; its first B rows, if it has more.
      used: int [], the number of slots to read, at least max(start) + T: for many tokens. None reads all
        slots, which is faster for a few tokens.
      end: int [B], the tokens in each row; padding after them is not stored in rings. None: without padding.
      positions: int [B, T], the position of each token in its sequence; by default its slot.
      allowed: bool [B, T, S], the slots that each token attends to, including its own; by default those up to
        its own. With `positions`, one row of the cache can store several continuations of one prompt: beams,
        or a tree of drafts.

    Returns:
      logits f32 [B, T, V], which `jit` does not compute where they are not used; and the updated cache.
    """
    _check(config, params, tokens)
    tokens, length = sharding.constrain(tokens, sharding.TOKENS_BT), tokens.shape[1]
    start = sharding.constrain(start, sharding.ROWS_B)
    order = start[:, None] + jnp.arange(length, dtype=jnp.int32)
    layouts = kv.layouts(config, cache, length, in_order=allowed is None)
    positions = order if positions is None else sharding.constrain(positions, sharding.TOKENS_BT)
    masks = {each: cache_mask(order, each, end, positions, allowed) for each in dict.fromkeys(layouts)}

    def attend_in_layer(layer: int) -> Attend:
        layout = layouts[layer]
        write = functools.partial(kv.write, start=start, ring=layout.ring, end=end)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, prefix: Any = None, tap: Any = None
        ) -> tuple[jax.Array, Any]:
            k, v = (sharding.constrain(x, sharding.CACHE_BKSH) for x in (k, v))
            keys, values = write(cache.k[layer], k), write(cache.v[layer], v)
            mask, window = masks[layout], layout.window
            how = {"used": used, "window": window, "tap": tap}
            return cached_attention(q, keys, values, mask, prefix, **how), (keys, values)

        return attend

    x = edited(params, "embedding", embed(params["embed"]["embedding"], tokens, dtype=compute_dtype(params)))
    table = rope.rotary(config, positions + _prefix_length(params))
    taps = _taps(params, frozenset())
    x, layer_caches, _ = run_layers(config, unstack(params), x, table, attend_in_layer, taps=taps)
    keys, values = zip(*(cache for cache, _ in layer_caches), strict=True)
    x = edited(params, "final_norm", rms_norm(x, params["final_norm"]["scale"], eps=config.rms_norm_eps))
    return edited(params, "logits", unembed(x, params)), kv.KVCache(k=keys, v=values)


def unstack(params: Params) -> Params:
    """Splits stacked layers into a tuple of L dicts; unstacked parameters are returned unchanged.

    Under `jit` this copies the weights once, so do it outside the loop that uses them.
    """
    layers = params["layers"]
    if not isinstance(layers, Mapping):
        return params
    count = jax.tree.leaves(layers)[0].shape[0]
    layer = lambda i: jax.tree.map(lambda leaf: leaf[i], layers)  # noqa: E731
    return {**params, "layers": tuple(layer(i) for i in range(count))}


def compute_dtype(params: Params) -> jnp.dtype:
    """The compute dtype without `ForwardOptions.dtype`: that of the embedding table."""
    return params["embed"]["embedding"].dtype


def _check(config: LlamaConfig, params: Params, tokens: jax.Array) -> None:
    """Checks the shapes of tokens and parameters against the configuration and the mesh."""
    dtype = jnp.result_type(tokens)
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise InputError(
            f"tokens is {dtype} of shape {jnp.shape(tokens)}; it must be an integer array [batch, length]"
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
    """The number of positions of a prefix, before that of the first token."""
    layers = params["layers"]
    prefix = (layers if isinstance(layers, Mapping) else layers[0])["attention"].get("prefix")
    return 0 if prefix is None else prefix["k"].shape[-2]
