"""A lock that prevents two runs from using the same directory.

On a disk it is a POSIX record lock on RUN/lock: the kernel releases it when the process ends for any reason,
data workers that outlive it do not inherit it, and NFS servers forward it. On a file system without locks the
run continues without one, with a warning. In an object store it is an object: see store_lock.py.
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
from llama_jax.storage import StorePath, as_path

from .store_lock import store_lock

LOCK_FILE = "lock"
_MAX_OWNER_BYTES = 1000  # bytes read of the lock file, which describes the owner
# Locks of this process: the kernel would let it lock a file twice, and release both locks with one.
_held: set[Path] = set()


def run_directory(path: str) -> Path:
    """Returns the path of a run's directory.

    Raises:
      InputError: for a path in which Orbax would save a checkpoint that cannot be read: its glob takes [ ]
        for a pattern, and TensorStore a backslash for a separator. For an unknown user, or bytes that are no
        text.
    """
    try:
        found = as_path(path).expanduser()
        whole = str(found.absolute())
        whole.encode()
    except RuntimeError as error:  # an unknown user
        raise InputError(f"train.run_dir {path!r}: {error}; give the absolute path") from None
    except UnicodeEncodeError:
        raise InputError(f"train.run_dir {path!r} is not UTF-8; give another path") from None
    if bad := next((character for character in "[]\\" if character in whole), None):
        raise InputError(
            f"train.run_dir {whole!r} has {bad!r} in it, with which checkpoints cannot be read again; give a "
            "path without [, ] and \\"
        )
    return found


@contextlib.contextmanager
def run_lock(run_dir: str | Path, *, warn: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Locks a run's directory for this process, and creates it if it does not exist.

    Only process 0 of a run takes the lock. A directory with nothing else in it at the end is removed.

    Args:
      run_dir: the run's directory.
      warn: called with a message if the file system has no locks.

    Raises:
      InputError: if another run has the lock, naming its process, or the directory cannot be written.
    """
    path = as_path(run_dir).expanduser().absolute() / LOCK_FILE
    if path in _held:
        raise InputError(f"{path.parent}: this process already trains there; choose another train.run_dir")
    if isinstance(path, StorePath):
        with store_lock(path, _describe_owner(), warn):
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)
        return
    descriptor = _open_locked(path, warn)
    try:
        _held.add(path)
        _write(descriptor, _describe_owner())
        yield
        _write(descriptor, b"")
    finally:
        _held.discard(path)
        _remove_if_alone(path)
        os.close(descriptor)


def _open_locked(path: Path, warn: Callable[[str], None]) -> int:
    """Opens and locks the file; again if another process has removed it in between."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(
                f"{path.parent}: cannot be written: {reason}; choose another train.run_dir"
            ) from None
        try:
            _lock(path, descriptor, warn)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_if_alone(path: Path) -> None:
    """Removes a directory in which there is nothing but the lock, which this process holds."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in path.parent.iterdir()] == [path.name]:
            path.unlink()
            path.parent.rmdir()


def _lock(path: Path, descriptor: int, warn: Callable[[str], None]) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(
                f"{path} cannot be locked ({error.strerror}): make sure that no other run uses {path.parent}"
            )
            return
        raise InputError(
            f"{path.parent}: in use by another run: {_read_owner(descriptor)}; wait for that run, stop it, "
            "or choose another train.run_dir"
        ) from None


def _describe_owner() -> bytes:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _read_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, _MAX_OWNER_BYTES, 0))
        text = f"process {int(owner['pid'])} on {owner['host']!s:.100}, since {owner['since']!s:.40}"
        return " ".join(text.split())
    except (ValueError, TypeError, KeyError):  # it is starting, or another program
        return "an unknown process"


def _write(descriptor: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # on a full disk: the lock holds without a description
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
