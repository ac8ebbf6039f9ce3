"""Log-probabilities of the tokens of long rows, in windows of the model's context: each token once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding.processes import fetch
from llama_jax.forward_options import ForwardOptions
from llama_jax.loss import map_logits
from llama_jax.model import Params, hidden_states
from llama_jax.text.model import Model

Progress = Callable[[int, int], None]  # (done, total)
_LEAST_WIDTH = 64
_LOGITS = 512  # positions whose logits are in memory at a time
_BLOCKWISE = 1024  # rows of this length have no array of all scores


class Window(NamedTuple):
    """A row of the model.

    Attributes:
      inputs: what the model reads.
      targets: the tokens to score: the predictions after the last `len(targets)` inputs.
    """

    inputs: Sequence[int]
    targets: Sequence[int]


class TokenScores(NamedTuple):
    """Of some tokens, each given those before it.

    Attributes:
      logprobs: f32 [n], log-probabilities in nats.
      greedy: bool [n], whether a token is the most likely one.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


def sliding_windows(ids: Sequence[int], prefix: int | None, window: int, stride: int) -> Iterator[Window]:
    """Windows that score every token once, with as much context as fits.

    The first window scores all of its tokens, each later one the next `stride` tokens after the last ones
    scored, with `window - stride` tokens or more before them. The last window is full too, where the text
    is that long.

    Args:
      ids: the text.
      prefix: a token before the text, whose prediction is not scored. None: the text's first token is it.
      window: the most tokens that the model reads.
      stride: at most `window`.
    """
    row = [*([] if prefix is None else [prefix]), *ids]
    done, end = 0, min(window, len(row) - 1)
    while done < end:
        yield Window(row[max(end - window, 0) : end], row[done + 1 : end + 1])
        done, end = end, min(end + stride, len(row) - 1)


def score_windows(
    model: Model, windows: Sequence[Window], *, batch_size: int = 8, progress: Progress = lambda *_: None
) -> list[TokenScores]:
    """Scores of the targets of each window, in the order of the windows.

    Rows are padded to a power of two or three halves of one, at least 64, or to the model's context: one
    program for each such width. A window's scores do not depend on the others of its batch.

    Args:
      model: the model.
      windows: no longer than its context.
      batch_size: windows in a forward pass.
      progress: is called after each batch.
    """
    size = batch_rows(model, min(batch_size, len(windows)))
    context = model.config.max_position_embeddings
    widths = [min(_width(len(window.inputs)), context) for window in windows]
    order = sorted(range(len(windows)), key=lambda number: widths[number])
    found: dict[int, TokenScores] = {}
    while order:
        width = widths[order[0]]
        here = [number for number in order[:size] if widths[number] == width]
        order = order[len(here) :]
        inputs, targets = np.zeros((2, size, width), np.int32)
        for row, number in enumerate(here):
            window = windows[number]
            end = len(window.inputs)
            inputs[row, :end] = window.inputs
            targets[row, end - len(window.targets) : end] = window.targets
        options = ForwardOptions(attention_backend="blockwise" if width >= _BLOCKWISE else "xla")
        chunks = max(1, size * width // _LOGITS)
        with model.on_mesh():
            scores = fetch(
                _scores(model.config, model.params, inputs, targets, options=options, num_chunks=chunks)
            )
        for row, number in enumerate(here):
            end = len(windows[number].inputs)
            scored = slice(end - len(windows[number].targets), end)
            found[number] = TokenScores(*(values[row, scored] for values in scores))
        progress(len(found), len(windows))
    return [found[number] for number in range(len(windows))]


def _width(length: int) -> int:
    power = max(_LEAST_WIDTH, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > _LEAST_WIDTH and length <= power * 3 // 4 else power


def batch_rows(model: Model, rows: int) -> int:
    """The rows of a batch of at least `rows` that the model's mesh divides."""
    with model.on_mesh():
        shards = sharding.batch_shards()
    return -(-rows // shards) * shards


@functools.partial(jax.jit, static_argnames=("config", "options", "num_chunks"))
def _scores(
    config: LlamaConfig,
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    options: ForwardOptions,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32 [B, T] of the targets after each input, and whether each is the most likely."""

    def of_logits(logits: jax.Array, targets: jax.Array) -> Any:
        # As in `loss`: a comparison rather than a gather, so that the vocabulary may be sharded.
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        chosen = jnp.where(is_target, logits, 0.0).sum(-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(-1)

    x = hidden_states(config, params, inputs, options=options)
    logprobs, greedy = map_logits(params, x, of_logits, targets, num_chunks=num_chunks)
    return sharding.over_batch(logprobs), sharding.over_batch(greedy)
