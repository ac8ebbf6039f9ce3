"""`capture`: a forward pass with the values of chosen sites and layers beside the logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.forward_options import ForwardOptions
from llama_jax.layers import unembed
from llama_jax.model import Params, tapped_hidden_states
from llama_jax.ops.inputs import as_array
from llama_jax.taps import ATTENTION_WEIGHTS, EDIT, Edit, Tap, check_sites, with_edit


def capture(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    sites: Sequence[str],
    layers: Sequence[int] | None = None,
    edit: Edit | None = None,
    options: ForwardOptions = ForwardOptions(),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and values from inside the model, which are differentiable like these.

    Args:
      config, params, tokens, positions, segment_ids, options: as for `forward`.
      sites: their names, see `taps.sites`.
      layers: of which to capture block sites, in this order; negative ones count from the end. None: all.
      edit: as for `forward`; values are captured after it.

    Returns:
      Logits f32 [B, T, V], as `forward`; and by site a value of its shape, with a leading axis of layers for
      sites of blocks. Memory grows with the layers that are asked for, and one more where they are scanned.

    Raises:
      InputError: for an unknown site or layer, or attention weights with another backend than `xla`.
      ConfigError, InputError: as `forward`.
    """
    if isinstance(sites, str):
        raise InputError(f"sites is {sites!r}; give a list of names, such as [{sites!r}]")
    check_sites(config, sites)
    chosen = None if layers is None else tuple(_layer(config, layer) for layer in layers)
    if chosen is not None and len(set(chosen)) != len(chosen):
        raise InputError(f"layers {list(layers or ())} name one twice; give each once")
    if ATTENTION_WEIGHTS in sites and options.attention_backend != "xla":
        raise InputError(
            f"{ATTENTION_WEIGHTS!r} exists with attention_backend 'xla', and options has "
            f"{options.attention_backend!r}, which never has them in memory"
        )
    arrays = (as_array("tokens", tokens), as_array("positions", positions))
    logits, found = _capture(
        config,
        with_edit(params, edit),
        *arrays,
        as_array("segment_ids", segment_ids),
        sites=tuple(dict.fromkeys(sites)),
        layers=chosen,
        options=options,
    )
    return logits, {name: found[name] for name in dict.fromkeys(sites)}  # `jit` returns them by name


@functools.partial(jax.jit, static_argnames=("config", "sites", "layers", "options"))
def _capture(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    sites: tuple[str, ...],
    layers: tuple[int, ...] | None,
    options: ForwardOptions,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    wanted = frozenset(sites)
    inputs = config, params, tokens, positions, segment_ids
    x, _, found = tapped_hidden_states(*inputs, options=options, wanted=wanted, layers=layers)
    tap = Tap(params.get(EDIT), wanted)
    logits = tap("logits", unembed(x, params))
    return logits, found | tap.found


def _layer(config: LlamaConfig, layer: Any) -> int:
    count = config.num_hidden_layers
    if not -count <= layer < count:
        raise InputError(f"layer {layer} is not one of the {count} layers, 0 to {count - 1}")
    return int(layer) % count
