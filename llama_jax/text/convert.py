"""Checkpoints from any format to any other, and models from memory to disk, streamed tensor by tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from llama_jax import adapters
from llama_jax.errors import CheckpointError, InputError, MissingTokenizerError, TokenizerError
from llama_jax.ops.quantization import Quantized
from llama_jax.text.model import Model
from llama_jax.text.pretrained import DTYPES, Progress, open_model, resolve
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.export import classifier_pad, vocabulary_of
from llama_jax.tokenizer.pad import pad
from llama_jax.weights import manifest
from llama_jax.weights.adapters import adapter_folder
from llama_jax.weights.derived import Averaged, PooledHeads, ResizedVocabulary
from llama_jax.weights.names import Format
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import ParamsTensors, Tensors
from llama_jax.weights.write.gguf import plan_gguf
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.llama2c import plan_llama2c
from llama_jax.weights.write.meta import plan_meta
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.plan import Plan
from llama_jax.weights.write.run import write

FORMATS: tuple[Format, ...] = get_args(Format)
_DTYPES: Mapping[Format, Sequence[str]] = {"gguf": (*DTYPES, "q8_0"), "llama2c": ("float32", "int8")}
_OTHERS = (".bin", ".pth", ".pt", ".safetensors")  # of files in a directory, which is what is written
_SUFFIXES: Mapping[str, Format] = {".gguf": "gguf"}


def convert(
    source: str | Path,
    target: str | Path,
    format: Format | None = None,
    *,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    kv_heads: int | None = None,
    average: Sequence[str | Path] = (),
    weights: Sequence[float] | None = None,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint in another format, or another form, one tensor at a time.

    Host memory holds 512 MB of tensors, or the largest if that is more. The output appears at `target` when
    it is whole; what an interrupted conversion has left in `<target>.partial` is gone on with.

    Args:
      source: a known name or a path, as `load` takes them; a run with an adapter is that on its base.
      target: where to write; nothing may be there. A file for `gguf`, a directory otherwise.
      format: hf, meta, gguf, llama2c or orbax; by default gguf where `target` ends so, and hf otherwise.
      dtype: of the tensors: float32, bfloat16, float16, or q8_0 (gguf), int8 (llama2c). By default as in
        the source, quantised ones as float32.
      adapter: merge the adapter of this directory into `source` first, in f32; see `load`.
      kv_heads: pool key and value heads to so many (`PooledHeads`).
      average: other checkpoints of the same configuration, to average with this one (`Averaged`).
      weights: of `source` and each of `average`, with a sum of 1; by default all the same.
      vocab_size: add or remove rows at the vocabulary's end (`ResizedVocabulary`). Without a tokenizer for
        them, added ones are called [PADn].
      tokenizer: take the vocabulary from this path instead.
      shards: how many files: Meta's model-parallel parts (default 1); for hf so many at most.
      progress: called with (bytes written, bytes in all, what was written).

    Returns:
      `target`.

    Raises:
      CheckpointError: if a checkpoint cannot be read, something is at `target`, the format cannot hold the
        model, or the disk is full.
      ConfigError: for settings that the model does not allow.
      InputError: for a format or dtype that there is not.
      TokenizerError: for a vocabulary that is missing, cannot be read, or is not of the model's size.
    """
    target = _target(target)
    format = _format(format, target)
    into = None if dtype is None else _merged_dtype(dtype)
    opened = [open_model(source, adapter, into=into, progress=progress)]
    opened += [open_model(path, into=into, progress=progress) for path in average]
    sources, tensors = [each.source for each in opened], opened[0].weights_alone()
    if average:
        share = [1 / len(opened)] * len(opened) if weights is None else list(weights)
        tensors = Averaged(tensors, [each.weights_alone() for each in opened[1:]], share)
    elif weights is not None:
        raise InputError("weights are given but no checkpoints to average; name them with average")
    if kv_heads is not None:
        tensors = PooledHeads(tensors, kv_heads)
    if vocab_size is not None:
        tensors = ResizedVocabulary(tensors, vocab_size)
    for each in sources:
        _refuse_inside(target, each.path)
    vocabulary = _vocabulary(tokenizer, sources[0], progress)
    if vocab_size is not None and tokenizer is None:
        vocabulary = pad(vocabulary, vocab_size)
    plan = _plan(tensors, format, dtype, shards, vocabulary, sources[0].metadata.get("pad_token_id"))
    options = (dtype, kv_heads, weights, vocab_size)
    origin = repr([*map(_identity, sources), options])
    if put_on := [path for each in opened for path in each.adapters]:
        origin += repr([_stats(sorted(adapter_folder(path).glob("*.*"))) for path in put_on])
    write(plan, tensors, target, origin=origin, progress=progress)
    return target


