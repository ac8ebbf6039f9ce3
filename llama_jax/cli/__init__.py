"""The command `llama-jax`: one module per subcommand, each a thin wrapper around the library.

Only the requested subcommand is imported, so help and usage errors do not wait for JAX.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from llama_jax.console.exit_status import exit_status
from llama_jax.console.parser import UsageError, suggestion

# The module of each subcommand has run(argv), which parses the remaining arguments and does the work.
SUBCOMMANDS = {
    "generate": "continue a text",
    "chat": "chat with a model",
    "train": "train a model, or resume a run",
    "inspect": "show what a checkpoint contains and how much memory it needs",
    "convert": "convert a checkpoint to another format",
    "verify": "check whether two checkpoints hold the same model",
    "models": "list the known models, and which are cached",
    "bench": "measure the speed of loading, prefill and decoding",
    "tokenizer": "encode and decode text, or train a vocabulary",
}

HELP = """\
usage: llama-jax COMMAND [arguments]

Llama 2 in JAX: load real weights, check them, generate; train from scratch.

commands:
{commands}

Help on one command: llama-jax COMMAND --help; the version: llama-jax --version

examples:
  llama-jax models
  llama-jax generate smollm2-135m --prompt "The capital of France is"
  llama-jax inspect smollm2-135m
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
      argv: the arguments after `llama-jax`; None takes them from `sys.argv`.

    Returns:
      The exit status, see `exit_status`.
    """
    return exit_status(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if name == "help" and rest and rest[0] in SUBCOMMANDS:
        name, rest = rest[0], ["--help"]
    if name in ("--version", "-V", "version"):
        print(f"llama-jax {importlib.metadata.version('llama-jax')}")
    elif name in ("-h", "--help", "help"):
        commands = "\n".join(f"  {command:<11}{summary}" for command, summary in SUBCOMMANDS.items())
        print(HELP.format(commands=commands), end="")
    elif name in SUBCOMMANDS:
        importlib.import_module(f"llama_jax.cli.{name}").run(rest)
    else:
        kind = "option" if name.startswith("-") else "command"
        hint = suggestion(name, SUBCOMMANDS)
        raise UsageError(f"unknown {kind} {name!r}{hint}; the commands are {', '.join(SUBCOMMANDS)}")
