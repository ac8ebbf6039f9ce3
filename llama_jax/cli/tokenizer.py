"""`llama-jax tokenizer`: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_jax.cli import output
from llama_jax.cli.generate import read_stdin
from llama_jax.cli.parser import Parser, UsageError, suggestion
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.tokenizer import Tokenizer

HELP = """\
usage: llama-jax tokenizer encode|decode MODEL [arguments]

  encode   text to token ids
  decode   token ids to text

Each has its own help: llama-jax tokenizer encode --help
"""

ENCODE_EXAMPLES = """
llama-jax tokenizer encode smollm2-135m "Hello world"
llama-jax tokenizer encode smollm2-135m --json < README.md
"""

DECODE_EXAMPLES = """
llama-jax tokenizer decode smollm2-135m 19556 905
llama-jax tokenizer encode smollm2-135m "Hello world" | llama-jax tokenizer decode smollm2-135m
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    verbs = {"encode": _encode, "decode": _decode}
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP, end="")
    elif verb in verbs:
        verbs[verb](rest)
    else:
        close = suggestion(verb, verbs)
        raise UsageError(f"unknown command 'tokenizer {verb}'{close}; it is encode or decode")


def _encode(argv: Sequence[str]) -> None:
    parser = Parser("llama-jax tokenizer encode", "Print the token ids of a text.", ENCODE_EXAMPLES)
    parser.add_model()
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text; absent or -: stdin")
    parser.add_argument(
        "--special", action="store_true", help="control tokens spelled in the text count as such"
    )
    parser.add_json()
    args = parser.parse(argv)
    text = read_stdin() if args.text in (None, "-") else args.text
    tokenizer = _load(args.model)
    ids = tokenizer.encode(text, parse_special=args.special)
    if args.json:
        output.print_json({"ids": ids, "pieces": [tokenizer.piece(token) for token in ids]})
    else:
        print(*ids)


def _decode(argv: Sequence[str]) -> None:
    parser = Parser("llama-jax tokenizer decode", "Print the text of token ids.", DECODE_EXAMPLES)
    parser.add_model()
    parser.add_argument("ids", metavar="ID", nargs="*", help="the ids; absent: from stdin")
    parser.add_argument("--special", action="store_true", help="spell control tokens, do not leave them out")
    parser.add_json()
    args = parser.parse(argv)
    ids = []
    for word in args.ids or read_stdin().split():
        try:
            ids.append(int(word))
        except ValueError:
            what = f"{word[:40]!r} is not a token id"
            raise InputError(f"{what}; give whole numbers, separated by spaces") from None
    text = _load(args.model).decode(ids, skip_special_tokens=not args.special)
    if args.json:
        output.print_json({"text": text})
    else:
        print(text)


def _load(model: str) -> Tokenizer:
    from llama_jax.tokenizer import load_tokenizer

    return load_tokenizer(output.resolve(model))
