"""Reads Meta's checkpoints: params.json and consolidated.NN.pth, one file per model-parallel shard.

The reference is Meta's code: llama/model.py of meta-llama/llama (Llama 1 and 2) and models/llama3/model.py of
meta-llama/llama-models, whose fairscale layers define along which dimension each matrix is sharded.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.json_fields import JsonFields, read_json
from llama_jax.weights.meta_params import EXTRA_FILE, PARAMS_FILE, config_from_params
from llama_jax.weights.source import FLOAT_DTYPES, Source, TensorInfo, decode_floats, format_list, quote
from llama_jax.weights.torch_zip import StridedInfo, read_array, read_rows, read_torch_zip, slice_dimension

_SHARD_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_KV_PROJECTIONS = (".attention.wk.weight", ".attention.wv.weight")
_COLUMN_SHARDED = (".attention.wo.weight", ".feed_forward.w2.weight")
_CHUNK_ROWS = 4096  # of the output projection, compared at a time
# The matrices from whose rows V, F and D are read.
_SIZE_TENSORS = (_OUTPUT, "layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight")


@dataclasses.dataclass(frozen=True)
class ShardedTensor:
    """The shards of a tensor in order, and how they are concatenated.

    Attributes:
      shards: one for each file.
      axis: the dimension along which they are concatenated.
      copies: how many consecutive shards are replicas: all of them for a norm, and several for key and value
        heads that are replicated because there are fewer heads than shards (Llama 3.1 405B in 16 shards).
    """

    shards: Sequence[StridedInfo]
    axis: int
    copies: int

    @property
    def info(self) -> TensorInfo:
        """The concatenated tensor; its file and offset are the first shard's."""
        first, count = self.shards[0], len(self.shards) // self.copies
        if count == 1:
            return first
        shape = list(first.shape)
        shape[self.axis] *= count
        return TensorInfo(tuple(shape), first.dtype, first.nbytes * count, first.file, first.offset)

    def read(self, name: str) -> np.ndarray:
        """Reads the concatenated tensor, one shard at a time."""
        info, replicated = self.info, self.copies == len(self.shards)
        if len(self.shards) == 1:
            return read_array(name, self.shards[0])
        out = np.empty(info.shape, FLOAT_DTYPES[info.dtype])
        for number, shard in enumerate(self.shards):
            target = out if replicated else self._slice(out, number // self.copies)
            array = read_array(name, shard)
            if number % self.copies == 0:
                target[...] = array
            elif not _bitwise_equal(target, array):
                warnings.warn(
                    f"{shard.file}: its replicated tensors differ from the first shard's, which are used; "
                    "if the shards are not of one model, download them again",
                    stacklevel=3,
                )
            del array  # free it before the next shard is read
        return out

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads rows of the concatenated tensor; replicas are not compared."""
        shards = self.shards[:: self.copies]
        if self.axis == 1 and len(shards) > 1:
            return np.concatenate([read_rows(name, shard, begin, end) for shard in shards], axis=1)
        step, parts = shards[0].shape[0], []
        for number, shard in enumerate(shards):
            first, last = max(begin - number * step, 0), min(end - number * step, step)
            if first < last:
                parts.append(read_rows(name, shard, first, last))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _slice(self, out: np.ndarray, index: int) -> np.ndarray:
        """Returns the view of `out` for the distinct shard `index`."""
        step = self.shards[0].shape[self.axis]
        return out[(slice(None),) * self.axis + (slice(index * step, (index + 1) * step),)]


@dataclasses.dataclass(frozen=True)
class MetaSource(Source):
    """A Meta checkpoint; `tensors` describes the concatenated tensors.

    Attributes:
      sharded: the shards of each tensor.
    """

    sharded: Mapping[str, ShardedTensor] = dataclasses.field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor and concatenates its shards.

        Raises:
          CheckpointError: if there is no such tensor, or its bytes can no longer be read.
        """
        if name not in self.sharded:
            raise CheckpointError(f"{self.path}: there is no tensor {quote(name)}")
        return self.sharded[name].read(name)

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads some rows of one tensor, from the shards that have them.

        Raises:
          CheckpointError: as `read`.
        """
        if name not in self.sharded:
            return self.read(name)
        return self.sharded[name].read_rows(name, begin, end)


def _heads_equal(sharded: Mapping[str, ShardedTensor]) -> bool:
    """Whether the output projection, which Meta's files always store, equals the embedding bit for bit."""
    embedding, row = sharded[_EMBEDDING].read(_EMBEDDING), 0
    for shard in sharded[_OUTPUT].shards:
        for begin in range(0, shard.shape[0], _CHUNK_ROWS):
            end = min(begin + _CHUNK_ROWS, shard.shape[0])
            rows = read_array(_OUTPUT, slice_dimension(shard, 0, begin, end))
            if not _bitwise_equal(rows, embedding[row : row + len(rows)]):
                return False
            row += len(rows)
    return True


def split_axis(name: str, dimensions: int, *, llama3: bool) -> int | None:
    """Returns the dimension along which a tensor is sharded; None if it is replicated in every shard.

    Args:
      name: the tensor's name in Meta's files.
      dimensions: its number of dimensions.
      llama3: the embedding is sharded along V, as in Llama 3's code; Llama 1 and 2 shard it along D.
    """
    if dimensions < 2:
        return None
    if name == _EMBEDDING:
        return 0 if llama3 else 1
    return 1 if name.endswith(_COLUMN_SHARDED) else 0


def is_meta(path: Path) -> bool:
    """Whether a path is a directory with shards of a Meta checkpoint, or one of the shards."""
    if path.is_dir():
        return any(_SHARD_FILE.fullmatch(entry.name) for entry in path.iterdir())
    return _SHARD_FILE.fullmatch(path.name) is not None


def open_meta(path: Path, detected_by: str) -> MetaSource:
    """Opens a Meta checkpoint.

    Args:
      path: its directory, or any of its .pth files.
      detected_by: how the format was detected.

    Raises:
      CheckpointError: if a file is missing or malformed, the shards do not match, or llama_jax does not
        support the model.
    """
    folder = path if path.is_dir() else path.parent
    files = _shard_files(folder)
    if not (folder / PARAMS_FILE).exists():
        raise CheckpointError(f"{path}: there is no {PARAMS_FILE} beside it; download it too")
    params = read_json(folder / PARAMS_FILE)
    extra = read_json(folder / EXTRA_FILE) if (folder / EXTRA_FILE).exists() else {}
    fields = JsonFields(folder / PARAMS_FILE, params)
    width, heads = fields.integer("dim", minimum=1), fields.integer("n_heads", minimum=1)
    kv_width = width // heads * fields.integer("n_kv_heads", heads, minimum=1)
    sharded = {
        name: _sharded_tensor(name, shards, width, kv_width)
        for name, shards in _group_by_tensor([read_torch_zip(file) for file in files]).items()
    }
    tensors = {name: tensor.info for name, tensor in sharded.items()}
    vocab_size, intermediate_size, queries = (_rows(folder, name, tensors) for name in _SIZE_TENSORS)
    # The query heads are divided over the shards, and all together are as wide as the model.
    per_shard = queries // len(files)
    if per_shard and width % per_shard == 0 and width != queries:
        raise CheckpointError(
            f"{folder}: has {len(files)} of the {width // per_shard} shards of the model; download all"
        )
    config = config_from_params(folder, params, extra, vocab_size, intermediate_size)
    if config.tie_word_embeddings and _EMBEDDING in sharded:  # the files decide, not our note about them
        config = config.replace(tie_word_embeddings=_heads_equal(sharded))
    tokenizer_dir, metadata = _tokenizer_dir(folder), {"parts": len(files)}
    return MetaSource(
        "meta", path, detected_by, config, tensors, decode_floats, metadata, tokenizer_dir, sharded
    )


def _shard_files(folder: Path) -> list[Path]:
    """Returns the shards' files in order."""
    files = sorted(entry for entry in folder.iterdir() if _SHARD_FILE.fullmatch(entry.name))
    names = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    missing = sorted({*names} - {file.name for file in files})
    if missing:
        raise CheckpointError(f"{folder}: missing shards: {format_list(missing)}; download all of them")
    return files


def _group_by_tensor(files: Sequence[Mapping[str, StridedInfo]]) -> dict[str, list[StridedInfo]]:
    """Returns each tensor's shards, after checking that names, shapes and dtypes agree over all files."""
    first = files[0]
    for other in files[1:]:
        differing = sorted(first.keys() ^ other.keys())
        differing += [
            name for name in first if name not in differing and not _same_type(first[name], other[name])
        ]
        if differing:
            raise CheckpointError(
                f"{next(iter(other.values())).file}: differs from the first shard in "
                f"{format_list(map(quote, differing), 5)}; they are not of one model, download them again"
            )
    return {name: [file[name] for file in files] for name in first}


def _same_type(left: TensorInfo, right: TensorInfo) -> bool:
    return (left.shape, left.dtype) == (right.shape, right.dtype)


def _bitwise_equal(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def _sharded_tensor(name: str, shards: Sequence[StridedInfo], width: int, kv_width: int) -> ShardedTensor:
    """Infers from a tensor's name and its shards' shape how the shards are concatenated."""
    shape, count = shards[0].shape, len(shards)
    axis = split_axis(name, len(shape), llama3=shape[1:] == (width,))
    if axis is None:
        return ShardedTensor(shards, 0, count)
    copies, rest = divmod(shape[0] * count, max(kv_width, 1))
    replicated = name.endswith(_KV_PROJECTIONS) and copies > 1 and rest == 0 and count % copies == 0
    return ShardedTensor(shards, axis, copies if replicated else 1)


def _tokenizer_dir(folder: Path) -> Path:
    """Meta's downloads have the tokenizer in the model's directory, or one for all models in its parent."""
    in_parent = (folder.parent / "tokenizer.model").is_file()
    in_folder = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return folder.parent if in_parent and not in_folder else folder


def _rows(folder: Path, name: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Returns the number of rows (outputs) of a matrix."""
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{folder}: there is no matrix {quote(name)}; not a Llama checkpoint")
    return tensors[name].shape[0]
