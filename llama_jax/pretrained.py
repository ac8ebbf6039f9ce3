"""Models by path or by name: `load` finds the format, reads the weights and the vocabulary."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax import hub, known
from llama_jax.adapters import attach
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.quantization import Bits, quantize
from llama_jax.text_model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import load_params, open_source
from llama_jax.weights.adapters import base_of_run, is_mergeable, load_adapter, merged
from llama_jax.weights.load import load_tensors
from llama_jax.weights.tensors import StoredTensors

DTYPES = ("float32", "bfloat16", "float16")
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being read


def load(
    name_or_path: str | Path,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Path | None = None,
    bits: Bits | None = None,
    stacked: bool = True,
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
      stacked: hold each layer leaf as one [L, ...] array, as `init` does. Otherwise `params["layers"]` is a
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
    path = resolve(name_or_path, progress)
    if adapter is None and (base := base_of_run(path)) is not None:
        path, adapter = resolve(base, progress), path
    source = open_source(path)
    tokenizer = load_tokenizer(source.home or path)
    if tokenizer.vocab_size != source.config.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {source.config.vocab_size}; "
            "put the tokenizer that the model was trained with beside it"
        )
    beside = None
    if adapter is not None and not is_mergeable(adapter):
        beside, adapter = load_adapter(adapter), None
    if adapter is None:
        params = load_params(source, dtype=jnp.dtype(dtype), mesh=mesh, stacked=stacked, progress=progress)
    else:
        tensors = merged(StoredTensors(source), adapter, into=np.dtype(np.float32))
        params = load_tensors(tensors, dtype=dtype, mesh=mesh, stacked=stacked, progress=progress)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if bits is not None:
            params = quantize(params, bits)
        if beside is not None:
            params = attach(beside[0], params, beside[1])
    return Model(source.config, params, tokenizer, path, mesh)


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
    if hub.is_repository(name):
        return hub.fetch(name)
    if len(name) > 200:
        name = name[:197] + "..."
    if close := difflib.get_close_matches(name, known.KNOWN, n=1):
        raise CheckpointError(f"{name!r} is neither a file nor a known model; did you mean {close[0]}?")
    raise CheckpointError(
        f"{name!r} is neither a file nor a known model; give a path, or one of: {', '.join(known.KNOWN)}"
    )
