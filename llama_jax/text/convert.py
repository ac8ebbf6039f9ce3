"""Converts checkpoints between formats and saves models, streaming one tensor at a time."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import adapters, sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.ops.quantization import Quantized
from llama_jax.storage import as_path
from llama_jax.text.model import Model
from llama_jax.text.pretrained import DTYPES, Progress, model_tokenizer, open_model, resolve
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.export import classifier_pad_id, export_vocabulary
from llama_jax.tokenizer.fit import fit_vocabulary
from llama_jax.tokenizer.missing import MissingTokenizer
from llama_jax.tokenizer.pad import pad_vocabulary
from llama_jax.weights import manifest
from llama_jax.weights.adapters import adapter_folder
from llama_jax.weights.derived import Averaged, PooledHeads, ResizedVocabulary
from llama_jax.weights.names import Format, check_format
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import ParamsTensors, Tensors
from llama_jax.weights.write.gguf import plan_gguf
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.llama2c import plan_llama2c
from llama_jax.weights.write.meta import plan_meta
from llama_jax.weights.write.orbax import plan_orbax
from llama_jax.weights.write.plan import Plan
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary

FORMATS: tuple[Format, ...] = get_args(Format)
_DTYPES: Mapping[Format, Sequence[str]] = {"gguf": (*DTYPES, "q8_0"), "llama2c": ("float32", "int8")}
# Suffixes of single weight files; these formats are written as directories.
_AMBIGUOUS_SUFFIXES = (".bin", ".pth", ".pt", ".safetensors")


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
    """Converts a checkpoint to another format, optionally transforming it, one tensor at a time.

    Host memory holds up to 512 MB of tensors, or the largest tensor if that is larger. The output appears at
    `target` only when it is complete; an interrupted conversion is resumed from `<target>.partial`.

    Args:
      source: a known name or a path, as for `load`; for a run that trained an adapter, it is merged into its
        base model.
      target: the path to write, which must not exist: a file for `gguf`, a directory otherwise.
      format: hf, meta, gguf, llama2c or orbax; by default gguf if `target` has that suffix, and hf otherwise.
      dtype: dtype of the tensors: float32, bfloat16, float16, or q8_0 (gguf), int8 (llama2c). By default
        that of the source, float32 for quantized tensors.
      adapter: merge the adapter in this directory into `source` first, in f32; see `load`.
      kv_heads: mean-pool the key and value heads to this number (`PooledHeads`).
      average: other checkpoints of the same configuration, to average with this one (`Averaged`).
      weights: weights of `source` and each of `average`, which sum to 1; by default equal.
      vocab_size: add or remove rows at the end of the vocabulary (`ResizedVocabulary`). Unless `tokenizer`
        has them, added tokens are named [PADn].
      tokenizer: read the tokenizer from this path instead.
      shards: number of files: model-parallel shards for meta (default 1), the maximum for hf.
      progress: called with (bytes written, total bytes, name of what was written).

    Returns:
      `target`.

    Raises:
      CheckpointError: if a checkpoint cannot be read, `target` exists, the format cannot represent the model,
        or the disk is full.
      ConfigError: for settings that do not fit the model.
      InputError: for an unknown format or dtype.
      TokenizerError: for a vocabulary that is missing, unreadable, or of another size than the model's.
    """
    target = _absolute(target)
    format = _infer_format(format, target)
    merged_dtype = None if dtype is None else _merged_dtype(dtype)
    opened = [open_model(source, adapter, merged_dtype=merged_dtype, progress=progress)]
    opened += [open_model(path, merged_dtype=merged_dtype, progress=progress) for path in average]
    sources, tensors = [model.source for model in opened], opened[0].plain_tensors()
    if average:
        coefficients = [1 / len(opened)] * len(opened) if weights is None else list(weights)
        tensors = Averaged(tensors, [model.plain_tensors() for model in opened[1:]], coefficients)
    elif weights is not None:
        raise InputError("weights are given but no checkpoints to average; give those with average")
    if kv_heads is not None:
        tensors = PooledHeads(tensors, kv_heads)
    if vocab_size is not None:
        tensors = ResizedVocabulary(tensors, vocab_size)
    for checkpoint in sources:
        _check_outside(target, checkpoint.path)
    vocabulary = model_tokenizer(opened[0], tokenizer, progress, fit=vocab_size is None)
    if vocab_size is not None and tokenizer is None:
        vocabulary = pad_vocabulary(vocabulary, vocab_size)
    plan = _plan(tensors, format, dtype, shards, vocabulary, sources[0].metadata.get("pad_token_id"))
    options = (dtype, kv_heads, weights, vocab_size)
    origin = repr([*map(_fingerprint, sources), options])
    if adapter_dirs := [path for model in opened for path in model.adapters]:
        origin += repr([_file_stats(sorted(adapter_folder(path).glob("*.*"))) for path in adapter_dirs])
    write(plan, tensors, target, origin=origin, progress=progress)
    return target


@overload
def save(
    model: Model,
    path: str | Path,
    format: Format | None = None,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
) -> Path: ...


@overload
def save(
    config: LlamaConfig,
    params: Mapping[str, Any],
    path: str | Path,
    format: Format | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    dtype: str | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
) -> Path: ...


def save(*arguments: Any, **settings: Any) -> Path:
    """Saves a model: `save(model, path)` with its tokenizer, or `save(config, params, path)`.

    Args:
      model: the model; its parameters may be on one device or sharded over a mesh, and are fetched one tensor
        at a time. Attached LoRA adapters are merged.
      config: the configuration, in place of a model; `tokenizer` is then optional, as for `load_params`.
      params: its parameters, as from `load_params` or `init`: layers stacked or not.
      path: the path to write, which must not exist.
      format: as for `convert`.
      tokenizer: a tokenizer, or the path or known model to read it from. Without one, the result has none:
        its arrays load, and its text methods say what is missing.
      dtype: dtype of the tensors; by default that of the parameters.
      shards: as for `convert`.
      progress: called with (bytes written, total bytes, name of what was written).

    Returns:
      `path`.

    Raises:
      CheckpointError: if `path` exists, the format cannot represent the model, or the disk is full.
      ConfigError: if the parameters are not those of the configuration.
      InputError: for an unknown format or dtype, quantized parameters, or an attached adapter that cannot be
        merged.
      TokenizerError: for a vocabulary that is unreadable, or of another size than the model's.
    """
    is_model = isinstance(next(iter(arguments), None), Model) or "model" in settings
    return _save_model(*arguments, **settings) if is_model else _save_params(*arguments, **settings)


def _save_model(model: Model, path: str | Path, format: Format | None = None, **settings: Any) -> Path:
    with model.on_mesh():
        return _save_params(model.config, model.params, path, format, tokenizer=model.tokenizer, **settings)


def _save_params(
    config: LlamaConfig,
    params: Any,
    path: str | Path,
    format: Format | None = None,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    dtype: str | None = None,
    shards: int | None = None,
    progress: Progress | None = None,
) -> Path:
    target = _absolute(path)
    format = _infer_format(format, target)
    if any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(params, is_leaf=_is_quantized)):
        raise InputError("the parameters are quantized; load the model without bits to save it")
    with sharding.use_mesh(sharding.mesh_of(params)):
        tensors = ParamsTensors(config, adapters.merge(params))
    tensors.check()
    size = config.vocab_size
    if tokenizer is None:
        vocabulary: Tokenizer = MissingTokenizer(size, f"{target} was saved without a tokenizer")
    elif isinstance(tokenizer, (str, Path)):
        vocabulary = fit_vocabulary(load_tokenizer(resolve(tokenizer, progress)), size)
    else:
        vocabulary = tokenizer
    plan = _plan(tensors, format, dtype, shards, vocabulary, warn=tokenizer is not None)
    write(plan, tensors, target, progress=progress)
    return target


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def _check_outside(target: Path, source: Path) -> None:
    """Rejects a target inside a checkpoint directory, where it would break the checksums."""
    parents = target.resolve().parents
    if source.is_dir() and source.resolve() in parents:
        raise CheckpointError(f"{target}: is inside the source {source}; write elsewhere")
    for parent in parents:
        if (parent / manifest.NAME).exists():
            raise CheckpointError(f"{target}: is inside the checkpoint {parent}; write elsewhere")


def _absolute(path: str | Path) -> Path:
    try:
        target = as_path(path).expanduser()
    except RuntimeError as error:  # an unknown user's home
        raise CheckpointError(f"{path}: {error}; give an absolute path") from None
    if target.name in ("", ".."):
        raise CheckpointError(f"{str(path)!r} cannot be written to; give the path of a new file or directory")
    return target.absolute()


def _infer_format(format: Format | None, target: Path) -> Format:
    if format is None:
        suffix = target.suffix.lower()
        if suffix in _AMBIGUOUS_SUFFIXES:
            raise InputError(f"{target.name}: {suffix} does not tell the format; give it with format (--to)")
        return "gguf" if suffix == ".gguf" else "hf"
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
    *,
    warn: bool = True,
) -> Plan:
    size = tensors.config.vocab_size
    if isinstance(tokenizer, MissingTokenizer) and warn:
        warnings.warn(f"{tokenizer.problem}, or give it with tokenizer (--tokenizer)", stacklevel=3)
    if tokenizer.vocab_size != size:
        pad_hint = f", or pad it with [PADn] by vocab_size={size} (--vocab-size)"
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {size}; give the model's own "
            f"with tokenizer (--tokenizer){pad_hint if tokenizer.vocab_size < size else ''}"
        )
    supported = _DTYPES.get(format, DTYPES)
    if dtype is not None and dtype not in supported:
        raise InputError(f"dtype is {dtype!r}; {format} supports {', '.join(supported)}")
    if shards is not None and (shards < 1 or format not in ("hf", "meta")):
        raise InputError(f"shards is {shards}; it must be at least 1, and is only for hf and meta")
    if tensors.config.labels and format not in ("hf", "orbax"):
        raise InputError(
            f"the model is a classifier or reward model, and {format} has no place for its head; "
            "use hf or orbax"
        )
    check_format(tensors.config, format)
    if tensors.config.labels and pad_id is None:
        pad_id = classifier_pad_id(tokenizer)
    missing = isinstance(tokenizer, MissingTokenizer)
    vocabulary = Vocabulary() if missing else export_vocabulary(tokenizer, format, pad_id=pad_id)
    if format == "gguf":
        return plan_gguf(tensors, dtype, vocabulary)
    if format == "llama2c":
        return plan_llama2c(tensors, vocabulary, version=2 if dtype == "int8" else 0)
    float_dtype = None if dtype is None else jnp.dtype(dtype)
    if format == "meta":
        return plan_meta(tensors, float_dtype, vocabulary, shards=shards or 1)
    if format == "orbax":
        return plan_orbax(tensors, float_dtype, vocabulary)
    return plan_hf(tensors, float_dtype, vocabulary, shards=shards)


def _fingerprint(source: Source) -> Any:
    """Identifies a checkpoint, so that a conversion is resumed only if its source has not changed."""
    paths = {info.file for info in source.tensors.values()}
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return str(source.path.absolute()), _file_stats(files), dataclasses.asdict(source.config)


def _file_stats(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _merged_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype an adapter is merged in if the output has `dtype`: f32 for quantized outputs."""
    return np.dtype(jnp.dtype(dtype if dtype in DTYPES else "float32"))
