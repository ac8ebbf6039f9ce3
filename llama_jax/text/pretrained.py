"""Loads models by path or by known name, in any supported checkpoint format."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import sharding, weights
from llama_jax.adapters import Settings, attach
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, InputError, MissingTokenizerError
from llama_jax.hub import huggingface, known
from llama_jax.ops.quantization import Bits, quantize
from llama_jax.storage import as_path, is_address
from llama_jax.text.model import Model
from llama_jax.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from llama_jax.tokenizer.fit import fit_vocabulary
from llama_jax.tokenizer.missing import MissingTokenizer
from llama_jax.weights import open_source
from llama_jax.weights.adapters import adapter_folder, apply_adapter, base_of_adapter
from llama_jax.weights.load import load_tensors
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import StoredTensors, Tensors

DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int, str], None]  # bytes done, total bytes, name of what is being read
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_MAX_ADAPTERS = 16


def load(
    name_or_path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    bits: Bits | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Loads a model: configuration, parameters and tokenizer.

    Args:
      name_or_path: a known name (`llama_jax.hub.known.KNOWN`), fetched on first use; a path: a GGUF file, a
        Hugging Face or Meta directory, a training run's directory or one of its checkpoints, or a llama2.c
        `.bin` with its tokenizer beside it; or, with the `hub` extra, OWNER/NAME[@REVISION][:FILE.gguf] on
        the Hugging Face Hub.
      dtype: dtype of the parameters and of the computation: float32, bfloat16 or float16.
      mesh: shard the parameters over this mesh (`llama_jax.meshes.make_mesh`).
      adapter: the directory of an adapter, of the training run that trains one, or of one of its steps; or
        OWNER/NAME[@REVISION] on the Hub. LoRA, rsLoRA and DoRA in PEFT's format are merged into the weights,
        in f32, as these are read; a prefix in PEFT's format, or a bottleneck adapter in AdapterHub's, is
        attached. If `name_or_path` is itself one of these, the model is that adapter on the base model that
        it names.
      tokenizer: read the tokenizer from this path, or from this known model, instead. By default it is that
        of the adapter, if its directory has one, or else the model's own.
      bits: quantize the matrices to 8 or 4 bits or NF4, see `quantize`; the original parameters are freed.
      scan_layers: store each layer parameter as one stacked [L, ...] array, as `init` does. If False,
        `params["layers"]` is a tuple with one tree per layer. Every function takes both forms, but with
        stacked layers each call of `generate` makes a second copy of the weights.
      progress: called with (bytes done, total bytes, name of what is being read).

    Returns:
      The model. Without a tokenizer beside the weights its arrays work, and its text methods raise an error.

    Raises:
      CheckpointError: for an unknown name, a path that does not exist, weights that do not match the
        configuration, or an adapter that cannot be read.
      ConfigError: for an adapter of another model.
      TokenizerError: for a vocabulary that is unreadable, or larger than the model's.
      InputError: for an unsupported dtype or number of bits.
    """
    _check_precision(dtype, bits)
    opened = open_model(name_or_path, adapter, progress=progress)
    path, config = opened.source.path, opened.config
    found = model_tokenizer(opened, tokenizer, progress)
    params = opened.params(dtype=dtype, bits=bits, mesh=mesh, scan_layers=scan_layers, progress=progress)
    return Model(config, params, found, path, mesh)


def model_tokenizer(
    opened: OpenedModel, path: str | Path | None = None, progress: Progress | None = None, *, fit: bool = True
) -> Tokenizer:
    """Loads the tokenizer of a model; a `MissingTokenizer` if it has none.

    Args:
      opened: the model.
      path: as `tokenizer` of `load`.
      progress: as for `load`.
      fit: fit it to the model's embedding (`fit_vocabulary`).

    Raises:
      TokenizerError: as `load`.
    """
    size, source = opened.config.vocab_size, opened.source
    folders = [
        folder for adapter in reversed(opened.adapters) if has_tokenizer(folder := adapter_folder(adapter))
    ]
    own = [*folders, source.tokenizer_dir or source.path][0]
    try:
        found = load_tokenizer(own if path is None else resolve(path, progress))
    except MissingTokenizerError as error:
        if path is not None or not fit:
            raise
        return MissingTokenizer(size, str(error))
    return fit_vocabulary(found, size) if fit else found


