"""The command `llama-jax`: one module per subcommand, each a thin wrapper around the library.

Only the requested subcommand is imported, so help and usage errors do not wait for JAX.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Nothing else is imported here: until `exit_status` runs, Ctrl-C is a traceback.
from llama_jax.console.exit_status import exit_status

# The module of each subcommand has run(argv), which parses the remaining arguments and does the work.
SUBCOMMANDS = {
    "generate": "continue a text",
    "chat": "chat with a model",
    "serve": "serve a model over HTTP as OpenAI's API does, with a chat page",
    "train": "train a model, or resume a run",
    "data": "tokenize a run's text ahead of time",
    "plan": "memory, time and cost of training or decoding on a TPU slice, without one",
    "inspect": "show what a checkpoint contains and how much memory it needs",
    "convert": "convert a checkpoint to another format",
    "verify": "check whether two checkpoints hold the same model",
    "eval": "score a model: tasks, perplexity of a text, retrieval in long texts",
    "models": "list the known models, and which are cached",
    "bench": "measure the speed of loading, prefill and decoding",
    "tokenizer": "encode and decode text, or train a vocabulary",
    "completion": "print a script that completes arguments in a shell",
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
      argv: the arguments after `llama-jax`; None takes them from `sys.argv`, and ends the process after them.

    Returns:
      The exit status, see `exit_status`.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    return exit_status(lambda: _run(arguments), ends_process=argv is None)


def _run(argv: list[str]) -> None:
    from importlib import metadata

    from llama_jax.console.parser import UsageError, suggestion

    name, *rest = argv or ["--help"]
    if name == "help" and rest and rest[0] in SUBCOMMANDS:
        name, *topic = rest
        rest = ["--help", *topic] if name == "train" else [*topic, "--help"]
    if name in ("--version", "-V", "-v", "version"):
        print(f"llama-jax {metadata.version('llama-jax')}")
    elif name in ("-h", "--help", "help"):
        commands = "\n".join(f"  {command:<11}{summary}" for command, summary in SUBCOMMANDS.items())
        print(HELP.format(commands=commands), end="")
    elif name in SUBCOMMANDS:
        importlib.import_module(f"llama_jax.cli.{name}").run(rest)
    else:
        kind = "option" if name.startswith("-") else "command"
        hint = suggestion(name, ("--version", "--help") if kind == "option" else (*SUBCOMMANDS, "version"))
        raise UsageError(f"unknown {kind} {name!r}{hint}; the commands are {', '.join(SUBCOMMANDS)}")
