"""The numbers that a head gives: rewards of answers, classes and values of texts, by a run or a model."""

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
from llama_jax.chat import ChatTemplate, chat_template
from llama_jax.errors import InputError, TokenizerError
from llama_jax.model import hidden_states
from llama_jax.text.pretrained import resolve
from llama_jax.weights import open_source

from .config.finetune import HEADS
from .config.objective import Objective
from .config.read import load_config
from .data.encode import Encoder
from .data.examples import ExampleEncoder, Segment
from .data.forms import Example, Plain, Turns
from .data.records import BadRecord

_ROUND = 64  # rows are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A run of `train.objective` reward, classify or regress, or any such model, ready to be asked.

    Attributes:
      model: its model, with its adapter; the configuration has the labels.
      objective: of the run; of another model, reward where its head has one number, else classify.
      encode: from an example to ids, as in training.
      pad_id: where a model comes from elsewhere, the token that it does not read its numbers at.
    """

    model: lj.Model
    objective: Objective
    encode: ExampleEncoder
    pad_id: int | None = None

    @staticmethod
    def load(name_or_path: str | Path, dtype: str = "float32", *, template: str = "") -> Scorer:
        """Loads a run, or any other model with a head: Hugging Face's LlamaForSequenceClassification.

        Args:
          name_or_path: the run's directory, or the model's.
          dtype: to compute in.
          template: for conversations, where the model comes with none.

        Raises:
          InputError: if it has no head.
          LlamaJaxError: if it cannot be read.
        """
        folder = resolve(name_or_path)
        objective: Objective
        if (folder / "config.toml").is_file():
            run = load_config(folder / "config.toml")
            objective, wanted, longest = run.train.objective, run.data.template, run.train.seq_len
            if objective not in HEADS:
                raise InputError(
                    f'{folder}: its train.objective is "{objective}", which has no head; give a run of '
                    f"{', '.join(HEADS)}"
                )
            model, pad_id, reads = lj.load(folder, dtype=dtype), None, objective
        else:
            source = open_source(folder)
            if not source.config.labels:
                raise InputError(
                    f"{folder}: is a language model, which has no head; give a run of {', '.join(HEADS)}, or "
                    "a Hugging Face directory of LlamaForSequenceClassification"
                )
            model, pad_id = lj.load(folder, dtype=dtype), source.metadata.get("pad_token_id")
            objective = "reward" if len(source.config.labels) == 1 else "classify"
            wanted, longest, reads = "", model.config.max_position_embeddings, "classify"
        try:
            chat: ChatTemplate | None = chat_template(model.tokenizer, wanted or None)
        except TokenizerError:
            chat = chat_template(model.tokenizer, template) if template else None
        longest = min(longest, model.config.max_position_embeddings)
        encode = ExampleEncoder(Encoder(model.tokenizer), chat, reads, longest, "fail")
        return Scorer(model, objective, encode, pad_id)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the head's numbers."""
        return self.model.config.labels

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
            ends = np.array([self._end(segment) for segment in part] + [0] * (batch_size - len(part)))
            numbers = _at_ends(self.model.config, self.model.params, tokens, ends)
            found.append(np.asarray(numbers)[: len(part)])
        return np.concatenate(found) if found else np.zeros((0, len(self.labels)), np.float32)

    def classes(self, asked: Sequence[Any], batch_size: int = 16) -> list[str]:
        """Returns the name of the likeliest class of each text or conversation."""
        return [self.labels[i] for i in self.scores(asked, batch_size).argmax(-1)]

    def _segment(self, number: int, one: Any) -> Segment:
        side: Turns | Plain
        encode = self.encode
        if isinstance(one, str):
            side = Plain("", one)
        elif isinstance(one, tuple):
            side = Plain(*one)
            encode = dataclasses.replace(encode, objective=self.objective)  # an answer has an end
        else:
            last = max(len(one) - 1, 0) if self.objective == "reward" else 0
            side = Turns([dict(message) for message in one], last)
        try:
            return encode(Example((side,))).segments[0]
        except BadRecord as bad:
            raise InputError(f"number {number}: {bad.message}") from None

    def _end(self, segment: Segment) -> int:
        """Where the numbers are read: at the last token that is no padding."""
        said = np.flatnonzero(segment.ids != (-1 if self.pad_id is None else self.pad_id))
        return int(said[-1]) if len(said) else 0


@functools.partial(jax.jit, static_argnums=0)
def _at_ends(config: lj.LlamaConfig, params: Any, tokens: jax.Array, ends: jax.Array) -> jax.Array:
    x = hidden_states(config, params, tokens)
    last = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return last @ params["score"]["kernel"]
