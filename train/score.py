"""The numbers that a head gives: rewards of answers, classes and values of texts, from a finished run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.chat import chat_template
from llama_jax.errors import InputError, TokenizerError
from llama_jax.model import hidden_states
from llama_jax.weights import open_source
from train.data.encode import Encoder
from train.data.examples import ExampleEncoder, Segment
from train.data.forms import Example, Objective, Plain, Turns
from train.data.records import BadRecord
from train.finetune_config import HEADS
from train.read_config import load_config

_ROUND = 64  # rows are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A run of `train.objective` reward, classify or regress, ready to be asked.

    Attributes:
      model: its model, with its adapter.
      kernel: f32 [D, C], the head.
      objective: of the run.
      labels: the classes' names, where there are any.
      encode: from an example to ids, as in training.
    """

    model: lj.Model
    kernel: jax.Array
    objective: Objective
    labels: tuple[str, ...]
    encode: ExampleEncoder

    @staticmethod
    def load(run_dir: str | Path, dtype: str = "float32") -> Scorer:
        """Loads a run.

        Raises:
          InputError: if it is no run with a head.
          LlamaJaxError: if it cannot be read.
        """
        folder = Path(run_dir).expanduser()
        if not (folder / "config.toml").is_file():
            raise InputError(
                f"{folder}: is no training run (it holds no config.toml); give a run's directory"
            )
        run = load_config(folder / "config.toml")
        if run.train.objective not in HEADS:
            raise InputError(
                f'{folder}: its train.objective is "{run.train.objective}", which has no head; give a run of '
                f"{', '.join(HEADS)}"
            )
        model = lj.load(folder, dtype=dtype)
        kernel = jnp.asarray(open_source(folder).read("score.kernel"), jnp.float32)
        try:
            template = chat_template(model.tokenizer, run.data.template or None)
        except TokenizerError:
            template = None
        longest = min(run.train.seq_len, model.config.max_position_embeddings)
        encode = ExampleEncoder(Encoder(model.tokenizer), template, run.train.objective, longest, "fail")
        return Scorer(model, kernel, run.train.objective, run.data.labels, encode)

    def scores(self, asked: Sequence[Any], batch_size: int = 16) -> np.ndarray:
        """Returns f32 [n, C], the head's numbers for each text or conversation.

        Args:
          asked: each a text, or a list of messages; of a reward model, that ends with the answer, or (prompt,
            answer) in plain text.
          batch_size: rows that are run together.

        Raises:
          InputError: for one that cannot be encoded, naming it.
        """
        segments = [self._segment(i, one) for i, one in enumerate(asked)]
        found = []
        for start in range(0, len(segments), batch_size):
            part = segments[start : start + batch_size]
            width = -(-max(map(len, part)) // _ROUND) * _ROUND
            tokens = np.zeros((batch_size, width), np.int32)
            for row, segment in zip(tokens, part, strict=False):
                row[: len(segment)] = segment.ids
            ends = np.array([len(segment) - 1 for segment in part] + [0] * (batch_size - len(part)))
            numbers = _at_ends(self.model.config, self.model.params, self.kernel, tokens, ends)
            found.append(np.asarray(numbers)[: len(part)])
        return np.concatenate(found) if found else np.zeros((0, self.kernel.shape[1]), np.float32)

    def classes(self, asked: Sequence[Any], batch_size: int = 16) -> list[str]:
        """Returns the name of the likeliest class of each text or conversation."""
        return [self.labels[i] for i in self.scores(asked, batch_size).argmax(-1)]

    def _segment(self, number: int, one: Any) -> Segment:
        side: Turns | Plain
        if isinstance(one, str):
            side = Plain("", one)
        elif isinstance(one, tuple):
            side = Plain(*one)
        else:
            last = max(len(one) - 1, 0) if self.objective == "reward" else 0
            side = Turns([dict(message) for message in one], last)
        try:
            return self.encode(Example((side,))).segments[0]
        except BadRecord as bad:
            raise InputError(f"number {number}: {bad.message}") from None


@functools.partial(jax.jit, static_argnums=0)
def _at_ends(
    config: lj.LlamaConfig, params: Any, kernel: jax.Array, tokens: jax.Array, ends: jax.Array
) -> jax.Array:
    x = hidden_states(config, params, tokens)
    return jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0].astype(jnp.float32) @ kernel
