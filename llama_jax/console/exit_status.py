"""Runs a program so that a user's mistake is one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import LlamaJaxError

LESS_MEMORY = "ask for less at once, or choose --dtype bfloat16"


def exit_status(program: Callable[[], None]) -> int:
    """Runs `program` and reports what it raises.

    Returns:
      0; 2 for bad input, with one line `error: ...` on stderr; 130 after Ctrl-C; 141 if the reader of stdout
      has gone; what `program` gave to `sys.exit`.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by the caller: to nowhere, as it asked
        nowhere = Path(os.devnull).open("w")  # noqa: SIM115  # open as long as the process lives
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        program()
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
