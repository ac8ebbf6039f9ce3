"""A run's initial model: its configuration, with the objective's head, and pretrained weights."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.errors import ConfigError
from llama_jax.text.pretrained import open_model
from llama_jax.tokenizer import Tokenizer
from llama_jax.weights.adapters import adapter_folder
from llama_jax.weights.derived import ResizedVocabulary
from llama_jax.weights.load import load_tensors
from llama_jax.weights.run_adapters import is_step
from llama_jax.weights.source import format_list
from llama_jax.weights.tensors import Tensors

from .config.run import RunConfig
from .data.files import File, sampled_digest
from .trainable import VALUE, TrainableSpec, with_labels
from .value_model import load_value


def model_config(run: RunConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The configuration of the model to train, with the labels of its head if the objective has one.

    Raises:
      ConfigError: for an invalid architecture, or a pretrained head that does not fit the objective.
      CheckpointError: if `model.init_from` cannot be read.
    """
    if not run.model.init_from:
        return with_labels(run, run.model.build(tokenizer.vocab_size))
    pretrained = _open_base(run).config
    model = with_labels(run, run.model.extended(pretrained))
    if pretrained.labels:
        _check_head(run, pretrained.labels, model.labels)
    return model


def check_context(run: RunConfig, model: LlamaConfig) -> None:
    """Checks that a model's context holds the sequences that a new run trains it on.

    Raises:
      ConfigError: with the settings that extend it.
    """
    length, context, scaling = run.train.seq_len, model.max_position_embeddings, model.rope_scaling
    if length <= context:
        return
    if scaling is not None:
        original = scaling.original_max_position_embeddings or round(context / scaling.factor)
        factor = math.ceil(length / original)
        fix = f"--model.rope_scaling.factor {factor}"
        if run.model.max_position_embeddings or not scaling.original_max_position_embeddings:
            fix += f" --model.max_position_embeddings {factor * original}"
    elif run.model.init_from and not run.model.max_position_embeddings:
        factor = math.ceil(length / context)
        fix = f"--model.rope_scaling.rope_type yarn --model.rope_scaling.factor {factor}"
    else:
        fix = f"--model.max_position_embeddings {length}"
    raise ConfigError(
        f"train.seq_len is {length} and the model's context (max_position_embeddings) {context}: extend it "
        f"with {fix}, or set train.seq_len to at most {context}"
    )


def load_pretrained(run: RunConfig, mesh: Mesh | None, trainable_spec: TrainableSpec) -> Any:
    """Loads the weights of `model.init_from`, with its adapters merged; None if weights start random."""
    if not run.model.init_from:
        return None
    with terminal.progress_bar("loading weights") as progress:
        dtype = _loading_dtype(trainable_spec)
        options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "scan_layers": True, "progress": progress}
        if run.model.vocab_size:
            return load_tensors(_open_base(run), **options)
        return open_model(run.model.init_from).params(**options)


def load_initial_params(run: RunConfig, mesh: Mesh | None, trainable_spec: TrainableSpec) -> Any:
    """`load_pretrained`, with the weights of a value model as `value`."""
    params = load_pretrained(run, mesh, trainable_spec)
    if trainable_spec.value_model is None:
        return params
    return {**(params or {}), VALUE: load_value(run, mesh, _loading_dtype(trainable_spec))}


def _loading_dtype(trainable_spec: TrainableSpec) -> jnp.dtype:
    """The dtype to load weights in: frozen ones in no higher precision than they are stored in."""
    is_f32 = trainable_spec.adapter is None or trainable_spec.base == "float32"
    return jnp.dtype(jnp.float32 if is_f32 else jnp.bfloat16)


def load_reference(run: RunConfig, model: LlamaConfig, mesh: Mesh | None) -> Any:
    """Loads the weights of `rl.reference`, f32.

    Raises:
      ConfigError: if it has another vocabulary or architecture than the trained model.
    """
    opened = open_model(run.rl.reference)
    theirs, name = opened.config, f"rl.reference {run.rl.reference!r}"
    if theirs.vocab_size != model.vocab_size:
        raise ConfigError(
            f"{name} has a vocabulary of {theirs.vocab_size} and the trained model of {model.vocab_size}, so "
            "its probabilities are of other tokens; give a model with the same tokenizer"
        )
    if theirs.replace(labels=()) != model.replace(labels=()):
        raise ConfigError(f"{name} has another architecture than the trained model; give one with the same")
    with terminal.progress_bar("loading the reference model") as progress:
        return opened.params(dtype=jnp.float32, mesh=mesh, scan_layers=True, progress=progress)


def _open_base(run: RunConfig) -> Tensors:
    """The tensors of `model.init_from`, with rows added to its vocabulary up to `model.vocab_size`."""
    tensors = open_model(run.model.init_from).plain_tensors()
    if not run.model.vocab_size:
        return tensors
    if run.model.vocab_size < tensors.config.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size} and model.init_from {run.model.init_from!r} has a "
            f"vocabulary of {tensors.config.vocab_size}: leave it out, or give at least that"
        )
    return ResizedVocabulary(tensors, run.model.vocab_size)


def weights_fingerprint(name_or_path: str) -> str:
    """A hash of the weights of a model, from samples of its files, wherever they are."""
    digest = hashlib.blake2b(digest_size=16)
    opened = open_model(name_or_path)
    paths = {info.file for info in opened.source.tensors.values()}
    for adapter in map(adapter_folder, opened.adapters):
        paths |= {adapter} if is_step(adapter) else {*adapter.glob("*.safetensors"), *adapter.glob("*.bin")}
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    for file in files:
        if file.is_file():
            info = file.stat()
            digest.update(sampled_digest(File(str(file), file.name, info.st_size, info.st_mtime_ns)))
    return digest.hexdigest()


def _check_head(run: RunConfig, pretrained: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Checks that the labels of a pretrained head are those that the objective trains."""
    source = f"model.init_from {run.model.init_from!r}"
    if not labels:
        raise ConfigError(
            f'{source} is a classifier or reward model, and train.objective "{run.train.objective}" needs a '
            "language model; give the language model that it was finetuned from"
        )
    if len(pretrained) != len(labels):
        needed = f"has {len(labels)} data.labels" if run.train.objective == "classify" else "needs one"
        raise ConfigError(
            f"{source} has a head with {len(pretrained)} outputs ({format_list(pretrained, 6)}), and "
            f'train.objective "{run.train.objective}" {needed}; change data.labels, or '
            "start from a language model"
        )
    if set(pretrained) == set(labels) and pretrained != labels:
        raise ConfigError(
            f"data.labels are {format_list(labels, 6)}, and the head of {source} has them in the order "
            f"{format_list(pretrained, 6)}; list them in that order"
        )
