"""Models derived from others: pooled KV heads, averages, resized vocabularies, heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.weights.names import SCORE, Leaf
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast

_MAX_VOCAB_SIZE = 1 << 24
_CHUNK = 1 << 22  # values per step of an average, in f64
_ROWS = 1 << 10  # of a vocabulary, per step of their mean


@dataclasses.dataclass(frozen=True)
class DerivedTensors:
    """Delegates to the tensors of a base model; subclasses override what they change."""

    base: Tensors

    @property
    def config(self) -> LlamaConfig:
        return self.base.config

    @property
    def stacked(self) -> bool:
        return self.base.stacked

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return self.base.dtype(leaf, layer)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        return self.base.read(leaf, layer)

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        return self.read(leaf, layer)[begin:end]


@dataclasses.dataclass(frozen=True)
class PooledHeads(DerivedTensors):
    """A model with key and value heads mean-pooled in groups: the starting point of GQA uptraining.

    Mean pooling worked best in the GQA paper (arXiv 2305.13245, 2.1). It is exact if the heads of a group are
    equal; otherwise the model has to be trained further.

    Attributes:
      base: the model.
      kv_heads: the new number of key and value heads; 1 is multi-query attention.

    Raises:
      ConfigError: if `kv_heads` does not divide the model's number of key and value heads.
    """

    kv_heads: int

    def __post_init__(self) -> None:
        heads = self.base.config.num_key_value_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            raise ConfigError(
                f"kv_heads is {self.kv_heads}; the model's {heads} key/value heads can be pooled to {sizes}"
            )

    @property
    def config(self) -> LlamaConfig:
        return self.base.config.replace(num_key_value_heads=self.kv_heads)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        array = self.base.read(leaf, layer)
        if "K" not in leaf.axes:
            return array
        groups = array.reshape(self.kv_heads, -1, self.config.head_dim, *array.shape[1:])
        # In f64 the mean of equal values is exact.
        mean = groups.mean(axis=1, dtype=np.float64).reshape(-1, *array.shape[1:])
        return cast(mean, array.dtype)


@dataclasses.dataclass(frozen=True)
class Averaged(DerivedTensors):
    """A weighted average of models: a model soup (arXiv 2203.05482), or an interpolation of two models.

    Attributes:
      base: the first model.
      others: the other models, of the same configuration.
      weights: one weight per model, in order; they sum to 1.

    Raises:
      ConfigError: if the configurations differ, or the weights have another length or do not sum to 1.
    """

    others: Sequence[Tensors]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        for number, other in enumerate(self.others, 2):
            ours, theirs = dataclasses.asdict(self.base.config), dataclasses.asdict(other.config)
            differ = [
                f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]
            ]
            if differ:
                raise ConfigError(
                    f"the models to average differ: the first and number {number} have {', '.join(differ)}"
                )
        if len(self.weights) != len(self.others) + 1 or not math.isclose(sum(self.weights), 1, abs_tol=1e-6):
            raise ConfigError(
                f"weights are {', '.join(map(str, self.weights))}; give one for each of the "
                f"{len(self.others) + 1} models, with a sum of 1"
            )

    @property
    def stacked(self) -> bool:
        return any(model.stacked for model in (self.base, *self.others))

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        dtypes = {model.dtype(leaf, layer) for model in (self.base, *self.others)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        arrays = [model.read(leaf, layer) for model in (self.base, *self.others)]
        out = np.empty(arrays[0].shape, self.dtype(leaf, layer))
        flat_out, flat_arrays = out.reshape(-1), [array.reshape(-1) for array in arrays]
        for start in range(0, flat_out.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            weighted = zip(self.weights, flat_arrays, strict=True)
            total = sum(weight * array[chunk].astype(np.float64) for weight, array in weighted)
            flat_out[chunk] = cast(np.asarray(total), out.dtype)
        return out


@dataclasses.dataclass(frozen=True)
class ResizedVocabulary(DerivedTensors):
    """A model with vocabulary rows appended, each the mean of the existing rows, or truncated.

    Mean initialization gives a new token the probability of an average token; zero or random initialization
    can make it more likely than every other token (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models").

    Attributes:
      base: the model.
      vocab_size: the new V.

    Raises:
      ConfigError: if `vocab_size` is not a whole number from 1 to 2^24.
    """

    vocab_size: int
    _means: dict[tuple[str, ...], np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= _MAX_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; it must be a whole number from 1 to {_MAX_VOCAB_SIZE}"
            )

    @property
    def config(self) -> LlamaConfig:
        return self.base.config.replace(vocab_size=self.vocab_size)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        array = self.base.read(leaf, layer)
        if "V" not in leaf.axes:
            return array
        added = self.vocab_size - len(array)
        if added <= 0:
            return array[: self.vocab_size]
        mean = cast(array.mean(axis=0, dtype=np.float64), array.dtype)
        return np.concatenate([array, np.broadcast_to(mean, (added, len(mean)))])

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        """Reads some rows; for added ones, the mean of all, all of them once, a part at a time."""
        old = self.base.config.vocab_size
        if "V" not in leaf.axes or end <= old:
            return self.base.read_rows(leaf, layer, begin, end)
        mean = self._mean(leaf, layer)
        added = np.broadcast_to(mean, (end - max(begin, old), len(mean)))
        if begin >= old:
            return added
        return np.concatenate([self.base.read_rows(leaf, layer, begin, old), added])

    def _mean(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        """The mean of a table's rows, added in the order in which `mean` adds them."""
        if leaf.path not in self._means:
            height, total = self.base.config.vocab_size, None
            for begin in range(0, height, _ROWS):
                rows = self.base.read_rows(leaf, layer, begin, min(begin + _ROWS, height))
                dtype, wide = rows.dtype, rows.astype(np.float64)
                total = wide.sum(axis=0) if total is None else np.vstack([total, wide]).sum(axis=0)
            assert total is not None
            self._means[leaf.path] = cast(total / height, dtype)
        return self._means[leaf.path]


@dataclasses.dataclass(frozen=True)
class WithContext(DerivedTensors):
    """A model whose context is extended: other rotary settings, the same tensors.

    Attributes:
      base: the model.
      max_position_embeddings, rope_theta, rope_scaling: as in `LlamaConfig`.
    """

    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None

    @property
    def config(self) -> LlamaConfig:
        return self.base.config.replace(
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
        )


@dataclasses.dataclass(frozen=True)
class Head:
    """A classification head without its model: weight [C, D], and the C label names."""

    weight: np.ndarray
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WithHead(DerivedTensors):
    """A model with a classification head in place of its output projection or previous head.

    Attributes:
      base: the model.
      head: the new head.

    Raises:
      ConfigError: if the head's input size differs from the model's hidden_size.
    """

    head: Head

    def __post_init__(self) -> None:
        inputs, width = self.head.weight.shape[1], self.base.config.hidden_size
        if inputs != width:
            raise ConfigError(
                f"the adapter is for another model: its head has {inputs} inputs, the base model's "
                f"hidden_size is {width}; use the base model it was trained on"
            )

    @property
    def config(self) -> LlamaConfig:
        return self.base.config.replace(labels=self.head.labels)

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return self.head.weight.dtype if leaf is SCORE else self.base.dtype(leaf, layer)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        return self.head.weight if leaf is SCORE else self.base.read(leaf, layer)
