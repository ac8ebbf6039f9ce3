"""Reads Meta's own directories: params.json and consolidated.NN.pth, one file for each model-parallel part.

The authority is Meta's code: llama/model.py of meta-llama/llama (Llama 1 and 2) and models/llama3/model.py of
meta-llama/llama-models, whose layers say along which dimension fairscale has split each matrix.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.meta_params import EXTRA, PARAMS, Fields, config_of
from llama_jax.weights.safetensors import read_json
from llama_jax.weights.source import FLOAT_DTYPES, Source, TensorInfo, brief, decode_floats, quote
from llama_jax.weights.torch_zip import StridedInfo, part_of, read_array, read_torch_zip

_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_KEYS_AND_VALUES = (".attention.wk.weight", ".attention.wv.weight")
_SPLIT_COLUMNS = (".attention.wo.weight", ".feed_forward.w2.weight")
_ROWS = 4096  # of the output projection, compared at a time
# The matrices whose rows are V, F and D.
_TELLING = (_OUTPUT, "layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A tensor's parts in their order, and how they make it up.

    Attributes:
      pieces: one for each file.
      axis: the dimension along which they are joined.
      copies: how many pieces in a row are the same: all for a norm, and for a key or value head that has to
        serve several parts (Llama 3.1 405B in 16 parts) that many.
    """

    pieces: Sequence[StridedInfo]
    axis: int
    copies: int

    @property
    def whole(self) -> TensorInfo:
        """What they make up; its place is the first piece's."""
        first, count = self.pieces[0], len(self.pieces) // self.copies
        if count == 1:
            return first
        shape = list(first.shape)
        shape[self.axis] *= count
        return TensorInfo(tuple(shape), first.dtype, first.nbytes * count, first.file, first.offset)

    def read(self, name: str) -> np.ndarray:
        """Reads the whole, a piece at a time."""
        whole, shared = self.whole, self.copies == len(self.pieces)
        if len(self.pieces) == 1:
            return read_array(name, self.pieces[0])
        out = np.empty(whole.shape, FLOAT_DTYPES[whole.dtype])
        for number, piece in enumerate(self.pieces):
            place = out if shared else self._place(out, number // self.copies)
            array = read_array(name, piece)
            if number % self.copies == 0:
                place[...] = array
            elif not _same(place, array):
                warnings.warn(
                    f"{piece.file}: differs from the parts before in what they share, of which the first is "
                    "read; if the parts are not of one model, get them again",
                    stacklevel=3,
                )
            del array  # before the next is read
        return out

    def _place(self, out: np.ndarray, index: int) -> np.ndarray:
        """Where one of the distinct pieces goes."""
        step = self.pieces[0].shape[self.axis]
        return out[(slice(None),) * self.axis + (slice(index * step, (index + 1) * step),)]


@dataclasses.dataclass(frozen=True)
class MetaSource(Source):
    """A Meta checkpoint; `tensors` describes the whole ones.

    Attributes:
      parts: what each tensor is joined from.
    """

    parts: Mapping[str, Parts] = dataclasses.field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor, its parts joined.

        Raises:
          CheckpointError: if there is no such tensor, or its bytes can no longer be read.
        """
        if name not in self.parts:
            raise CheckpointError(f"{self.path}: there is no tensor {quote(name)}")
        array = self.parts[name].read(name)
        if name == _EMBEDDING and self.config.tie_word_embeddings:
            self._check_tied(array)
        return array

    def _check_tied(self, embedding: np.ndarray) -> None:
        """Compares the output projection, in the files a tensor of its own, with the embedding."""
        row = 0
        for piece in self.parts[_OUTPUT].pieces:
            for begin in range(0, piece.shape[0], _ROWS):
                rows = read_array(_OUTPUT, part_of(piece, 0, begin, min(begin + _ROWS, piece.shape[0])))
                if not _same(rows, embedding[row : row + len(rows)]):
                    raise CheckpointError(
                        f"{self.path}: {_OUTPUT} is not the copy of {_EMBEDDING} that {EXTRA} says it is; "
                        "set tie_word_embeddings to false there"
                    )
                row += len(rows)


def split_axis(name: str, dimensions: int, *, llama3: bool) -> int | None:
    """Along which dimension a tensor is split into parts; None for one that every part has whole.

    Args:
      name: the tensor's, as Meta's files have it.
      dimensions: how many it has.
      llama3: the embedding is split as Llama 3's code does, along V; Llama 1 and 2 split it along D.
    """
    if dimensions < 2:
        return None
    if name == _EMBEDDING:
        return 0 if llama3 else 1
    return 1 if name.endswith(_SPLIT_COLUMNS) else 0


def is_meta(path: Path) -> bool:
    """Whether a path is a directory with parts of a Meta checkpoint, or one of them."""
    if path.is_dir():
        return any(_PART.fullmatch(entry.name) for entry in path.iterdir())
    return _PART.fullmatch(path.name) is not None


def open_meta(path: Path, why: str) -> MetaSource:
    """Opens a Meta checkpoint.

    Args:
      path: its directory, or any of the .pth files in it, which stands for all.
      why: how the format was recognised.

    Raises:
      CheckpointError: if a file is missing or malformed, the parts do not belong together, or they hold no
        Llama that llama_jax can run.
    """
    folder = path if path.is_dir() else path.parent
    files = _part_files(folder)
    if not (folder / PARAMS).exists():
        raise CheckpointError(
            f"{path}: there is no {PARAMS} beside it, which describes the model; get it too"
        )
    params = read_json(folder / PARAMS)
    extra = read_json(folder / EXTRA) if (folder / EXTRA).exists() else {}
    fields = Fields(folder / PARAMS, params)
    width, heads = fields.size("dim"), fields.size("n_heads")
    kv_width = width // heads * fields.size("n_kv_heads", heads)
    parts = {
        name: _joined(name, pieces, width, kv_width)
        for name, pieces in _by_tensor([read_torch_zip(file) for file in files]).items()
    }
    tensors = {name: part.whole for name, part in parts.items()}
    vocab_size, intermediate_size, queries = (_rows(folder, name, tensors) for name in _TELLING)
    # Every part has its share of the query heads, which together are as wide as the model.
    share = queries // len(files)
    if share and width % share == 0 and width != queries:
        raise CheckpointError(
            f"{folder}: has {len(files)} of the {width // share} parts of the model; get all of them"
        )
    config = config_of(folder, params, extra, vocab_size, intermediate_size)
    home, metadata = _tokenizer_folder(folder), {"parts": len(files)}
    return MetaSource("meta", path, why, config, tensors, decode_floats, metadata, home, parts)


def _part_files(folder: Path) -> list[Path]:
    """Returns the parts' files in their order."""
    files = sorted(entry for entry in folder.iterdir() if _PART.fullmatch(entry.name))
    names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    absent = sorted({*names} - {file.name for file in files})
    if absent:
        raise CheckpointError(f"{folder}: of its parts {brief(absent)} is missing; get all of them")
    return files


def _by_tensor(parts: Sequence[Mapping[str, StridedInfo]]) -> dict[str, list[StridedInfo]]:
    """Returns each tensor's parts, which must be alike."""
    first = parts[0]
    for part in parts[1:]:
        others = sorted(first.keys() ^ part.keys())
        others += [name for name in first if name not in others and not _alike(first[name], part[name])]
        if others:
            raise CheckpointError(
                f"{next(iter(part.values())).file}: differs from the first part in "
                f"{brief(map(quote, others), 5)}; the parts are not of one model, get them again"
            )
    return {name: [part[name] for part in parts] for name in first}


def _alike(left: TensorInfo, right: TensorInfo) -> bool:
    return (left.shape, left.dtype) == (right.shape, right.dtype)


def _same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays have the same bits."""
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _joined(name: str, pieces: Sequence[StridedInfo], width: int, kv_width: int) -> Parts:
    """Says by a tensor's name and a part's shape how the parts are joined."""
    shape, count = pieces[0].shape, len(pieces)
    axis = split_axis(name, len(shape), llama3=shape[1:] == (width,))
    if axis is None:
        return Parts(pieces, 0, count)
    times, rest = divmod(shape[0] * count, max(kv_width, 1))
    replicated = name.endswith(_KEYS_AND_VALUES) and times > 1 and rest == 0 and count % times == 0
    return Parts(pieces, axis, times if replicated else 1)


def _tokenizer_folder(folder: Path) -> Path:
    """Meta's downloads have a tokenizer in the model's folder, or one for all models beside them."""
    beside = (folder.parent / "tokenizer.model").is_file()
    return folder.parent if beside and not any((folder / name).is_file() for name in _TOKENIZERS) else folder


def _rows(folder: Path, name: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Returns how many outputs a matrix has."""
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{folder}: there is no matrix {quote(name)}, so it holds no Llama")
    return tensors[name].shape[0]
