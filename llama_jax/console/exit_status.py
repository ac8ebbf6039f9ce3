"""Runs a program and turns its exceptions into one-line errors and exit statuses, without tracebacks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import LlamaJaxError

OUT_OF_MEMORY_HINT = "use a smaller batch, a shorter length or --dtype bfloat16"


def exit_status(program: Callable[[], None]) -> int:
    """Runs `program`, reports its errors on stderr, and returns the exit status.

    Returns:
      0 on success; 2 for bad input, after one line `error: ...` on stderr; 130 after Ctrl-C; 141 if the
      reader of stdout closed the pipe (SIGPIPE); the argument of `sys.exit` if `program` called it.
    """
    if sys.stdout is None or sys.stderr is None:  # the caller closed them
        devnull = Path(os.devnull).open("w")  # noqa: SIM115  # open for the life of the process
        sys.stdout, sys.stderr = sys.stdout or devnull, sys.stderr or devnull
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        program()
        sys.stdout.flush()
    except LlamaJaxError as error:
        return report_error(str(error))
    except SystemExit as stop:  # argparse raises it after printing help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_stdout()
        return 141
    except OSError as error:  # reading a file raises a LlamaJaxError, so this is stdout
        _discard_stdout()
        return report_error(f"cannot write the output: {error.strerror or error}; write it elsewhere")
    except MemoryError as error:
        return report_error(f"not enough memory: {error}; {OUT_OF_MEMORY_HINT}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's out-of-memory status
            raise
        return report_error(f"not enough memory: {str(error)[:200]}; {OUT_OF_MEMORY_HINT}")
    return 0


def report_error(message: str) -> int:
    """Prints one line `error: ...` on stderr, and returns the exit status for bad input."""
    with contextlib.suppress(OSError):  # the device of stderr may be full
        line = " ".join(message.split())
        # Paths and names from files may contain terminal escape sequences.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        print("error:", line, file=sys.stderr)
    return 2


def _discard_stdout() -> None:
    """Redirects stdout to the null device, because Python flushes its buffer once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
