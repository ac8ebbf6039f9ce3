"""A model's tensors, whatever holds them: what every writer takes, one tensor at a time.

Between formats a tensor is as Hugging Face stores it: matrices [out, in], rotary dimensions in split
halves, one for each layer. Most formats store just that, so that a conversion moves rows and never
transposes a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.weights.check import check_tensors
from llama_jax.weights.names import STACKED, Leaf
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.source import FLOAT_DTYPES, Source


class Tensors(Protocol):
    """The tensors of one model.

    Attributes:
      config: the model; `names.leaves(config)` are its leaves.
      stacked: whether all layers of a leaf are best read one after the other.
    """

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def stacked(self) -> bool: ...

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        """The dtype that `read` gives, known without reading."""

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        """Reads one tensor: `leaf.stored_shape(config, "hf")`. May be called from several threads.

        Raises:
          CheckpointError: if it cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class StoredTensors:
    """Those of a checkpoint, checked on opening to be the ones that its configuration asks for."""

    source: Source

    def __post_init__(self) -> None:
        check_tensors(self.source)

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
        return leaf.reordered(array, self.config, source.format, "hf")


@dataclasses.dataclass(frozen=True)
class ParamsTensors:
    """Those of parameters in memory, stacked or not, on one device or many.

    Attributes:
      config: the model.
      params: its parameters.
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
        """The array that holds the leaf, and the index at which it is stacked there."""
        value: Any = self.params
        for key in leaf.path:
            value = value[key]
            if key == "layers" and not isinstance(value, Mapping):
                value, layer = value[layer], None
        return value, layer
