"""Models derived from a base by an adapter: low-rank updates merged into matrices, and tensors replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax import adapters
from llama_jax.adapters import lora
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.derived import DerivedTensors
from llama_jax.weights.names import EMBEDDING, LM_HEAD, Leaf, leaves
from llama_jax.weights.source import FLOAT_DTYPES, TensorInfo, format_list
from llama_jax.weights.torch_zip import read_rows as read_stored_rows
from llama_jax.weights.torch_zip import read_tensor
from llama_jax.weights.write.cast import cast

_CHUNK = 1 << 22  # values per step of a merge


class Initial(NamedTuple):
    """An initialization that takes a part of the base for the adapter: `pissa` or `olora`."""

    kind: str
    rank: int
    scale: float

    def update(self, weight: np.ndarray) -> np.ndarray:
        """Returns the update that the adapter began with, which its training replaced.

        PiSSA (arXiv 2404.02948) begins with the largest `rank` singular values and vectors, OLoRA (arXiv
        2406.01775) with the first columns of Q and rows of R.

        Args:
          weight: f32 [O, I].

        Returns:
          f32 [O, I].
        """
        if self.kind == "pissa":
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            return (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank]
        q, r = np.linalg.qr(weight)
        return np.float32(self.scale) * (q[:, : self.rank] @ r[: self.rank])


@dataclasses.dataclass(frozen=True)
class LowRank:
    """An update b a of a matrix [O, I].

    Attributes:
      a: f32 [r, I].
      b: f32 [O, r], scaled.
      magnitude: with DoRA, the norms of the rows of the updated matrix: f32 [O]. Those of an embedding, whose
        outputs are columns, are f32 [I].
      columns: whether magnitudes are of columns.
      initial: what is subtracted from the matrix first.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None
    columns: bool = False
    initial: Initial | None = None

    def rows(self, begin: int, end: int) -> LowRank | None:
        """Returns the update of some rows; None if it depends on all of them.

        That is so with magnitudes of columns, and with an initialization that decomposes the matrix.
        """
        if self.initial is not None or (self.columns and self.magnitude is not None):
            return None
        magnitude = None if self.magnitude is None else self.magnitude[begin:end]
        return dataclasses.replace(self, b=self.b[begin:end], magnitude=magnitude)

    def add(self, array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        """Returns the updated matrix, computed in f32."""
        if self.initial is not None:
            array = array.astype(np.float32)
            array = array - self.initial.update(array)
        out = np.empty(array.shape, dtype)
        rows = max(1, _CHUNK // array.shape[1])
        chunks = [slice(start, start + rows) for start in range(0, len(array), rows)]
        factors = self._column_factors(array, chunks) if self.columns else None
        for chunk in chunks:
            merged = array[chunk].astype(np.float32) + self.b[chunk] @ self.a
            if factors is not None:
                merged *= factors
            elif self.magnitude is not None:
                merged *= (self.magnitude[chunk] / np.linalg.norm(merged, axis=1))[:, None]
            out[chunk] = cast(merged, out.dtype)
        return out

    def _column_factors(self, array: np.ndarray, chunks: list[slice]) -> np.ndarray | None:
        if self.magnitude is None:
            return None
        squares = np.zeros(array.shape[1], np.float64)
        for chunk in chunks:
            merged = array[chunk].astype(np.float32) + self.b[chunk] @ self.a
            squares += np.square(merged, dtype=np.float64).sum(axis=0)
        return (self.magnitude / np.sqrt(squares)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Merged(DerivedTensors):
    """A model with a LoRA adapter merged into its matrices, computed in f32.

    W + scale a b; for DoRA, its rows are then rescaled to the learned magnitudes.

    Attributes:
      base: the model.
      settings: the adapter's settings.
      adapter: the adapter's tree for `lora.attach`, layers stacked. A layer whose magnitudes are all zero is
        not adapted.
      merged_dtype: dtype of the merged matrices; None keeps each base matrix's dtype, which may round the
        update away.
      initial: what each matrix lost to its adapter, by the last part of its path, its layer and its expert.

    Raises:
      ConfigError: if the adapter is for another model.
    """

    settings: lora.Lora
    adapter: Any
    merged_dtype: np.dtype[Any] | None = None
    initial: Mapping[tuple[str, int, int | None], Initial] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        adapters.check(self.settings, self.config, self.adapter)
        object.__setattr__(self, "adapter", jax.tree.map(np.asarray, self.adapter))

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        if self.merged_dtype is None or self._adapter_of(leaf) is None:
            return self.base.dtype(leaf, layer)
        return self.merged_dtype

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        array, update = self.base.read(leaf, layer), self._update(leaf, layer)
        if update is None:
            return cast(array, self.dtype(leaf, layer))
        return update.add(array, self.dtype(leaf, layer))

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        """Reads and merges some rows, and no others unless the update depends on all."""
        update = self._update(leaf, layer)
        if update is not None and (update := update.rows(begin, end)) is None:
            return self.read(leaf, layer)[begin:end]
        array = self.base.read_rows(leaf, layer, begin, end)
        dtype = self.dtype(leaf, layer)
        return cast(array, dtype) if update is None else update.add(array, dtype)

    def _update(self, leaf: Leaf, layer: int | None) -> LowRank | None:
        """What is added to a matrix; None if it is not adapted."""
        adapter = self._adapter_of(leaf)
        if adapter is None or layer is None:
            return None
        magnitude = adapter["magnitude"][layer] if "magnitude" in adapter else None
        if magnitude is not None and not magnitude.any():
            return None
        place = layer if leaf.expert is None else (layer, leaf.expert)
        a, b = adapter["a"][place].T, self.settings.scale * adapter["b"][place].T  # [r, I], [O, r]
        return LowRank(a, b, magnitude, initial=self.initial.get((leaf.path[-1], layer, leaf.expert)))

    def _adapter_of(self, leaf: Leaf) -> Any:
        """Returns the adapter's leaves of a matrix, or None if it is not adapted."""
        return self.adapter["layers"].get(leaf.path[1], {}).get(leaf.path[-1]) if leaf.per_layer else None


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor.

    Attributes:
      whole: the name and location of a tensor that replaces it.
      low_rank: an update of it.
      rows: rows that replace its own: their indices, int [n], and f32 [n, D].
    """

    whole: tuple[str, TensorInfo] | None = None
    low_rank: LowRank | None = None
    rows: tuple[np.ndarray, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Changed(DerivedTensors):
    """A model some of whose tensors are replaced or updated.

    Attributes:
      base: the model.
      changes: by Hugging Face's name of the tensor. The base of a changed output projection is the embedding
        table if the model's are tied.
      untied: whether the output projection is no longer the embedding table.
      merged_dtype: dtype of updated tensors, see `Merged`; a tensor that is replaced has its own.

    Raises:
      ConfigError: if a shape is that of another model's.
    """

    changes: Mapping[str, Change]
    untied: bool = False
    merged_dtype: np.dtype[Any] | None = None

    def __post_init__(self) -> None:
        names = [(leaf, layer) for leaf in leaves(self.config) for layer in self._layers(leaf)]
        expected = {leaf.name("hf", layer): leaf.stored_shape(self.config, "hf") for leaf, layer in names}
        problems = [
            f"{name} {list(shape)} should be {list(expected[name])}"
            for name, change in self.changes.items()
            if name in expected and (shape := _shape(change, expected[name])) != expected[name]
        ]
        if self.config.has_output and not self.config.tie_word_embeddings:
            head = self.changes.get(LM_HEAD.hf, Change())
            if self.config.vocab_size != self.base.config.vocab_size and head.whole is None:
                problems.append(f"{LM_HEAD.hf} is missing, of {self.config.vocab_size} rows")
        if extra := sorted(self.changes.keys() - expected.keys()):
            problems.append(f"{format_list(extra, 4)}: not in the base model")
        if problems:
            raise ConfigError(
                f"the adapter is for another model: {format_list(problems, 3)}; use the base model it was "
                "trained on"
            )

    @property
    def config(self) -> LlamaConfig:
        config = self.base.config
        table = self.changes.get(EMBEDDING.hf, Change()).whole
        if table is not None and len(table[1].shape) == 2:
            config = config.replace(vocab_size=max(1, table[1].shape[0]))
        return config.replace(tie_word_embeddings=False) if self.untied else config

    def dtype(self, leaf: Leaf, layer: int | None) -> np.dtype[Any]:
        change = self.changes.get(leaf.name("hf", layer), Change())
        if self.merged_dtype is not None and (change.low_rank or change.rows):
            return self.merged_dtype
        if change.whole is not None:
            return FLOAT_DTYPES.get(change.whole[1].dtype, np.dtype(np.float32))
        return self.base.dtype(self._base_leaf(leaf), layer)

    def read(self, leaf: Leaf, layer: int | None) -> np.ndarray:
        change = self.changes.get(leaf.name("hf", layer), Change())
        if change.whole is not None:
            array = read_tensor(*change.whole)
        else:
            array = self.base.read(self._base_leaf(leaf), layer)
        dtype = self.dtype(leaf, layer)
        if change.low_rank is not None:
            array = change.low_rank.add(array, dtype)
        if change.rows is not None:
            indices, values = change.rows
            array = array.astype(dtype)
            array[indices] = cast(values, dtype)
        return array

    def read_rows(self, leaf: Leaf, layer: int | None, begin: int, end: int) -> np.ndarray:
        """Reads some rows of one tensor, and no others unless an update depends on all of them."""
        change = self.changes.get(leaf.name("hf", layer), Change())
        update = change.low_rank
        if update is not None and (update := update.rows(begin, end)) is None:
            return self.read(leaf, layer)[begin:end]
        if change.whole is not None:
            array = read_stored_rows(*change.whole, begin, end)
        else:
            array = self.base.read_rows(self._base_leaf(leaf), layer, begin, end)
        dtype = self.dtype(leaf, layer)
        if update is not None:
            array = update.add(array, dtype)
        if change.rows is not None:
            indices, values = change.rows
            here = (indices >= begin) & (indices < end)
            array = array.astype(dtype)
            array[indices[here] - begin] = cast(values[here], dtype)
        return array

    def _base_leaf(self, leaf: Leaf) -> Leaf:
        return EMBEDDING if leaf is LM_HEAD and self.base.config.tie_word_embeddings else leaf

    def _layers(self, leaf: Leaf) -> range | tuple[None]:
        return range(self.config.num_hidden_layers) if leaf.per_layer else (None,)


def _shape(change: Change, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the first shape in a change that is not as expected, or `expected`."""
    shapes = [change.whole[1].shape] if change.whole is not None else []
    if change.low_rank is not None:
        update = change.low_rank
        shapes.append((update.b.shape[0], update.a.shape[1]))
        if update.magnitude is not None:
            other = (update.a if update.columns else update.b).shape[int(update.columns)]
            shapes.append(expected if update.magnitude.shape == (other,) else update.magnitude.shape)
    if change.rows is not None:
        indices, values = change.rows
        fits = values.shape == (len(indices), *expected[1:]) and 0 <= indices.min() <= indices.max()
        inside = fits and indices.max() < expected[0]
        shapes.append(expected if inside else (int(indices.max()) + 1, *values.shape[1:]))
    return next((shape for shape in shapes if shape != expected), expected)
