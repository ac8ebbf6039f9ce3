"""The flags that restrict a text: a JSON schema, a regular expression, or choices."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama_jax.console.parser import Parser
from llama_jax.errors import InputError


def add_grammar_flags(parser: Parser) -> None:
    """Adds --json-schema, --regex and --choices, of which one may be given."""
    group = parser.add_argument_group("structured output (docs/structured-output.md)")
    option = group.add_mutually_exclusive_group().add_argument
    option("--json-schema", metavar="FILE", help="write JSON that is valid under the schema in this file")
    option("--regex", metavar="REGEX", help="write a text that this regular expression matches as a whole")
    option("--choices", metavar="A,B", help="write one of these texts; a JSON list if they have commas")


def grammar_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `llama_jax.grammar` from parsed flags, checked as far as without a vocabulary.

    Raises:
      InputError: for a file that is not JSON, a schema that is not supported, or an expression.
    """
    if args.json_schema is not None:
        from llama_jax.structured_output.json_schema import regex_of

        schema = _read_schema(args.json_schema)
        regex_of(schema)
        return {"json_schema": schema}
    if args.regex is not None:
        from llama_jax.structured_output.build import compile_regex

        compile_regex(args.regex)
        return {"regex": args.regex}
    return {} if args.choices is None else {"choices": _parse_choices(args.choices)}


def _read_schema(name: str) -> Any:
    from llama_jax.structured_output.json_schema import parse

    try:
        schema = parse(Path(name).read_bytes(), f"--json-schema {name}")
    except OSError as error:
        raise InputError(f"--json-schema {name} cannot be read: {error.strerror or error}") from None
    if not isinstance(schema, dict | bool):
        raise InputError(f"--json-schema {name} holds a {type(schema).__name__}; a schema is an object")
    return schema


def _parse_choices(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            choices = json.loads(text)
        except ValueError as error:
            raise InputError(f"--choices begins like a JSON list and is none: {error}") from None
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise InputError(f"--choices is {text[:40]}; it must be a list of texts, at least one")
        return choices
    choices = text.split(",")
    if not all(choices):
        raise InputError(f"--choices is {text[:40]!r}, with an empty text; separate texts by single commas")
    return choices
