"""Loss per token, perplexity and bits per byte of a text."""

from __future__ import annotations

import dataclasses
import math

from llama_jax.decoding.arguments import check_int
from llama_jax.errors import InputError
from llama_jax.eval.windows import Progress, score_windows, sliding_windows
from llama_jax.text.model import Model


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`.

    Attributes:
      tokens: tokens scored, each once.
      bytes: of the text in UTF-8.
      loss: nats per token.
      perplexity: exp(loss).
      bits_per_byte: bits of the whole text over its bytes, which vocabularies do not change.
      window: the most tokens that the model read at once.
      stride: tokens scored by each window after the first.
    """

    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    window: int
    stride: int


def perplexity(
    model: Model,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress = lambda *_: None,
) -> Perplexity:
    """The perplexity of a text, in windows that overlap; every token is scored once.

    The first token is predicted after BOS (EOS where the vocabulary has no BOS, as in lm-evaluation-harness;
    with neither it is not scored). Control tokens in the text are ordinary text.

    Args:
      model: the model.
      text: of any length.
      window: the most tokens that the model reads at once; None is its context.
      stride: tokens scored by each window after the first, which have `window - stride` tokens or more before
        them. None is half of the window; the window itself is the fastest, and cuts the context.
      batch_size: windows in a forward pass.
      progress: is called after each batch.

    Raises:
      InputError: for a text without tokens to score, or a window or stride that is out of range.
    """
    context = model.config.max_position_embeddings
    window = context if window is None else check_int("window", window)
    if window > context:
        raise InputError(f"window is {window}; the model's context has {context} positions")
    stride = max(1, window // 2) if stride is None else check_int("stride", stride)
    if stride > window:
        raise InputError(f"stride is {stride} and window {window}: tokens between two windows would be lost")
    tokenizer = model.tokenizer
    prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    windows = list(sliding_windows(tokenizer.encode(text, add_bos=False), prefix, window, stride))
    if not windows:
        raise InputError("the text has no token to score; give a longer one")
    scores = score_windows(model, windows, batch_size=batch_size, progress=progress)
    tokens, nbytes = sum(len(w.targets) for w in windows), len(text.encode())
    nats = -math.fsum(float(score.logprobs.sum(dtype="float64")) for score in scores)
    return Perplexity(
        tokens=tokens,
        bytes=nbytes,
        loss=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700)),
        bits_per_byte=nats / math.log(2) / nbytes,
        window=window,
        stride=stride,
    )