def load_params(
    name_or_path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Path | None = None,
    bits: Bits | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a model's configuration and parameters, without a tokenizer.

    Args:
      name_or_path, dtype, mesh, adapter, bits, scan_layers, progress: as for `load`.

    Returns:
      The configuration and the parameter tree.

    Raises:
      CheckpointError, ConfigError, InputError: as `load`.
    """
    _check_precision(dtype, bits)
    opened = open_model(name_or_path, adapter, progress=progress)
    params = opened.params(dtype=dtype, bits=bits, mesh=mesh, scan_layers=scan_layers, progress=progress)
    return opened.config, params


def _check_precision(dtype: str, bits: Bits | None) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if bits not in (None, *get_args(Bits)):
        raise InputError(f"bits is {bits!r}; it must be 8 or 4, 'nf4', or None for {dtype}")


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose checkpoint and adapters have been found, but whose weights have not been read.

    Attributes:
      source: the base checkpoint.
      adapters: the directories of the adapters applied to it, in order.
      tensors: the tensors, LoRA adapters merged.
      attached: settings and tree of the last adapter if it cannot be merged into weights; or None.
    """

    source: Source
    adapters: tuple[Path, ...]
    tensors: Tensors
    attached: tuple[Settings, Any] | None = None

    @property
    def config(self) -> LlamaConfig:
        return self.tensors.config

    def plain_tensors(self) -> Tensors:
        """The tensors of a model that is fully described by them.

        Raises:
          InputError: if an adapter is attached.
        """
        if self.attached is not None:
            kind = type(self.attached[0]).__name__.lower()
            raise InputError(
                f"{self.adapters[-1]}: a {kind} cannot be merged into weights; use it with generate or chat, "
                "or train LoRA instead"
            )
        return self.tensors

    def params(
        self,
        *,
        dtype: jax.typing.DTypeLike,
        bits: Bits | None = None,
        mesh: Mesh | None = None,
        scan_layers: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Reads the parameters, as `load` does."""
        options: dict[str, Any] = {
            "dtype": dtype,
            "mesh": mesh,
            "scan_layers": scan_layers,
            "progress": progress,
        }
        if self.adapters:
            params = load_tensors(self.tensors, **options)
        else:
            params = weights.load_params(self.source, **options)
        with sharding.use_mesh(mesh):
            if bits is not None:
                params = quantize(params, bits)
            if self.attached is None:
                return params
            settings, adapter = self.attached
            return attach(settings, params, adapter)


def open_model(
    name_or_path: str | Path,
    adapter: str | Path | None = None,
    *,
    merged_dtype: np.dtype[Any] | None = _FLOAT32,
    progress: Progress | None = None,
) -> OpenedModel:
    """Finds a model as `load` does, with its chain of adapters: a run may train one on top of another run's.

    Args:
      name_or_path, adapter, progress: as for `load`.
      merged_dtype: dtype of the merged matrices, see `Merged`.

    Raises:
      CheckpointError, ConfigError: as `load`.
    """
    path, adapters = resolve(name_or_path, progress), [] if adapter is None else [_find_adapter(adapter)]
    while (base := base_of_adapter(path)) is not None:
        adapters.insert(0, path)
        if base == path:
            break
        if len(adapters) > _MAX_ADAPTERS:
            raise CheckpointError(
                f"{path}: a chain of more than {_MAX_ADAPTERS} adapters, or a cycle; merge part of it into a "
                "model with convert"
            )
        try:
            path = resolve(base, progress)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; it is the base model that the adapter {path} names: if it is elsewhere, load it "
                "with the adapter beside it (adapter=, --adapter)"
            ) from None
    source = open_source(path)
    _check_described(path, source)
    opened = OpenedModel(source, (), StoredTensors(source))
    for adapter_dir in adapters:
        tensors, attached = apply_adapter(opened.plain_tensors(), adapter_dir, merged_dtype=merged_dtype)
        opened = OpenedModel(source, (*opened.adapters, adapter_dir), tensors, attached)
    return opened


def _find_adapter(name_or_path: str | Path) -> Path:
    """Returns the local path of an adapter, downloading one that is OWNER/NAME[@REVISION] on the Hub."""
    path = as_path(name_or_path)
    with contextlib.suppress(OSError, RuntimeError):  # a name too long, an unknown user's home
        if not path.expanduser().exists() and huggingface.is_repository(str(name_or_path)):
            return huggingface.fetch(str(name_or_path))
    return path


def _check_described(path: Path, source: Source) -> None:
    """Rejects checkpoints that contain an adapter without its settings, as they once did."""
    if "step" in source.metadata and "embed.embedding" not in source.tensors:
        raise CheckpointError(
            f"{path}: holds an adapter whose settings and base model are not recorded; resume the run, which "
            "writes them, or give its base model, with --adapter RUN/adapter"
        )


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """Returns the local path of a checkpoint, downloading a known model or Hub repository if needed.

    Raises:
      CheckpointError: for an unknown name or a path that does not exist, suggesting the closest known name.
    """
    name = str(name_or_path)
    if name in known.KNOWN:
        return known.fetch(name, progress=progress)
    try:
        path = as_path(name_or_path).expanduser()
        if name and path.exists():  # Path("") is the current directory
            return path
    except PermissionError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}; check its permissions") from None
    except (OSError, RuntimeError):  # an unknown user's home, a name too long, ...
        pass
    if is_address(name):
        raise CheckpointError(f"{name}: there is no such object or folder; check the address")
    if huggingface.is_repository(name):
        return huggingface.fetch(name)
    if len(name) > 200:
        name = name[:197] + "..."
    if close := difflib.get_close_matches(name, known.KNOWN, n=1):
        raise CheckpointError(f"{name!r} is neither a path nor a known model; did you mean {close[0]}?")
    raise CheckpointError(
        f"{name!r} is neither a path nor a known model; give a path, or one of: {', '.join(known.KNOWN)}"
    )
