"""What a model says of texts: logits, log-probabilities of tokens, embeddings; ragged texts in one call."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding.arguments import check_int, pad_right
from llama_jax.decoding.processes import fetch
from llama_jax.errors import InputError
from llama_jax.inspection.captures import capture
from llama_jax.loss import token_logprobs
from llama_jax.model import forward
from llama_jax.tokenizer import Tokenizer

Pooling = Literal["mean", "last"]
_PAD_MULTIPLE = 64  # rows are padded to a multiple of it, to limit the number of compiled programs


class TextScoring:
    """Methods of a `Model` that read texts and generate none; it has the attributes, see there."""

    config: LlamaConfig
    params: Any
    tokenizer: Tokenizer

    @abc.abstractmethod
    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context manager that sets the model's mesh."""

    @abc.abstractmethod
    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Tokenizes a text."""

    def logits(self, text: str) -> jax.Array:
        """Logits f32 [T, V] of the next token after each of the text's T tokens.

        Raises:
          InputError: for an empty text, or one beyond the model's context.
        """
        rows = _rows(self, [text])
        with self.on_mesh():
            return forward(self.config, self.params, jnp.asarray(rows))[0]

    def logprobs(self, texts: Sequence[str], *, batch_size: int = 8) -> list[dict[str, Any]]:
        """The log-probability of each token of some texts, given those before it.

        Args:
          texts: of any lengths; each gives what it gives alone.
          batch_size: texts in a forward pass.

        Returns:
          A record for each token, as `pandas.DataFrame` takes them: `text`, its index; `position`; `id`;
          `piece`; `logprob`, None for a text's first token.

        Raises:
          InputError: for an empty text, or one beyond the model's context, with its index.
        """
        rows = _rows(self, texts)
        score = lambda tokens, _: token_logprobs(self.config, self.params, tokens)  # noqa: E731
        return [
            {
                "text": number,
                "position": position,
                "id": token,
                "piece": self.tokenizer.piece(token),
                "logprob": float(values[position]) if position else None,
            }
            for number, (ids, values) in enumerate(
                zip(rows, _batched(self, rows, batch_size, score), strict=True)
            )
            for position, token in enumerate(ids)
        ]

    def embed(
        self, texts: Sequence[str], *, layer: int = -1, pooling: Pooling = "mean", batch_size: int = 8
    ) -> np.ndarray:
        """Embeddings f32 [n, D] of some texts: the residual stream after a layer, without the final norm.

        Args:
          texts: of any lengths; each gives what it gives alone.
          layer: negative ones count from the end.
          pooling: the `mean` over a text's tokens, or its `last` one.
          batch_size: texts in a forward pass.

        Raises:
          InputError: for an unknown layer or pooling, or a text that cannot be read, with its index.
        """
        if pooling not in get_args(Pooling):
            raise InputError(f"pooling is {pooling!r}; it must be one of {', '.join(get_args(Pooling))}")
        site = "block.residual_post"

        def pooled(tokens: Any, lengths: Any) -> jax.Array:
            _, found = capture(self.config, self.params, tokens, sites=[site], layers=[layer])
            return _pooled(found[site][0], lengths, pooling)

        return np.stack(_batched(self, _rows(self, texts), batch_size, pooled))


@functools.partial(jax.jit, static_argnames="pooling")
def _pooled(x: jax.Array, lengths: jax.Array, pooling: Pooling) -> jax.Array:
    """[B, T, D] -> f32 [B, D], over the tokens of each row."""
    x, place = sharding.over_batch(x).astype(jnp.float32), jnp.arange(x.shape[1])
    if pooling == "last":
        return jnp.where((place == lengths[:, None] - 1)[..., None], x, 0.0).sum(1)
    return jnp.where((place < lengths[:, None])[..., None], x, 0.0).sum(1) / lengths[:, None]


def _rows(model: TextScoring, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, each as long as the model's context or shorter.

    Raises:
      InputError: naming the text.
    """
    if isinstance(texts, str) or not texts:
        raise InputError("texts is not a list of texts; give at least one, such as ['Once upon a time']")
    rows, longest = [], model.config.max_position_embeddings
    for number, text in enumerate(texts):
        rows.append(model.encode_prompt(text))
        if len(rows[-1]) > longest:
            raise InputError(
                f"text {number} has {len(rows[-1])} tokens, and the model's context {longest}; shorten it"
            )
    return rows


def _batched(
    model: TextScoring, rows: list[list[int]], batch_size: int, function: Callable[[Any, Any], jax.Array]
) -> list[np.ndarray]:
    """(tokens [B, T], lengths [B]) -> [B, ...], row by row; rows of like length share a batch."""
    with model.on_mesh():
        shards = sharding.batch_shards()
    size = -(-min(check_int("batch_size", batch_size), len(rows)) // shards) * shards
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), size):
        here = order[start : start + size]
        filled = [rows[row] for row in here] + [rows[here[-1]]] * (size - len(here))
        tokens, lengths = (np.asarray(x) for x in pad_right(filled))
        longest = model.config.max_position_embeddings
        width = min(-(-tokens.shape[1] // _PAD_MULTIPLE) * _PAD_MULTIPLE, longest)
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        with model.on_mesh():
            values = fetch(function(jnp.asarray(tokens), jnp.asarray(lengths)))
        found |= dict(zip(here, np.asarray(values), strict=False))
    return [found[row] for row in range(len(rows))]
