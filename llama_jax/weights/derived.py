"""Models made of other models: heads pooled, checkpoints averaged, vocabularies resized, adapters merged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import adapters
from llama_jax.adapters import lora
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.names import SCORE, Leaf
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast

_MOST_TOKENS = 1 << 24
_CHUNK = 1 << 22  # values that are summed at once, in f64


@dataclasses.dataclass(frozen=True)
class _Derived:
    """A model with the tensors of another, until a subclass says otherwise."""

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


@dataclasses.dataclass(frozen=True)
class PooledHeads(_Derived):
    """Key and value heads averaged in groups, as a model of fewer of them begins its uptraining.

    Mean pooling is what grouped-query attention's paper found best (arXiv 2305.13245, 2.1). Heads that are
    equal within their group stay exactly as they are; otherwise the model has to be trained further.

    Attributes:
      base: the model.
      kv_heads: how many there will be; 1 is multi-query attention.

    Raises:
      ConfigError: if the number does not divide the model's.
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
        if leaf.path[-1] not in ("wk", "wv"):
            return array
        groups = array.reshape(self.kv_heads, -1, self.config.head_dim * array.shape[-1])
        # In f64 the mean of equal numbers is that number.
        mean = groups.mean(axis=1, dtype=np.float64).reshape(-1, array.shape[-1])
        return cast(mean, array.dtype)


@dataclasses.dataclass(frozen=True)
class Averaged(_Derived):
    """A weighted sum of models: a "soup" (arXiv 2203.05482), or a point on the line between two.

    Attributes:
      base: the first model.
      others: the rest, of the same configuration.
      weights: of all of them in order; they sum to 1.

    Raises:
      ConfigError: if the models differ, or the weights are not as many or do not sum to 1.
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
                    f"the models to average are not alike: the first and number {number} have "
                    f"{', '.join(differ)}"
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
        flat, parts = out.reshape(-1), [array.reshape(-1) for array in arrays]
        for start in range(0, flat.size, _CHUNK):
            here = slice(start, start + _CHUNK)
            weighted = zip(self.weights, parts, strict=True)
            total = sum(weight * part[here].astype(np.float64) for weight, part in weighted)
            flat[here] = cast(np.asarray(total), out.dtype)
        return out


@dataclasses.dataclass(frozen=True)
class ResizedVocabulary(_Derived):
    """A vocabulary with rows at its end added, each the mean of those before, or cut off.

    The mean gives a new token the probability of an average one, where zeros or random rows would make it
    likelier than any other (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").

    Attributes:
      base: the model.
      vocab_size: the new V.

    Raises:
      ConfigError: if it is no whole number from 1 to 2^24.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size <= _MOST_TOKENS:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}; it must be a whole number from 1 to {_MOST_TOKENS}"
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


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier's head apart from its model: weight [C, D], and the names of its numbers."""

    weight: np.ndarray
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class WithHead(_Derived):
    """A model with a head in place of its output projection, or of the head that it had.

    Attributes:
      base: the model.
      head: what it gets.

    Raises:
      ConfigError: if the head is for another model.
    """

    head: Head

    def __post_init__(self) -> None:
        found, width = self.head.weight.shape[1], self.base.config.hidden_size
        if found != width:
            raise ConfigError(
                f"the adapter is for another model: its head takes {found} numbers, the base has {width}; "
                "give its own base"
            )

    @property
    def config(self) -> LlamaConfig:
        return self.base.config.replace(labels=self.head.labels)

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return self.head.weight.dtype if leaf is SCORE else self.base.dtype(leaf, layer)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        return self.head.weight if leaf is SCORE else self.base.read(leaf, layer)


@dataclasses.dataclass(frozen=True)
class Merged(_Derived):
    """A model with an adapter merged into its matrices, in f32: W + scale a b, DoRA's at their magnitudes.

    Attributes:
      base: the model.
      settings: what the adapter was made with.
      adapter: its tree, layers stacked, as `lora.attach` takes it.
      into: the type of the merged matrices; None: what each was, so that theirs rounds what was learned.

    Raises:
      ConfigError: if the adapter is for another model.
    """

    settings: lora.Lora
    adapter: Any
    into: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        adapters.check(self.settings, self.config, self.adapter)
        object.__setattr__(self, "adapter", jax.tree.map(np.asarray, self.adapter))

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        return self.into if self.into is not None and self._own(leaf) else self.base.dtype(leaf, layer)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        array, own = self.base.read(leaf, layer), self._own(leaf)
        if own is None:
            return array
        a, b = own["a"][layer].T, self.settings.scale * own["b"][layer].T  # [r, I], [O, r]
        out = np.empty(array.shape, self.dtype(leaf, layer))
        rows = max(1, _CHUNK // array.shape[1])
        for start in range(0, len(array), rows):
            here = slice(start, start + rows)
            part = array[here].astype(np.float32) + b[here] @ a
            if "magnitude" in own:
                norms = np.linalg.norm(part, axis=1)
                part *= (own["magnitude"][layer][here] / norms)[:, None]
            out[here] = cast(part, out.dtype)
        return out

    def _own(self, leaf: Leaf) -> Any:
        """The adapter's leaves of a matrix, or None."""
        return self.adapter["layers"].get(leaf.path[1], {}).get(leaf.path[-1]) if leaf.per_layer else None