def save(
    model: Model,
    path: str | Path,
    format: Format | None = None,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a model to disk, with its vocabulary.

    Args:
      model: its parameters may lie on one device or on a mesh; they are fetched one tensor at a time.
        Low-rank adapters that are attached to them are merged.
      path: where to write; nothing may be there.
      format: as for `convert`.
      dtype: of the tensors; by default the parameters'.
      shards: as for `convert`.
      progress: called with (bytes written, bytes in all, what was written).

    Returns:
      `path`.

    Raises:
      CheckpointError: if something is at `path`, the format cannot hold the model, or the disk is full.
      InputError: for a format or dtype that there is not, quantised parameters, or an attached adapter that
        is no change of weights.
    """
    target = _target(path)
    format = _format(format, target)
    if isinstance(model.params["embed"]["embedding"], Quantized):
        raise InputError("the parameters are quantised; load the model without bits to save it")
    with model.on_mesh():
        tensors = ParamsTensors(model.config, adapters.merge(model.params))
    write(_plan(tensors, format, dtype, shards, model.tokenizer), tensors, target, progress=progress)
    return target


def _vocabulary(tokenizer: str | Path | None, source: Source, progress: Progress | None) -> Tokenizer:
    if tokenizer is not None:
        return load_tokenizer(resolve(tokenizer, progress))
    try:
        return load_tokenizer(source.home or source.path)
    except MissingTokenizerError as error:
        raise MissingTokenizerError(f"{error}, or name one with tokenizer (--tokenizer)") from None


def _refuse_inside(target: Path, source: Path) -> None:
    """Refuses a target among a checkpoint's own files, whose checksums it would break."""
    parents = target.resolve().parents
    if source.is_dir() and source.resolve() in parents:
        raise CheckpointError(f"{target}: lies inside {source}, which is to be read; write elsewhere")
    for parent in parents:
        if (parent / manifest.NAME).exists():
            raise CheckpointError(f"{target}: lies inside the checkpoint {parent}; write elsewhere")


def _target(path: str | Path) -> Path:
    try:
        target = Path(path).expanduser()
    except RuntimeError as error:  # no such user's home
        raise CheckpointError(f"{path}: {error}; give the whole path") from None
    if target.name in ("", ".."):
        raise CheckpointError(f"{str(path)!r} is no place to write to; give a path with a name of its own")
    return target.absolute()


def _format(format: Format | None, target: Path) -> Format:
    if format is None:
        suffix = target.suffix.lower()
        if suffix in _OTHERS:
            raise InputError(f"{target.name}: no format follows from {suffix}; name it with format (--to)")
        return _SUFFIXES.get(suffix, "hf")
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    return format


def _plan(
    tensors: Tensors,
    format: Format,
    dtype: str | None,
    shards: int | None,
    tokenizer: Tokenizer,
    pad_id: int | None = None,
) -> Plan:
    size = tensors.config.vocab_size
    if tokenizer.vocab_size != size:
        short = f", or call the rest [PADn] with vocab_size={size} (--vocab-size)"
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}; give the one that belongs "
            f"to it with tokenizer (--tokenizer){short if tokenizer.vocab_size < size else ''}"
        )
    known = _DTYPES.get(format, DTYPES)
    if dtype is not None and dtype not in known:
        raise InputError(f"dtype is {dtype!r}; {format} can be written in {', '.join(known)}")
    if shards is not None and (shards < 1 or format not in ("hf", "meta")):
        raise InputError(f"shards is {shards}; it is for hf and meta, and at least 1")
    if tensors.config.labels and format not in ("hf", "orbax"):
        raise InputError(
            f"the model is a classifier or reward model, and {format} cannot hold its head; give hf or orbax"
        )
    if tensors.config.labels and pad_id is None:
        pad_id = classifier_pad(tokenizer)
    vocabulary = vocabulary_of(tokenizer, format, pad_id=pad_id)
    if format == "gguf":
        return plan_gguf(tensors, dtype, vocabulary)
    if format == "llama2c":
        return plan_llama2c(tensors, vocabulary, version=2 if dtype == "int8" else 0)
    floats = None if dtype is None else jnp.dtype(dtype)
    if format == "meta":
        return plan_meta(tensors, floats, vocabulary, shards=shards or 1)
    if format == "orbax":
        return plan_orbax(tensors, floats, vocabulary)
    return plan_hf(tensors, floats, vocabulary, shards=shards)


def _identity(source: Source) -> Any:
    """What tells that a checkpoint is the one an earlier run has read."""
    named = {info.file for info in source.tensors.values()}
    files = sorted(inner for file in named for inner in ([file] if file.is_file() else file.rglob("*")))
    return str(source.path.absolute()), _stats(files), dataclasses.asdict(source.config)


def _stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _merged_dtype(dtype: str) -> np.dtype[Any]:
    """What an adapter is merged into where the output is written in `dtype`: quantised from f32."""
    return np.dtype(jnp.dtype(dtype if dtype in DTYPES else "float32"))
