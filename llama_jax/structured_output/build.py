"""`grammar`: from a regular expression, a JSON schema or choices to the arrays that decoding takes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.decoding.constraints import Grammar
from llama_jax.errors import GrammarError
from llama_jax.structured_output import json_schema as schemas
from llama_jax.structured_output import patterns, token_automaton
from llama_jax.structured_output.compiler import COMPILER, ByteAutomaton
from llama_jax.structured_output.vocabulary import Vocabulary, vocabulary_of
from llama_jax.tokenizer.base import Tokenizer

_KEPT = 32  # grammars of a tokenizer that are kept
_built: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[str, str], Grammar]] = weakref.WeakKeyDictionary()


def grammar(
    tokenizer: Tokenizer,
    *,
    regex: str | None = None,
    json_schema: Any = None,
    choices: Sequence[str] | None = None,
) -> Grammar:
    """The texts that a continuation may be, as an automaton over the tokens of a vocabulary.

    `generate`, `stream`, `beam_search` and `speculative_generate` take it as `grammar=`: a continuation that
    has ended is then one of these texts, exactly, as `tokenizer.decode` returns it. With SentencePiece that
    drops one space before the first token, so the model may write it or not.

    Building takes milliseconds for choices, and up to about a second for a schema; the last grammars of a
    tokenizer are kept. See docs/structured-output.md for schemas, memory and limits.

    Args:
      tokenizer: the model's.
      regex: a regular expression of the whole text, in the syntax of Rust's regex crate, which is Python's
        without look-around, backreferences and word boundaries. `^` at its start and `$` at its end change
        nothing.
      json_schema: a JSON schema: a dict, JSON text, or a pydantic model.
      choices: the texts, at least one.

    Returns:
      The grammar.

    Raises:
      GrammarError: if not exactly one of them is given; for an expression or a schema that is malformed or
        has something that is not supported, which is named; if no text is accepted, or the vocabulary cannot
        spell one; if the automaton is too large.
    """
    given = {"regex": regex, "json_schema": json_schema, "choices": choices}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise GrammarError(
            f"{' and '.join(names) or 'none of regex, json_schema and choices'} given; give exactly one"
        )
    name = names[0]
    if regex is not None:
        source = _regex_source(regex)
    elif choices is not None:
        source = "|".join(map(patterns.literal, _checked_choices(choices)))
    else:
        source = schemas.regex_of(_schema(json_schema))
    kept = _built.setdefault(tokenizer, {})
    if (name, source) not in kept:
        vocabulary = vocabulary_of(tokenizer)
        if choices is not None:
            _check_spelling(choices, vocabulary)
        built = token_automaton.build(COMPILER.compile(source, name), vocabulary, name)
        while len(kept) >= _KEPT:
            del kept[next(iter(kept))]
        kept[name, source] = built
    return kept[name, source]


def compile_regex(regex: str) -> ByteAutomaton:
    """The automaton of an expression over bytes, before any vocabulary.

    Raises:
      GrammarError: if it is malformed, or has something that is not supported.
    """
    return COMPILER.compile(_regex_source(regex), "regex")


def _regex_source(regex: Any) -> str:
    if not isinstance(regex, str):
        raise GrammarError(f"regex is a {type(regex).__name__}; it must be a string")
    return patterns.without_anchors(regex, "regex")


def _checked_choices(choices: Any) -> list[str]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise GrammarError(f"choices is {str(choices)[:40]!r}; it must be a list with at least one text")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise GrammarError(f"choices[{i}] is {str(choice)[:40]}; it must be a string")
        try:
            choice.encode()
        except UnicodeEncodeError:
            raise GrammarError(f"choices[{i}] has a lone surrogate; replace it") from None
    return list(choices)


def _check_spelling(choices: Sequence[str], vocabulary: Vocabulary) -> None:
    """Checks that tokens hold every byte of the choices: those that cannot be spelled would never come."""
    held = set(b"".join(vocabulary.pieces))
    for choice in choices:
        if missing := [byte for byte in choice.encode() if byte not in held]:
            raise GrammarError(
                f"the vocabulary of {vocabulary.size} tokens cannot spell the choice {choice[:40]!r}: no "
                f"token has the byte 0x{missing[0]:02X}"
            )


def _schema(given: Any) -> schemas.Schema:
    if hasattr(given, "model_json_schema"):  # a pydantic model
        given = given.model_json_schema()
    if isinstance(given, str | bytes):
        given = schemas.parse(given, "json_schema")
    if not isinstance(given, Mapping | bool):
        raise GrammarError(f"json_schema is a {type(given).__name__}; it must be a dict, or JSON text of one")
    return given
