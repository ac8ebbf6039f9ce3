"""Plans a Meta directory: params.json, and one consolidated.NN.pth per model-parallel shard."""

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
from llama_jax.weights.meta_params import EXTRA_FILE, PARAMS_FILE, is_llama3, params_from_config
from llama_jax.weights.names import LEAVES, Leaf
from llama_jax.weights.source import DTYPE_NAMES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import layer_by_layer
from llama_jax.weights.write.plan import Blob, Plan, Region
from llama_jax.weights.write.torch_zip import Layout, TensorSpec
from llama_jax.weights.write.vocabulary import Vocabulary

_MAX_SHARDS = 99  # file names have two digits


def plan_meta(
    tensors: Tensors, dtype: np.dtype[Any] | None, vocabulary: Vocabulary, *, shards: int = 1
) -> Plan:
    """Plans a directory for Meta's code: Llama 2's, or Llama 3's for a model with its rotary settings.

    Args:
      tensors: the tensors to write. A tied output projection is written as a copy, which Meta's code needs.
      dtype: dtype of all tensors; None keeps each tensor's own.
      vocabulary: the tokenizer, whose files are included.
      shards: number of model-parallel shards, one per device of Meta's code.

    Raises:
      CheckpointError: if Meta's code would compute a different model.
      ConfigError: if the model does not divide into this many shards.
    """
    config = tensors.config
    params, extra = params_from_config(config)
    _check_shards(config, shards)
    planned = [
        _plan_tensor(tensors, dtype, name, leaf, layer, shards, llama3=is_llama3(params))
        for name, leaf, layer in _entries(config)
    ]
    layout = Layout([tensor.shard for tensor in planned])  # the same for every shard
    files = [f"consolidated.{number:02}.pth" for number in range(shards)]
    regions = [
        Region(
            file, offset, tensor.shard.nbytes, tensor.leaf, tensor.layer, tensor.encode, tensor.slices(number)
        )
        for tensor, offset in zip(planned, layout.offsets, strict=True)
        for number, file in enumerate(files)
    ]

    def finish(checksums: Sequence[int]) -> Iterable[Blob]:
        for number, file in enumerate(files):
            for offset, data in layout.finish(checksums[number::shards]):
                yield Blob(file, offset, data)

    blobs = [Blob(file, offset, data) for file in files for offset, data in layout.fixed]
    extras = dict(vocabulary.files) | {PARAMS_FILE: _json(params), EXTRA_FILE: _json(extra)}
    return Plan("meta", False, dict.fromkeys(files, layout.size), blobs, extras, regions, finish)


class _Tensor(NamedTuple):
    """A tensor, and its shard: split along `axis`, or replicated if that is None."""

    leaf: Leaf
    layer: int | None
    encode: Callable[[np.ndarray], np.ndarray]
    shard: TensorSpec
    axis: int | None

    def slices(self, number: int) -> tuple[slice, ...] | None:
        """The slice of the tensor that is shard `number`; None if replicated."""
        if self.axis is None:
            return None
        step = self.shard.shape[self.axis]
        return (slice(None),) * self.axis + (slice(number * step, (number + 1) * step),)


def _plan_tensor(
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
    return _Tensor(leaf, layer, encode, TensorSpec(name, tuple(shape), DTYPE_NAMES[dtype]), axis)


def _entries(config: LlamaConfig) -> Iterator[tuple[str, Leaf, int | None]]:
    """Yields the name, leaf and layer of every stored tensor."""
    embedding, output = LEAVES[0], LEAVES[-1]
    for _, leaf, layer in layer_by_layer(config):
        yield leaf.name("meta", layer), leaf, layer
        if leaf is embedding and config.tie_word_embeddings:
            yield output.name("meta"), embedding, None


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, dtype: np.dtype[Any]) -> np.ndarray:
    # A shard has whole heads, so it is reordered in the same way as the whole tensor.
    return np.ascontiguousarray(cast(leaf.convert_layout(array, config, "hf", "meta"), dtype))


def _check_shards(config: LlamaConfig, shards: int) -> None:
    sizes = {
        "vocab_size": config.vocab_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    common = math.gcd(*sizes.values())
    possible = [number for number in range(1, _MAX_SHARDS + 1) if common % number == 0]
    if shards not in possible:
        dimensions = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"shards is {shards}; it must divide {dimensions}: use one of {', '.join(map(str, possible))}"
        )


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields) + "\n").encode()
