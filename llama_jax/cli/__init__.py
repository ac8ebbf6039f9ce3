"""The command `llama-jax`: one module for each verb, each a thin shell over the library.

Only the chosen verb is imported, so help and usage errors do not wait for JAX.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from llama_jax.console.exit_status import exit_status
from llama_jax.console.parser import UsageError, suggestion

# Each verb's module has run(argv), which parses the rest of the command line and does the work.
VERBS = {
    "generate": "continue a text",
    "chat": "talk with a model",
    "train": "train a model, or go on with a run",
    "inspect": "what a checkpoint holds and how much memory it needs",
    "convert": "a checkpoint in another format",
    "verify": "whether two checkpoints hold the same model",
    "models": "the known models, and which are here",
    "bench": "speed of prefill, decoding and loading",
    "tokenizer": "text to token ids and back",
}

HELP = """\
usage: llama-jax COMMAND [arguments]

Llama 2 in JAX: load real weights, check them, generate; train from scratch.

commands:
{commands}

Each has its own help: llama-jax COMMAND --help

examples:
  llama-jax models
  llama-jax generate smollm2-135m --prompt "The capital of France is"
  llama-jax inspect smollm2-135m
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
      argv: the words after `llama-jax`; None means those of this process.

    Returns:
      The exit status, as `exit_status` has it.
    """
    return exit_status(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> None:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<11}{does}" for name, does in VERBS.items())), end="")
    elif verb in VERBS:
        importlib.import_module(f"llama_jax.cli.{verb}").run(rest)
    else:
        what = "option" if verb.startswith("-") else "command"
        close = suggestion(verb, VERBS)
        raise UsageError(f"unknown {what} {verb!r}{close}; the commands are {', '.join(VERBS)}")
