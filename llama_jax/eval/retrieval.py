"""Passkey and needle-in-a-haystack tests: what a model finds in long texts, by length and depth.

A text has a sentence with a number at some depth, and ends with the question for it. The passkey test (arXiv
2305.16300) fills it with four sentences over and over, the needle test with prose; the former asks whether
attention reaches, the latter whether it finds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llama_jax.decoding.arguments import check_int
from llama_jax.errors import InputError
from llama_jax.eval.continuations import ContinuationScorer, Request
from llama_jax.eval.verify.text import PASSAGE
from llama_jax.eval.windows import Progress
from llama_jax.text.model import Model
from llama_jax.tokenizer import Tokenizer

Kind = Literal["passkey", "needle"]


@dataclasses.dataclass(frozen=True)
class Wording:
    """The texts of a test; `{key}` is a number of five digits, and `{city}` a name.

    Attributes:
      task: the text begins with it.
      needle: what is hidden.
      question: what the text ends with; the key follows.
    """

    task: str
    needle: str
    question: str


WORDINGS: dict[Kind, Wording] = {
    "passkey": Wording(
        "There is a pass key hidden in the following text. Find it and memorize it.",
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? The pass key is",
    ),
    "needle": Wording(
        "One of the special magic numbers is hidden in the following text. Memorize it.",
        "The special magic number for {city} is {key}.",
        "What is the special magic number for {city}? The special magic number for {city} is",
    ),
}
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go. There and back again.",
)
CITIES = ("Lisbon", "Oslo", "Kyoto", "Nairobi", "Lima", "Dublin", "Cairo", "Boston")


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """The result of `retrieval`.

    Attributes:
      kind: the test.
      lengths: of the texts, in tokens: each has at most so many, the key included.
      depths: of the key: 0 is the beginning, 1 just before the question.
      samples: texts of each length and depth.
      found: [lengths][depths], the share of keys that greedy decoding writes.
      logprob: [lengths][depths], the mean log-probability of the key, in nats.
    """

    kind: Kind
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    found: list[list[float]]
    logprob: list[list[float]]


def retrieval(
    model: Model,
    kind: Kind,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int = 1,
    haystack: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    progress: Progress = lambda *_: None,
) -> Retrieval:
    """Hides keys in texts of some lengths, at some depths, and asks for them.

    Greedy decoding writes a key exactly if each of its tokens is the most likely one after those before, so
    that one pass over the text tells.

    Args:
      model: the model.
      kind: `passkey` or `needle`.
      lengths: in tokens.
      depths: from 0 to 1.
      samples: texts of each length and depth, with other keys.
      haystack: text to hide the needle in, repeated as often as needed; None is a page of English.
      seed: of the keys.
      batch_size: texts that are run at once.
      progress: is called after each batch.

    Raises:
      InputError: for a length beyond the model's context or too short for the question, a depth outside 0
        to 1, or a haystack without a sentence.
    """
    check_lengths(model.config.max_position_embeddings, lengths, depths)
    check_int("samples", samples)
    sentences = FILLER if kind == "passkey" else split_sentences(PASSAGE if haystack is None else haystack)
    rng = np.random.default_rng(seed)
    texts = [
        make_text(model.tokenizer, kind, sentences, length, depth, rng)
        for length in lengths
        for depth in depths
        for _ in range(samples)
    ]
    scores = ContinuationScorer(model, batch_size=batch_size).score(texts, progress=progress)
    shape = len(lengths), len(depths), samples
    found = np.array([score.greedy.all() for score in scores], float).reshape(shape).mean(-1)
    logprob = np.array([score.logprobs.sum() for score in scores], float).reshape(shape).mean(-1)
    return Retrieval(kind, tuple(lengths), tuple(depths), samples, found.tolist(), logprob.tolist())


def check_lengths(context: int, lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Checks lengths and depths before long work.

    Raises:
      InputError: as `retrieval`.
    """
    for length in lengths:
        if check_int("length", length) > context:
            raise InputError(f"length {length} is beyond the model's context of {context} positions")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"depth {depth:g} must be from 0, the beginning, to 1, the end")


def make_text(
    tokenizer: Tokenizer,
    kind: Kind,
    sentences: Sequence[str],
    length: int,
    depth: float,
    rng: np.random.Generator,
) -> Request:
    """A text with a key, and the key, as token ids: together at most `length`, and less by one sentence.

    Args:
      tokenizer: of the model.
      kind: the test.
      sentences: of the filler, repeated in turn.
      length: in tokens.
      depth: the share of the sentences that are before the needle.
      rng: draws the key.

    Raises:
      InputError: for a length that has no room for the question.
    """
    words = WORDINGS[kind]
    names = {"key": str(rng.integers(10_000, 100_000)), "city": CITIES[rng.integers(len(CITIES))]}
    needle, question = words.needle.format(**names), words.question.format(**names)

    def ids(count: int) -> tuple[list[int], list[int]]:
        before = round(depth * count)
        filler = [sentences[i % len(sentences)] for i in range(count)]
        context = " ".join([words.task, *filler[:before], needle, *filler[before:], question])
        whole, split = tokenizer.encode(f"{context} {names['key']}"), len(tokenizer.encode(context))
        return whole[:split], whole[split:]

    def size(count: int) -> int:
        return sum(map(len, ids(count)))

    least = size(0)
    if least > length:
        raise InputError(f"length {length} is too short: the {kind} and its question take {least} tokens")
    # Bisection: a text grows with its sentences.
    fits, too_long = 0, 1
    while size(too_long) <= length:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if size(middle) <= length else (fits, middle)
    return ids(fits)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line.

    Raises:
      InputError: if there is none.
    """
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text)]
    found = [sentence for sentence in found if sentence]
    if not found:
        raise InputError("the haystack has no sentence; give a text")
    return found
