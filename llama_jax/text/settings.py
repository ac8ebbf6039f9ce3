"""The keyword arguments that every function which generates text takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from llama_jax.decoding.constraints import Grammar
from llama_jax.decoding.keywords import keyword_hint
from llama_jax.errors import GrammarError, InputError
from llama_jax.structured_output.build import grammar as build_grammar
from llama_jax.structured_output.vocabulary import vocabulary_of
from llama_jax.tokenizer import Tokenizer


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


class TextSettings(SamplingSettings, total=False):
    """Sampling settings, and what the text may be: one of these four, or none; see `llama_jax.grammar`."""

    json_schema: Any
    regex: str
    choices: Sequence[str]
    grammar: Grammar | Sequence[Grammar | None]


_GRAMMARS = ("json_schema", "regex", "choices", "grammar")


def take_grammar(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Separates the grammar of a text from the sampling settings.

    Args:
      tokenizer: the model's.
      settings: those of `TextSettings`.

    Returns:
      The grammar, built if need be, a list of one for each prompt, or None; and the `SamplingSettings`.

    Raises:
      GrammarError: for several of them, or a grammar that was built for another vocabulary; as
        `llama_jax.grammar`.
    """
    rest = dict(settings)
    given = {name: value for name in _GRAMMARS if (value := rest.pop(name, None)) is not None}
    if len(given) > 1:
        raise GrammarError(f"{' and '.join(given)} are given; give one of them")
    grammar = given.pop("grammar", None)
    if given:
        return build_grammar(tokenizer, **given), rest
    for one in [grammar] if isinstance(grammar, Grammar) else grammar or []:
        vocabulary = getattr(one, "vocabulary", None)
        if vocabulary is not None and vocabulary != vocabulary_of(tokenizer).digest:
            raise GrammarError(
                "the grammar was built for another vocabulary; build it with the model's tokenizer"
            )
    return grammar, rest


def check_names(settings: Iterable[str]) -> None:
    """Checks that there are settings of these names.

    Raises:
      InputError: naming the closest known one, or what another library's name is called here.
    """
    known = SamplingSettings.__annotations__
    for name in settings:
        if name not in known:
            hint = keyword_hint(name, (*known, *_GRAMMARS, "max_new_tokens", "stop_strings"))
            raise InputError(f"setting {name!r} is unknown; {hint}")
