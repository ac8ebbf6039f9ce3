"""The command `llama-jax`: one module for each verb, each a thin shell over the library.

Only the chosen verb is imported, so help and usage errors do not wait for JAX.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from llama_jax.cli.parser import UsageError, suggestion
from llama_jax.errors import LlamaJaxError

# Each verb's module has run(argv), which parses the rest of the command line and does the work.
VERBS = {
    "generate": "continue a text",
    "inspect": "what a checkpoint holds and how much memory it needs",
    "models": "the known models, and which are here",
    "bench": "speed of prefill, decoding and loading",
    "tokenizer": "text to token ids and back",
}

HELP = """\
usage: llama-jax COMMAND [arguments]

Llama 2 in JAX: load real weights, check them, generate.

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
      The exit status: 0, 2 for bad input (with one line `error: ...` on stderr), 130 when interrupted,
      141 when the reader of stdout went away.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except LlamaJaxError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse, after printing help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


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
