"""`llama-jax data`: prepare a run's data ahead of time; a wrapper around `llama_jax.train.prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from llama_jax.console.parser import UsageError, suggestion

COMMANDS = ("prepare",)

HELP = """\
usage: llama-jax data prepare CONFIG OUT [--runner NAME ...] [--section.key VALUE ...]

  prepare   tokenize a run's text once, without duplicates, into globally shuffled shards

Help on one command: llama-jax data prepare --help
"""


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
    elif name == "prepare":
        from llama_jax.train.prepare import command

        command.run(rest)
    else:
        hint = suggestion(name, COMMANDS)
        raise UsageError(f"unknown command 'data {name}'{hint}; the commands are {', '.join(COMMANDS)}")
