"""Keeps two runs out of one directory.

A POSIX record lock on RUN/lock: the kernel releases it when the process ends, however it ends, data workers
that outlive it hold nothing, and it works over NFS, where the server forwards it. On a file system without
locks the run goes on without one, and says so.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.errors import InputError

NAME = "lock"
_LONGEST = 1000  # bytes read of the file that says who holds it
_held: set[Path] = set()  # by this process: the kernel would let it lock twice, and unlock with either


@contextlib.contextmanager
def run_lock(run_dir: str | Path, *, warn: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds a run's directory for this process, making it where it is not there yet.

    Of several processes of one run, the first alone takes the lock.

    Args:
      run_dir: the run's directory.
      warn: called with a line if the file system has no locks.

    Raises:
      InputError: if another run holds it, saying which, or the directory cannot be written.
    """
    path = Path(run_dir).expanduser().absolute() / NAME
    if path in _held:
        raise InputError(f"{path.parent}: this process trains there already; choose another train.run_dir")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise InputError(f"{path.parent}: cannot be written: {why}; choose another train.run_dir") from None
    try:
        _take(path, descriptor, warn)
        _held.add(path)
        _write(descriptor, _myself())
        yield
        _write(descriptor, b"")
    finally:
        _held.discard(path)
        os.close(descriptor)


def _take(path: Path, descriptor: int, warn: Callable[[str], None]) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(
                f"{path} cannot be locked ({error.strerror}): see to it that no other run uses {path.parent}"
            )
            return
        raise InputError(
            f"{path.parent}: another run holds it: {_holder(descriptor)}; wait for that run, end it, or "
            "choose another train.run_dir"
        ) from None


def _myself() -> bytes:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _holder(descriptor: int) -> str:
    try:
        who = json.loads(os.pread(descriptor, _LONGEST, 0))
        words = f"process {int(who['pid'])} on {who['host']!s:.100}, since {who['since']!s:.40}"
        return " ".join(words.split())
    except (ValueError, TypeError, KeyError):  # it is just beginning, or not ours
        return "a process that has not said which"


def _write(descriptor: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without words
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
