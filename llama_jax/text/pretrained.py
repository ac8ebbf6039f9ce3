"""Models by path or by name: `load` finds the format, reads the weights and the vocabulary."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax import sharding
from llama_jax.adapters import Settings, attach
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.hub import huggingface, known
from llama_jax.ops.quantization import Bits, quantize
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import load_params, open_source
from llama_jax.weights.adapters import base_of_run, put_on
from llama_jax.weights.load import load_tensors
from llama_jax.weights.source import Source
from llama_jax.weights.tensors import StoredTensors, Tensors

DTYPES = ("float32", "bfloat16", "float16")
_F32: np.dtype[Any] = np.dtype(np.float32)
_MOST_ADAPTERS = 16
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being read


def load(
    name_or_path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Path | None = None,
    bits: Bits | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Loads a model: weights, configuration and vocabulary.

    Args:
      name_or_path: a known name (`llama_jax.known.KNOWN`), fetched on first use; a path: a GGUF file, a
        Hugging Face or Meta directory, a training run's directory or one of its checkpoints, or a llama2.c
        `.bin` with its tokenizer beside it; or, with the `hub` extra, OWNER/NAME[@REVISION][:FILE.gguf] on
        the Hugging Face hub.
      dtype: the type to hold the weights in and to compute in: float32, bfloat16 or float16.
      mesh: lay the parameters out over these devices (`llama_jax.sharding.make_mesh`).
      adapter: the directory of an adapter, or of the training run that made one. LoRA, rsLoRA and DoRA in
        PEFT's format are merged into the weights, in f32, as they are read; a prefix in PEFT's format, or a
        bottleneck in AdapterHub's, is attached beside them. Such a run as `name_or_path` is its adapter on
        the base that it was trained on.
      bits: hold the matrices in 8 or 4 bits or in NF4 instead, see `quantize`; the original parameters are
        let go.
      scan_layers: hold each layer leaf as one [L, ...] array, as `init` does. Otherwise `params["layers"]` is a
        tuple with one tree a layer, which every function here takes as well, and which generation reads
        where it lies: with stacked leaves each call of `generate` makes a second copy of the weights.
      progress: called with (bytes done, bytes in all, what is being read) as data arrives.

    Returns:
      The model.

    Raises:
      CheckpointError: for a name that is not known, a path that is not there, weights that do not fit, or an
        adapter that cannot be read.
      ConfigError: for an adapter of another model.
      TokenizerError: for a vocabulary that is missing, unreadable, or of another size than the model's.
      InputError: for another dtype or number of bits.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if bits not in (None, *get_args(Bits)):
        raise InputError(f"bits is {bits!r}; it must be 8 or 4, 'nf4', or None for {dtype}")
    opened = open_model(name_or_path, adapter, progress=progress)
    path, config = opened.source.path, opened.config
    tokenizer = load_tokenizer(opened.source.home or path)
    if tokenizer.vocab_size != config.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "put the tokenizer that the model was trained with beside it"
        )
    params = opened.params(dtype=dtype, bits=bits, mesh=mesh, scan_layers=scan_layers, progress=progress)
    return Model(config, params, tokenizer, path, mesh)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that has been found, and none of its weights read.

    Attributes:
      source: its checkpoint.
      adapters: the directories of the adapters that are put on it, in their order.
      tensors: its tensors, low-rank adapters merged.
      beside: settings and tree of an adapter that is no change of weights, the last one put on; or None.
    """

    source: Source
    adapters: tuple[Path, ...]
    tensors: Tensors
    beside: tuple[Settings, Any] | None = None

    @property
    def config(self) -> LlamaConfig:
        return self.tensors.config

    def weights_alone(self) -> Tensors:
        """Its tensors, where they are all of it.

        Raises:
          InputError: if there is an adapter beside them.
        """
        if self.beside is not None:
            kind = type(self.beside[0]).__name__.lower()
            raise InputError(
                f"{self.adapters[-1]}: a {kind} cannot be merged into weights; give it to generate or chat, "
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
        how: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "scan_layers": scan_layers, "progress": progress}
        read = load_tensors(self.tensors, **how) if self.adapters else load_params(self.source, **how)
        with sharding.use_mesh(mesh):
            if bits is not None:
                read = quantize(read, bits)
            return read if self.beside is None else attach(self.beside[0], read, self.beside[1])


def open_model(
    name_or_path: str | Path,
    adapter: str | Path | None = None,
    *,
    into: np.dtype[Any] | None = _F32,
    progress: Progress | None = None,
) -> Opened:
    """Finds a model as `load` does, with all its adapters: a run may have trained one on another run's.

    Args:
      name_or_path, adapter, progress: as for `load`.
      into: what matrices are merged into, see `Merged`.

    Raises:
      CheckpointError, ConfigError: as `load`.
    """
    path, adapters = resolve(name_or_path, progress), [] if adapter is None else [Path(adapter)]
    while (base := base_of_run(path)) is not None:
        adapters.insert(0, path)
        if len(adapters) > _MOST_ADAPTERS:
            raise CheckpointError(
                f"{path}: more than {_MOST_ADAPTERS} adapters on one another, if they end at all; convert "
                "one of them to a model of its own first"
            )
        path = resolve(base, progress)
    source = open_source(path)
    _refuse_unfinished(path, source)
    opened = Opened(source, (), StoredTensors(source))
    for each in adapters:
        tensors, beside = put_on(opened.weights_alone(), each, into=into)
        opened = Opened(source, (*opened.adapters, each), tensors, beside)
    return opened


def _refuse_unfinished(path: Path, source: Source) -> None:
    """Refuses a run whose checkpoints hold an adapter that it has not written out yet."""
    if "step" in source.metadata and "embed.embedding" not in source.tensors:
        raise CheckpointError(
            f"{path}: a run that trains an adapter and is not done; finish it, and give the run's directory"
        )


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """Returns the path of a checkpoint, fetching a known model that is not here yet.

    Raises:
      CheckpointError: for a name that is not known or a path that is not there, suggesting the closest name.
    """
    name = str(name_or_path)
    if name in known.KNOWN:
        return known.fetch(name, progress=progress)
    try:
        path = Path(name_or_path).expanduser()
        if name and path.exists():  # Path("") would be the current folder
            return path
    except PermissionError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}; check its permissions") from None
    except (OSError, RuntimeError):  # no such user's home, a name too long, ...
        pass
    if huggingface.is_repository(name):
        return huggingface.fetch(name)
    if len(name) > 200:
        name = name[:197] + "..."
    if close := difflib.get_close_matches(name, known.KNOWN, n=1):
        raise CheckpointError(f"{name!r} is neither a file nor a known model; did you mean {close[0]}?")
    raise CheckpointError(
        f"{name!r} is neither a file nor a known model; give a path, or one of: {', '.join(known.KNOWN)}"
    )
