"""`llama-jax tokenizer`: encode text, decode token ids, and train a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_jax.cli import output
from llama_jax.cli.arguments import ModelParser, read_stdin
from llama_jax.console import loading, terminal
from llama_jax.console.parser import UsageError, parse_int, parse_positive_int, suggestion
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.tokenizer import Tokenizer

HELP = """\
usage: llama-jax tokenizer encode|decode MODEL [arguments]
       llama-jax tokenizer train FILE... --vocab-size V --out PATH

  encode   convert text to token ids
  decode   convert token ids to text
  train    train a vocabulary on text

Help on one command: llama-jax tokenizer encode --help
"""

ENCODE_EXAMPLES = """
llama-jax tokenizer encode smollm2-135m "Hello world"
llama-jax tokenizer encode smollm2-135m --json < README.md
"""

DECODE_EXAMPLES = """
llama-jax tokenizer decode smollm2-135m 19556 905
llama-jax tokenizer encode smollm2-135m "Hello world" | llama-jax tokenizer decode smollm2-135m
"""

TRAIN_EXAMPLES = """
llama-jax tokenizer train README.md --vocab-size 512 --out tokenizer.model
llama-jax tokenizer train 'corpus/**/*.txt' stories.jsonl --vocab-size 32000 --out tokenizer.model
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    commands = {"encode": _encode, "decode": _decode, "train": _train}
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
    elif name in commands:
        commands[name](rest)
    else:
        hint = suggestion(name, commands)
        raise UsageError(f"unknown command 'tokenizer {name}'{hint}; the commands are {', '.join(commands)}")


def _encode(argv: Sequence[str]) -> None:
    parser = ModelParser("llama-jax tokenizer encode", "Print the token ids of a text.", ENCODE_EXAMPLES)
    parser.add_model()
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text (default or -: stdin)")
    parser.add_argument(
        "--special",
        action="store_true",
        help="parse special tokens such as </s> in the text into their ids",
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
    parser = ModelParser("llama-jax tokenizer decode", "Print the text of token ids.", DECODE_EXAMPLES)
    parser.add_model()
    parser.add_argument("ids", metavar="ID", nargs="*", help="the ids (default: from stdin)")
    parser.add_argument(
        "--special", action="store_true", help="print special tokens instead of skipping them"
    )
    parser.add_json()
    args = parser.parse(argv)
    ids = []
    for word in args.ids or read_stdin().split():
        try:
            ids.append(int(word))
        except ValueError:
            raise InputError(f"{word[:40]!r} is not a token id; give integers separated by spaces") from None
    text = _load(args.model).decode(ids, skip_special_tokens=not args.special)
    if args.json:
        output.print_json({"text": text})
    else:
        terminal.write(text + "\n")


def _train(argv: Sequence[str]) -> None:
    parser = ModelParser(
        "llama-jax tokenizer train",
        "Train a SentencePiece BPE vocabulary like Llama's on text.",
        TRAIN_EXAMPLES,
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="text or JSON files, also .gz, .bz2 or .xz, or quoted globs"
    )
    parser.add_argument("--vocab-size", type=parse_int, required=True, help="size of the vocabulary")
    parser.add_argument("--out", required=True, help="the .model file to write")
    parser.add_argument(
        "--field", default="text", help="field of a JSON record with the text (default: text)"
    )
    parser.add_argument(
        "--max-bytes",
        type=parse_positive_int,
        default=20_000_000,
        help="train on an even subsample of about this many bytes (default: 20 MB)",
    )
    parser.add_json()
    args = parser.parse(argv)

    from llama_jax.storage import as_path
    from llama_jax.tokenizer.texts import find_files, read_texts
    from llama_jax.tokenizer.train import train_sentencepiece

    paths = find_files(args.files)
    with terminal.spinner("training the vocabulary ..."):
        train_sentencepiece(
            read_texts(paths, args.field),
            as_path(args.out),
            vocab_size=args.vocab_size,
            max_bytes=args.max_bytes,
        )
    if args.json:
        output.print_json({"out": args.out, "vocab_size": args.vocab_size, "files": len(paths)})
    else:
        output.print_line(args.out)


def _load(model: str) -> Tokenizer:
    from llama_jax.tokenizer import load_tokenizer

    return load_tokenizer(loading.resolve(model))
