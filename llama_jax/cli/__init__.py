"""The command `llama-jax`: one module for each verb, each a thin shell over the library.

Only the chosen verb is imported, so help and usage errors do not wait for JAX.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_jax.cli.parser import UsageError, suggestion
from llama_jax.errors import LlamaJaxError

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


LESS_MEMORY = "ask for less at once, or choose --dtype bfloat16"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
      argv: the words after `llama-jax`; None means those of this process.

    Returns:
      The exit status: 0, 2 for bad input (with one line `error: ...` on stderr), 130 when interrupted,
      141 when the reader of stdout went away.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by the caller: to nowhere, as it asked
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # open as long as the process lives
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except LlamaJaxError as error:
        return report(str(error))
    except SystemExit as stop:  # argparse, after printing help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:  # files that are read have errors of their own, so this is the output
        _drop_output()
        return report(f"cannot write the output: {error.strerror or error}; write it elsewhere")
    except MemoryError as error:
        return report(f"not enough memory: {error}; {LESS_MEMORY}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # as JAX calls it
            raise
        return report(f"not enough memory: {str(error)[:200]}; {LESS_MEMORY}")
    return 0


def report(reason: str) -> int:
    """Prints one line `error: ...` on stderr, and returns the exit status for bad input."""
    with contextlib.suppress(OSError):  # stderr may be full, too
        line = " ".join(reason.split())
        # Names in files and paths may hold anything, and a terminal would obey some of it.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        print("error:", line, file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Gives what stdout still holds somewhere to go: Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
