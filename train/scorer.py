"""Scores of a trained head: rewards of answers, and classes or values of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import llama_jax as lj
from llama_jax import sharding
from llama_jax.chat import ChatTemplate, chat_template
from llama_jax.decoding.processes import fetch
from llama_jax.errors import InputError, TokenizerError
from llama_jax.model import hidden_states
from llama_jax.text.pretrained import resolve
from llama_jax.weights import open_source
from llama_jax.weights.run_adapters import is_step, run_of

from .config.objective import HEAD_OBJECTIVES, Objective
from .config.read import load_config
from .data.conversations import Conversation
from .data.encode import Encoder
from .data.examples import ExampleEncoder, Segment
from .data.formats import Example, PlainText
from .data.records import BadRecord

_PAD_MULTIPLE = 64  # sequences are padded to a multiple of it, to limit the number of compiled programs


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model with a head: a reward model, classifier or regressor.

    Attributes:
      model: the model, with its adapter merged; its configuration has the labels.
      objective: the run's; for other models, `reward` if the head has one output, else `classify`.
      encode: encodes an example to token ids, as in training.
      pad_id: for models of other libraries, the padding token: the head is read at the last other token.
    """

    model: lj.Model
    objective: Objective
    encode: ExampleEncoder
    pad_id: int | None = None

    @staticmethod
    def load(
        name_or_path: str | Path, dtype: str = "float32", *, template: str = "", mesh: Mesh | None = None
    ) -> Scorer:
        """Loads a run, or another model with a head, such as Hugging Face's LlamaForSequenceClassification.

        Args:
          name_or_path: the directory of the run, of one of its steps, or of a model.
          dtype: compute dtype.
          template: chat template for conversations, if the model comes with none.
          mesh: shard the model over this mesh, as `llama_jax.load` does.

        Raises:
          InputError: if it has no head.
          LlamaJaxError: if it cannot be read.
        """
        folder = resolve(name_or_path)
        objective: Objective
        config_file = (run_of(folder) if is_step(folder) else folder) / "config.toml"
        if config_file.is_file():
            run = load_config(config_file)
            objective = encoding_objective = run.train.objective
            model_template, seq_len = run.data.template, run.train.seq_len
            parse_special = run.data.parse_special
            if objective not in HEAD_OBJECTIVES:
                raise InputError(
                    f'{folder}: its train.objective is "{objective}", which has no head; give a run of '
                    f"{', '.join(HEAD_OBJECTIVES)}"
                )
            model, pad_id = lj.load(folder, dtype=dtype, mesh=mesh), None
        else:
            source = open_source(folder)
            if not source.config.labels:
                raise InputError(
                    f"{folder}: is a language model, which has no head; give a run of "
                    f"{', '.join(HEAD_OBJECTIVES)}, or a Hugging Face directory of "
                    "LlamaForSequenceClassification"
                )
            model, pad_id = lj.load(folder, dtype=dtype, mesh=mesh), source.metadata.get("pad_token_id")
            objective = "reward" if len(source.config.labels) == 1 else "classify"
            encoding_objective, model_template, parse_special = "classify", "", True
            seq_len = model.config.max_position_embeddings
        try:
            chat: ChatTemplate | None = chat_template(model.tokenizer, model_template or None)
        except TokenizerError:
            chat = chat_template(model.tokenizer, template) if template else None
        seq_len = min(seq_len, model.config.max_position_embeddings)
        encode_text = Encoder(model.tokenizer, parse_special)
        encode = ExampleEncoder(encode_text, chat, encoding_objective, seq_len, "fail")
        return Scorer(model, objective, encode, pad_id)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the head's outputs."""
        return self.model.config.labels

    def scores(self, inputs: Sequence[Any], batch_size: int = 16) -> np.ndarray:
        """Returns the head's outputs f32 [n, C] for each text or conversation.

        On a mesh over several processes each must make the same call, and each gets all outputs.

        Args:
          inputs: texts, or conversations: lists of messages or `Conversation`s; for a reward model these end
            with the answer, and plain text is a pair (prompt, answer).
          batch_size: sequences per forward pass; raised to what the mesh divides.

        Raises:
          InputError: for one that cannot be encoded, with its index.
        """
        segments = [self._segment(i, one) for i, one in enumerate(inputs)]
        outputs = []
        with self.model.on_mesh():
            batch_size = -(-batch_size // sharding.batch_shards()) * sharding.batch_shards()
        for start in range(0, len(segments), batch_size):
            batch = segments[start : start + batch_size]
            width = -(-max(map(len, batch)) // _PAD_MULTIPLE) * _PAD_MULTIPLE
            tokens = np.zeros((batch_size, width), np.int32)
            for row, segment in zip(tokens, batch, strict=False):
                row[: len(segment)] = segment.ids
            last = np.array(
                [self._last_token(segment) for segment in batch] + [0] * (batch_size - len(batch))
            )
            with self.model.on_mesh():
                values = fetch(_head_outputs(self.model.config, self.model.params, tokens, last))
            outputs.append(values[: len(batch)])
        return np.concatenate(outputs) if outputs else np.zeros((0, len(self.labels)), np.float32)

    def classes(self, inputs: Sequence[Any], batch_size: int = 16) -> list[str]:
        """Returns the most likely class of each text or conversation."""
        return [self.labels[i] for i in self.scores(inputs, batch_size).argmax(-1)]

    def _segment(self, index: int, value: Any) -> Segment:
        side: Conversation | PlainText
        encode = self.encode
        if isinstance(value, str):
            side = PlainText("", value)
        elif isinstance(value, tuple):
            side = PlainText(*value)
            encode = dataclasses.replace(encode, objective=self.objective)  # appends EOS to the answer
        else:
            side = value if isinstance(value, Conversation) else Conversation([dict(m) for m in value])
            answer = max(len(side.messages) - 1, 0) if self.objective == "reward" else 0
            side = dataclasses.replace(side, first=answer)
        try:
            return encode(Example((side,))).segments[0]
        except BadRecord as bad:
            raise InputError(f"input {index}: {bad.message}") from None

    def _last_token(self, segment: Segment) -> int:
        """The position of the last token that is not padding, where the head is read."""
        positions = np.flatnonzero(segment.ids != (-1 if self.pad_id is None else self.pad_id))
        return int(positions[-1]) if len(positions) else 0


@functools.partial(jax.jit, static_argnums=0)
def _head_outputs(config: lj.LlamaConfig, params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
    """The head's outputs f32 [B, C] at positions `last` int32 [B]."""
    x, last = sharding.over_batch(hidden_states(config, params, tokens)), sharding.over_batch(last)
    take = jax.vmap(lambda row, index: jax.lax.dynamic_index_in_dim(row, index, keepdims=False))
    return take(x, last).astype(jnp.float32) @ params["score"]["kernel"]
