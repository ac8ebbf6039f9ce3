"""argparse with this program's manners: errors of one line, suggestions, and help that shows examples."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from llama_jax.errors import LlamaJaxError


class UsageError(LlamaJaxError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """The arguments of one command.

    Args:
      command: what is typed before the arguments, such as `llama-jax generate`.
      summary: what the command does, in a sentence or two.
      examples: command lines a newcomer can run as they stand.
    """

    def __init__(self, command: str, summary: str, examples: str) -> None:
        epilog = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
        super().__init__(
            prog=command,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_json(self) -> None:
        """Adds --json."""
        self.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses the words after the command.

        Raises:
          UsageError: if they are no valid arguments.
        """
        args, rest = self.parse_known_args(self._join_values(argv))
        if rest:
            raise UsageError(f"unexpected argument {rest[0]!r}; see: {self.prog} --help")
        return args

    def _join_values(self, argv: Sequence[str]) -> list[str]:
        """Writes `--option VALUE` as `--option=VALUE`, so that a value may start with a dash."""
        words: list[str] = []
        pending = list(argv)
        while pending:
            word = pending.pop(0)
            if word == "--":
                return [*words, word, *pending]
            option, equals, _ = word.partition("=")
            if word.startswith("--") and option not in self._option_string_actions:
                close = suggestion(option, self._option_string_actions)
                raise UsageError(f"unknown option {option}{close or f'; see: {self.prog} --help'}")
            action = self._option_string_actions.get(word)
            takes_value = action is not None and action.nargs is None and not equals
            if takes_value and pending and pending[0] not in self._option_string_actions:
                word = f"{word}={pending.pop(0)}"
            words.append(word)
        return words

    def error(self, message: str) -> NoReturn:
        """Raises what argparse found as one line."""
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing")
        raise UsageError(f"{message}; see: {self.prog} --help")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean ...?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def whole(text: str) -> int:
    """Reads a whole number of at most 64 bits from the command line."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large a number")
    return value


def positive(text: str) -> int:
    """Reads a whole number, at least 1, from the command line."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def number(text: str) -> float:
    """Reads a number from the command line."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
