"""The keyword arguments that every function which generates text takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from llama_jax.decoding.keywords import keyword_hint
from llama_jax.errors import InputError


class SamplingSettings(TypedDict, total=False):
    """Sampling settings: the fields of `Sampling`, which documents them, and the seed.

    The default temperature is 0: greedy decoding.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    suppress_tokens: Sequence[int]
    forced_tokens: Sequence[int]
    seed: int


def check_names(settings: Iterable[str]) -> None:
    """Checks that there are settings of these names.

    Raises:
      InputError: naming the closest known one, or what another library's name is called here.
    """
    known = SamplingSettings.__annotations__
    for name in settings:
        if name not in known:
            hint = keyword_hint(name, (*known, "max_new_tokens", "stop_strings"))
            raise InputError(f"setting {name!r} is unknown; {hint}")
