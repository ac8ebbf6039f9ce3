"""The teacher of a distillation: a model of any architecture, frozen beside the one that is trained."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from llama_jax import LlamaConfig, init
from llama_jax.console import terminal
from llama_jax.errors import ConfigError
from llama_jax.text.pretrained import model_tokenizer, open_model
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer.missing import MissingTokenizer

from .config.run import RunConfig
from .devices import compute_dtype
from .network import Network


def teacher_config(run: RunConfig) -> LlamaConfig | None:
    """The configuration of `distillation.teacher`; None for another objective.

    Raises:
      CheckpointError: if it cannot be read.
    """
    if run.train.objective != "distill":
        return None
    return open_model(run.distillation.teacher).plain_tensors().config


def random_teacher(run: RunConfig, config: LlamaConfig, platform: str) -> Network:
    """A teacher with random parameters, for its shapes, dtypes and shardings."""
    dtype = compute_dtype(run.train, platform)
    params = jax.tree.map(lambda x: x.astype(dtype), init(config, jax.random.key(0)))
    return Network(params, config)


def load_teacher(run: RunConfig, mesh: Mesh | None, platform: str) -> Network:
    """Loads the teacher, adapters merged, with the shapes, dtypes and shardings of `random_teacher`.

    Raises:
      CheckpointError: if it cannot be read.
    """
    opened = open_model(run.distillation.teacher)
    with terminal.progress_bar("loading the teacher") as progress:
        dtype = compute_dtype(run.train, platform)
        params = opened.params(dtype=dtype, mesh=mesh, scan_layers=True, progress=progress)
    return Network(params, opened.config)


def check_teacher(run: RunConfig, teacher: LlamaConfig, model: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Checks that a teacher has the vocabulary of the model, and reads its rows.

    Raises:
      ConfigError: naming what differs.
    """
    name = f"distillation.teacher {run.distillation.teacher!r}"
    if teacher.labels:
        raise ConfigError(
            f"{name} is a classifier or reward model, which predicts no tokens; give a language model"
        )
    own = model_tokenizer(open_model(run.distillation.teacher), fit=False)
    if not isinstance(own, MissingTokenizer):
        for token in range(min(own.vocab_size, tokenizer.vocab_size)):
            if own.piece(token) != tokenizer.piece(token):
                raise ConfigError(
                    f"{name} has another vocabulary than the model: its token {token} is "
                    f"{own.piece(token)!r}, not {tokenizer.piece(token)!r}; set tokenizer.path to its "
                    "tokenizer, or give a teacher that has the model's"
                )
    if teacher.vocab_size != model.vocab_size:
        hint = f", or set model.vocab_size to {teacher.vocab_size}" * (teacher.vocab_size > model.vocab_size)
        raise ConfigError(
            f"{name} has a vocabulary of {teacher.vocab_size} and the model of {model.vocab_size}: give one "
            f"with the same{hint}"
        )
    if run.distillation.top_k > model.vocab_size:
        raise ConfigError(
            f"distillation.top_k is {run.distillation.top_k}, and the vocabulary has {model.vocab_size} "
            "tokens: set it to at most that, or to 0 for all"
        )
    if run.train.seq_len > teacher.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len is {run.train.seq_len}, and the context of {name} "
            f"{teacher.max_position_embeddings}: set train.seq_len to at most that"
        )
