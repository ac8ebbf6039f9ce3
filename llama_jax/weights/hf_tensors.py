"""The tensors of a Hugging Face model directory, wherever its files hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.quantized import QuantizedInfo
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import Source, TensorInfo, format_list, quote
from llama_jax.weights.torch_zip import read_rows, read_tensor, read_torch_zip

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
_BIAS = re.compile(
    r"model\.layers\.\d{1,4}\.(?P<module>self_attn|mlp)\.(?P<name>q|k|v|o|gate|up|down)_proj\.bias"
)
_CHUNK_ROWS = 4096  # of two matrices, compared at a time

# Weights files in the order in which transformers looks for them: the single file, the index, the reader.
_KINDS: tuple[tuple[str, str, Callable[[Path], Mapping[str, TensorInfo]]], ...] = (
    ("model.safetensors", "model.safetensors.index.json", read_safetensors_header),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_zip),
)


class HFSource(Source):
    """A Hugging Face model directory."""

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its own dtype.

        Raises:
          CheckpointError: if there is no such tensor, or its bytes can no longer be read.
        """
        info = self.tensors.get(name)
        if isinstance(info, QuantizedInfo):
            return info.read(name)
        return super().read(name) if info is None else read_tensor(name, info)

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads some rows of one tensor; torch's checksum, which is of the whole, is not compared.

        Raises:
          CheckpointError: as `read`.
        """
        info = self.tensors.get(name)
        if isinstance(info, QuantizedInfo):
            return info.read_rows(name, begin, end)
        if info is None:
            return self.read(name)[begin:end]
        return read_rows(name, info, begin, end)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Finds the tensors of a model, under the names that transformers' LlamaForCausalLM gives them.

    A bare `LlamaModel` is saved without the prefix `model.`, which is added.

    Raises:
      CheckpointError: if a file is missing or malformed.
    """
    for single, index, read in _KINDS:
        if (folder / single).exists():
            return _named(read(folder / single))
        if (folder / index).exists():
            return _named(_read_shards(folder / index, read))
    names = ", ".join(f"{single} or {index}" for single, index, _ in _KINDS)
    raise CheckpointError(f"{folder}: has none of {names}; download the weights beside its config.json")


def _named(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    if any(name.startswith(_PREFIX) for name in tensors):
        return dict(tensors)
    heads = ("lm_head.", "score.")
    return {name if name.startswith(heads) else _PREFIX + name: info for name, info in tensors.items()}


def _read_shards(index: Path, read: Callable[[Path], Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Finds the tensors of all files that an index names.

    As in transformers, the files decide what there is, the last one where two have a tensor: an index may
    name tensors that were left out when the model was repacked, and omit others. What the model needs and no
    file has is found missing later.
    """
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is missing or not an object; download the file again")
    suffix = "." + index.name.removesuffix(".index.json").rpartition(".")[2]
    files = sorted({_checked_file_name(index, name, file, suffix) for name, file in weight_map.items()})
    missing_files = [file for file in files if not (folder / file).is_file()]
    if missing_files:
        raise CheckpointError(
            f"{folder}: files of the index are missing: {format_list(missing_files)}; download them too"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= read(folder / file)
    return tensors


def _checked_file_name(index: Path, tensor: str, file: Any, suffix: str) -> str:
    """Returns a file name from the index; refuses any path outside the directory."""
    plain = isinstance(file, str) and file.endswith(suffix) and not set(file) & set("/\\:\0\r\n")
    if not plain:
        raise CheckpointError(
            f"{index}: tensor {quote(tensor)} is placed in {quote(str(file))}; only {suffix} files in "
            "the same directory are read"
        )
    return file


def find_biases(tensors: dict[str, TensorInfo], announced: Sequence[str]) -> set[str]:
    """Which projections have biases that are not all zero: any of `qkv`, `o` and `mlp`.

    Args:
      tensors: the tensors by name.
      announced: the modules whose biases config.json says to use: self_attn (attention_bias), mlp (mlp_bias).
    """
    return {
        _group(bias)
        for name, info in tensors.items()
        if (bias := _BIAS.fullmatch(name)) and bias["module"] in announced and read_tensor(name, info).any()
    }


def _group(bias: re.Match[str]) -> str:
    """The projections that have biases together with this one."""
    if bias["module"] == "mlp":
        return "mlp"
    return "o" if bias["name"] == "o" else "qkv"


def drop_zero_biases(tensors: dict[str, TensorInfo], kept: set[str]) -> dict[str, TensorInfo]:
    """Leaves out biases that are zero, but for those of projections that `find_biases` found."""

    def is_dropped(name: str, info: TensorInfo) -> bool:
        bias = _BIAS.fullmatch(name)
        return bias is not None and _group(bias) not in kept and not read_tensor(name, info).any()

    return {name: info for name, info in tensors.items() if not is_dropped(name, info)}


def resolve_tied(tensors: dict[str, TensorInfo], tied: bool) -> bool:
    """Decides by the files whether the output projection is the embedding table, as transformers does.

    `tie_word_embeddings` holds unless the files have two matrices that differ: a finetuned head is kept. If
    they have but one, it is both.

    Args:
      tensors: the model's tensors; a head that stands for both is renamed to the embedding.
      tied: config.json's `tie_word_embeddings`.

    Raises:
      CheckpointError: if the matrices cannot be read.
    """
    if not tied or LM_HEAD not in tensors:
        return tied
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(LM_HEAD)
        return True
    return _equal(tensors[EMBEDDING], tensors[LM_HEAD])


def _equal(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two matrices hold the same values; reads a few rows of each at a time."""
    if left.shape != right.shape or len(left.shape) != 2:
        return False
    for begin in range(0, left.shape[0], _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, left.shape[0])
        a, b = (_rows(info, begin, end) for info in (left, right))
        if not np.array_equal(a, b, equal_nan=True):
            return False
    return True


def _rows(info: TensorInfo, begin: int, end: int) -> np.ndarray:
    if isinstance(info, QuantizedInfo):
        return info.read(EMBEDDING)[begin:end].astype(np.float64)
    return read_rows(EMBEDDING, info, begin, end).astype(np.float64)
