"""The interface between readers and writers: a model's tensors, read one at a time in a common layout.

The common layout is Hugging Face's: matrices [out, in], rotary dimensions in split halves, one tensor per
layer. Most formats store the same or permute rows, so that conversions never transpose a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.names import STACKED, Leaf, is_interleaved, leaves
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.source import FLOAT_DTYPES, Source, format_list
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

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        """Reads the rows `begin` to `end` (exclusive) of a tensor; others only where it cannot do without.

        Raises:
          CheckpointError: as `read`.
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
            return leaf.to_stored(source.read_layer(leaf.orbax, layer, leaf.expert), self.config, "hf")
        array = source.read(leaf.name(source.format, layer))
        return leaf.convert_layout(array, self.config, source.format, "hf")

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        source = self.source
        if isinstance(source, OrbaxSource):
            return self.read(leaf, layer)[begin:end]
        # Layouts differ in the order of rows within a head.
        head = self.config.head_dim if leaf.rotary and is_interleaved(source.format, self.config) else 1
        first, last = begin - begin % head, end + -end % head
        rows = source.read_rows(leaf.name(source.format, layer), first, last)
        return leaf.convert_layout(rows, self.config, source.format, "hf")[begin - first : end - first]


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
        place = tuple(axis for axis in (index, leaf.expert) if axis is not None)
        return leaf.to_stored(np.asarray(array[place] if place else array), self.config, "hf")

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        return self.read(leaf, layer)[begin:end]

    def check(self) -> None:
        """Checks, from shapes alone, that the parameters are those of the configuration.

        Raises:
          ConfigError: naming what differs.
        """
        config = self.config
        expected = {leaf.orbax: leaf.stored_shape(config, "orbax") for leaf in leaves(config)}
        params = dict(self.params)
        if isinstance(layers := params.get("layers"), (list, tuple)):
            params["layers"] = jax.tree.map(_stack_shape, *layers)
        found = {
            ".".join(str(getattr(key, "key", key)) for key in path): tuple(array.shape)
            for path, array in jax.tree_util.tree_leaves_with_path(params)
        }
        if found != expected:
            names = sorted(name for name in expected | found if found.get(name) != expected.get(name))
            named = [f"{name} {_shown(found.get(name))}, not {_shown(expected.get(name))}" for name in names]
            raise ConfigError(
                f"the parameters are not those of the configuration: {format_list(named, 3)}; give the "
                "configuration that they were loaded or initialized with"
            )

    def _leaf(self, leaf: Leaf, layer: int | None) -> tuple[Any, int | None]:
        """Returns the array of the leaf, and the layer index in it if it is stacked."""
        value: Any = self.params
        for key in leaf.path:
            value = value[key]
            if key == "layers" and not isinstance(value, Mapping):
                value, layer = value[layer], None
        return value, layer


def _stack_shape(*layers: Any) -> jax.ShapeDtypeStruct:
    """The shape of the arrays of all layers, stacked; that of the first one that differs if one does."""
    shapes = [layer.shape for layer in layers]
    other = next((shape for shape in shapes if shape != shapes[0]), shapes[0])
    return jax.ShapeDtypeStruct((len(layers), *other), layers[0].dtype)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
