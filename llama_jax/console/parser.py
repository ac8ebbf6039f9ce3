"""argparse with one-line errors, did-you-mean suggestions and examples in the help."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from llama_jax.errors import LlamaJaxError


class UsageError(LlamaJaxError):
    """Invalid command-line arguments."""


class Parser(argparse.ArgumentParser):
    """Argument parser of one command.

    Args:
      command: the program and subcommand, such as `llama-jax generate`.
      summary: what the command does, in a sentence or two.
      examples: complete command lines, one per line.

    Attributes:
      replacements: removed option to the options that replace it, for the error message.
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
        self.replacements: dict[str, str] = {}

    def add_json(self) -> None:
        """Adds --json."""
        self.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")

    def has_option(self, name: str) -> bool:
        """Returns whether an option, such as `--json`, is one of this command's."""
        return name in self._option_string_actions

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses the arguments after the command.

        Raises:
          UsageError: if they are invalid.
        """
        args, rest = self.parse_known_args(self._options_first(argv))
        if rest := [argument for argument in rest if argument != "--"]:
            raise UsageError(f"unexpected argument {rest[0]!r}; see: {self.prog} --help")
        return args

    def _options_first(self, argv: Sequence[str]) -> list[str]:
        """Reorders the arguments to `--option=VALUE ... -- POSITIONAL ...`.

        A value may then start with a dash, and options may stand before and between positional arguments:
        argparse takes an optional positional for absent as soon as an option precedes it.
        """
        options: list[str] = []
        positionals: list[str] = []
        pending = list(argv)
        while pending:
            argument = pending.pop(0)
            if argument == "--":
                positionals += pending
                break
            if not _looks_like_option(argument):
                positionals.append(argument)
                continue
            option, equals, _ = argument.partition("=")
            if argument.startswith("--") and option not in self._option_string_actions:
                hint = suggestion(option, self._option_string_actions) or f"; see: {self.prog} --help"
                if option in self.replacements:
                    hint = f"; did you mean {self.replacements[option]}?"
                raise UsageError(f"unknown option {option}{hint}")
            action = self._option_string_actions.get(argument)  # private: tests/test_private_seams.py
            takes_value = action is not None and action.nargs is None and not equals
            if takes_value and pending and pending[0] not in self._option_string_actions:
                argument = f"{argument}={pending.pop(0)}"
            options.append(argument)
            if action is not None and action.nargs == "+" and not equals:  # all names up to the next option
                while pending and not _looks_like_option(pending[0]):
                    options.append(pending.pop(0))
        return [*options, "--", *positionals]

    def error(self, message: str) -> NoReturn:
        """Raises argparse's error as a `UsageError` of one line."""
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing")
        raise UsageError(f"{message}; see: {self.prog} --help")


def _looks_like_option(argument: str) -> bool:
    """Whether an argument is an option: not `-`, a negative number, or a text that starts with a dash."""
    if argument.startswith("--"):
        return not re.search(r"\s", argument.partition("=")[0])
    return re.fullmatch(r"-[^\d.\s]\S*", argument) is not None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the closest known name, or an empty string if none is close."""
    bare = name.lstrip("-")  # the dashes, which all options share, do not make two of them alike
    names = {other.lstrip("-"): other for other in known}
    close = difflib.get_close_matches(bare, names, n=1)
    if not close and len(bare) > 2:
        close = [other for other in names if other.startswith(bare)]
    return f"; did you mean {names[close[0]]}?" if close else ""


def parse_int(text: str) -> int:
    """Parses a 64-bit signed integer (an argparse `type`)."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer") from None
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too large; integers have at most 64 bits")
    return value


def parse_positive_int(text: str) -> int:
    """Parses an integer of at least 1 (an argparse `type`)."""
    value = parse_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return value


def parse_float(text: str) -> float:
    """Parses a float (an argparse `type`)."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None
