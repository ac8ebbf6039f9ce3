"""Runs a program and turns its exceptions into one-line errors and exit statuses, without tracebacks."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from llama_jax.console import ctrl_c
from llama_jax.errors import ExitStatus, LlamaJaxError, StorageError

# The disk, the file server or the mount is at fault, not the file: it may be read later.
_MAY_PASS = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOTCONN", "EHOSTDOWN")
    if hasattr(errno, name)
}
OUT_OF_MEMORY_HINT = (
    "use a smaller batch (in training: a higher train.gradient_accumulation_steps), a shorter length or "
    "bfloat16"
)


def exit_status(program: Callable[[], None], *, ends_process: bool = False) -> int:
    """Runs `program`, reports its errors on stderr, and returns the exit status.

    Args:
      program: the program.
      ends_process: whether the process ends with it. Then it ends here after Ctrl-C, since XLA's destructors
        may crash after an interrupted compilation; and at once, if Ctrl-C comes later.

    Returns:
      0 on success; an `ExitStatus`, such as 2 for bad input, after one line `error: ...` on stderr; 130 after
      Ctrl-C; 141 if the reader of stdout, or of stderr, closed the pipe (SIGPIPE); the argument of `sys.exit`
      if `program` called it.
    """
    if sys.stdout is None or sys.stderr is None:  # the caller closed them
        devnull = Path(os.devnull).open("w")  # noqa: SIM115  # open for the life of the process
        sys.stdout, sys.stderr = sys.stdout or devnull, sys.stderr or devnull
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of failing
    try:
        with ctrl_c.deferred():
            program()
            sys.stdout.flush()
        status = 0
    except SystemExit as stop:  # argparse raises it after printing help
        status = int(stop.code or 0)
    except BaseException as error:
        if _interrupted(error):
            _end_line(ends_process)
            return ctrl_c.STATUS
        reported = report_exception(error)
        if reported is None:
            raise
        status = reported
    for stream in (sys.stdout, sys.stderr):
        _discard_unwritable(stream)
    if ends_process:
        ctrl_c.exit_from_now_on()
    return status


def _end_line(ends_process: bool) -> None:
    """Ends the line that Ctrl-C was pressed in; and the process, if it ends now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.write("\n" * (stream is sys.stderr))
            stream.flush()
        _discard_unwritable(stream)
    if ends_process:
        os._exit(ctrl_c.STATUS)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused this error, or came before it: a library may raise another in its place."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def report_exception(error: BaseException) -> int | None:
    """Prints the line of an error that has one; returns the exit status, or None for all other errors."""
    if isinstance(error, LlamaJaxError):
        report_error(str(error))
        return ExitStatus.STORAGE if _may_pass(error) else error.exit_status
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError):
        status = report_error(_os_error(error))
        return ExitStatus.STORAGE if _may_pass(error) else status
    if isinstance(error, MemoryError):
        return report_error(f"not enough memory: {error}; {OUT_OF_MEMORY_HINT}")
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):  # XLA's out-of-memory status
        return report_error(f"not enough memory: {str(error)[:200]}; {OUT_OF_MEMORY_HINT}")
    return None


def _may_pass(error: BaseException | None) -> bool:
    """Whether this error, or the one that it was raised for, is the storage's, and not for good."""
    while error is not None:
        if isinstance(error, StorageError):
            return error.transient
        if isinstance(error, OSError) and error.errno in _MAY_PASS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _os_error(error: OSError) -> str:
    """The message of an error that no reader or writer of files has given one."""
    reason = error.strerror or str(error)
    if isinstance(error.filename, str | bytes):
        return (
            f"{os.fsdecode(error.filename)}: {reason}; check the path, its permissions and the disk's space"
        )
    try:
        Path.cwd()
    except OSError:
        return "the current directory no longer exists; change to another one"
    return f"cannot write the output: {reason}; write it elsewhere"


def report_error(message: str) -> int:
    """Prints one line `error: ...` on stderr, and returns the exit status for bad input."""
    with contextlib.suppress(OSError):  # the device of stderr may be full
        line = " ".join(message.split())
        # Paths and names from files may contain terminal escape sequences.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        print("error:", line, file=sys.stderr)
    return ExitStatus.BAD_INPUT


def _discard_unwritable(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to the null device: Python flushes it once more at exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
