"""The interface between readers and writers: a model's tensors, read one at a time in a common layout.

The common layout is Hugging Face's: matrices [out, in], rotary dimensions in split halves, one tensor per
layer. Most formats store the same or permute rows, so that conversions never transpose a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.weights.names import STACKED, Leaf
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.source import FLOAT_DTYPES, Source
from llama_jax.weights.validation import validate_tensors


class Tensors(Protocol):
    """The tensors of one model.

    Attributes:
      config: the model configuration; `names.leaves(config)` are the leaves.
      stacked: whether all layers of a leaf should be read consecutively, because they are stored stacked.
    """

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def stacked(self) -> bool: ...

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        """Returns the dtype of `read`'s result without reading the tensor."""

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        """Reads one tensor of shape `leaf.stored_shape(config, "hf")`. Thread-safe.

        Raises:
          CheckpointError: if the tensor cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class StoredTensors:
    """The tensors of a checkpoint, validated against its configuration on construction."""

    source: Source

    def __post_init__(self) -> None:
        validate_tensors(self.source)

    @property
    def config(self) -> LlamaConfig:
        return self.source.config

    @property
    def stacked(self) -> bool:
        return self.source.format in STACKED

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        name = leaf.name(self.source.format, layer)
        return FLOAT_DTYPES.get(self.source.tensors[name].dtype, np.dtype("<f4"))

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        source = self.source
        if isinstance(source, OrbaxSource):
            return leaf.to_stored(source.read_layer(leaf.orbax, layer), self.config, "hf")
        array = source.read(leaf.name(source.format, layer))
        return leaf.convert_layout(array, self.config, source.format, "hf")


@dataclasses.dataclass(frozen=True)
class ParamsTensors:
    """The tensors of parameters in memory, stacked or not, on one device or many.

    Attributes:
      config: the model configuration.
      params: the parameters.
    """

    config: LlamaConfig
    params: Mapping[str, Any]
    stacked: bool = False

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return np.dtype(self._leaf(leaf, layer)[0].dtype)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        array, index = self._leaf(leaf, layer)
        return leaf.to_stored(np.asarray(array if index is None else array[index]), self.config, "hf")

    def _leaf(self, leaf: Leaf, layer: int | None) -> tuple[Any, int | None]:
        """Returns the array of the leaf, and the layer index in it if it is stacked."""
        value: Any = self.params
        for key in leaf.path:
            value = value[key]
            if key == "layers" and not isinstance(value, Mapping):
                value, layer = value[layer], None
        return value, layer
