"""Plans a Meta directory: params.json, and a consolidated.NN.pth for each model-parallel part."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.meta import split_axis
from llama_jax.weights.meta_params import EXTRA, PARAMS, is_llama3, params_of
from llama_jax.weights.names import LEAVES, Leaf
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import layer_by_layer
from llama_jax.weights.write.plan import Piece, Plan, Region
from llama_jax.weights.write.torch_zip import Layout, Stored
from llama_jax.weights.write.vocabulary import Vocabulary

_MOST_PARTS = 99  # file names have two digits
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def plan_meta(
    tensors: Tensors, dtype: np.dtype[Any] | None, vocabulary: Vocabulary, *, shards: int = 1
) -> Plan:
    """Plans a directory that Meta's code reads: Llama 2's, or Llama 3's for a model with its rotary settings.

    Args:
      tensors: what to write. A tied output projection is written out, which Meta's code needs.
      dtype: of every tensor; None keeps each as it is.
      vocabulary: its files are put beside.
      shards: into how many parts, one for each device of Meta's code, every matrix is split.

    Raises:
      CheckpointError: if Meta's code would run another model than this.
      ConfigError: if the model does not divide into so many parts.
    """
    config = tensors.config
    params, extra = params_of(config)
    _check_shards(config, shards)
    planned = [
        _plan(tensors, dtype, name, leaf, layer, shards, llama3=is_llama3(params))
        for name, leaf, layer in _entries(config)
    ]
    layout = Layout([tensor.part for tensor in planned])  # the same for every part
    files = [f"consolidated.{number:02}.pth" for number in range(shards)]
    regions = [
        Region(
            file, offset, tensor.part.nbytes, tensor.leaf, tensor.layer, tensor.encode, tensor.rows(number)
        )
        for tensor, offset in zip(planned, layout.offsets, strict=True)
        for number, file in enumerate(files)
    ]

    def finish(checksums: Sequence[int]) -> Iterable[Piece]:
        for number, file in enumerate(files):
            for offset, data in layout.finish(checksums[number::shards]):
                yield Piece(file, offset, data)

    pieces = [Piece(file, offset, data) for file in files for offset, data in layout.known]
    extras = dict(vocabulary.files) | {PARAMS: _json(params), EXTRA: _json(extra)}
    return Plan("meta", False, dict.fromkeys(files, layout.size), pieces, extras, regions, finish)


class _Tensor(NamedTuple):
    """A tensor, and what each part has of it, cut along an axis if there is one."""

    leaf: Leaf
    layer: int | None
    encode: Callable[[np.ndarray], np.ndarray]
    part: Stored
    axis: int | None

    def rows(self, number: int) -> tuple[slice, ...] | None:
        """Where a part is in the whole."""
        if self.axis is None:
            return None
        step = self.part.shape[self.axis]
        return (slice(None),) * self.axis + (slice(number * step, (number + 1) * step),)


def _plan(
    tensors: Tensors,
    dtype: np.dtype[Any] | None,
    name: str,
    leaf: Leaf,
    layer: int | None,
    shards: int,
    *,
    llama3: bool,
) -> _Tensor:
    shape = list(leaf.stored_shape(tensors.config, "meta"))
    axis = split_axis(name, len(shape), llama3=llama3)
    if axis is not None:
        shape[axis] //= shards
    dtype = dtype or tensors.dtype(leaf, layer)
    encode = functools.partial(_encode, leaf=leaf, config=tensors.config, dtype=dtype)
    return _Tensor(leaf, layer, encode, Stored(name, tuple(shape), _NAMES[dtype]), axis)


def _entries(config: LlamaConfig) -> Iterator[tuple[str, Leaf, int | None]]:
    """Yields every tensor to be stored: its name, and what it is."""
    embedding, output = LEAVES[0], LEAVES[-1]
    for _, leaf, layer in layer_by_layer(config):
        yield leaf.name("meta", layer), leaf, layer
        if leaf is embedding and config.tie_word_embeddings:
            yield output.name("meta"), embedding, None


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, dtype: np.dtype[Any]) -> np.ndarray:
    # Parts have whole heads, so each is reordered as the whole tensor would be.
    return np.ascontiguousarray(cast(leaf.reordered(array, config, "hf", "meta"), dtype))


def _check_shards(config: LlamaConfig, shards: int) -> None:
    sizes = {
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    common = math.gcd(*sizes.values())
    possible = [number for number in range(1, _MOST_PARTS + 1) if common % number == 0]
    if shards not in possible:
        have = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"{shards} parts of a model with {have}: each must divide; this one can be split into "
            f"{', '.join(map(str, possible))}"
        )


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields) + "\n").encode()
