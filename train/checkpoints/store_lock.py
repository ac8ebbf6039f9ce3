"""The lock of a run whose directory is in an object store: an object that only one can create.

Nothing releases it when its owner is killed. So the owner writes it again every few seconds, each time over
its own version; another run that finds it watches it for a minute, and takes it over if it does not change.
No clocks are compared. An owner that finds another's lock in place of its own ends at once, writing nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from llama_jax.console.exit_status import report_error
from llama_jax.errors import InputError, StoreError
from llama_jax.storage import StorePath, writing

HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 60.0  # without a heartbeat
_POLL_SECONDS = 3.0
_READS = 3  # of a lock that is no JSON


@contextmanager
def store_lock(path: StorePath, owner: bytes, warn: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock during the block.

    Args:
      path: the lock.
      owner: describes this process, a JSON object with pid, host and since.
      warn: called with a message if a lock has to be waited for.

    Raises:
      InputError: if another run has the lock.
      StoreError: if the store fails.
    """
    lock = _Lock(path, {**json.loads(owner), "id": secrets.token_hex(8)})
    lock.take(warn)
    stop = threading.Event()
    beat = threading.Thread(target=lock.beat, args=(stop,), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with suppress(StoreError, OSError):
            lock.release()


class _Lock:
    def __init__(self, path: StorePath, owner: dict[str, object]) -> None:
        self.path, self.owner = path, owner
        self.version, self.count = "", 0

    def content(self) -> bytes:
        """What is written; the count makes each version another, also where that is a hash of the content."""
        self.count += 1
        return json.dumps({**self.owner, "count": self.count}).encode()

    def take(self, warn: Callable[[str], None]) -> None:
        version = writing.create(self.path, self.content())
        while version is None:
            try:
                found = self._wait_until_stale(warn)
            except FileNotFoundError:  # released meanwhile
                version = writing.create(self.path, self.content())
                continue
            version = writing.replace(self.path, self.content(), found)
        self.version = version

    def _wait_until_stale(self, warn: Callable[[str], None]) -> str:
        """Returns the version of a lock whose owner is gone.

        Raises:
          InputError: if its owner is alive.
          FileNotFoundError: if it has been released.
        """
        first, owner = self.path.info().version, self._read()
        if owner.get("host") == socket.gethostname() and not _is_alive(owner.get("pid")):
            return first
        name = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        warn(
            f"{self.path.parent} is locked by {name}; waiting up to {EXPIRY_SECONDS:.0f} s for a sign "
            "that it is running"
        )
        end = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < end:
            time.sleep(min(_POLL_SECONDS, EXPIRY_SECONDS))
            if self.path.info().version != first:
                raise InputError(
                    f"{self.path.parent}: in use by another run: {name}; wait for that run, stop it, or "
                    "choose another train.run_dir"
                )
        return first

    def _read(self) -> dict[str, object]:
        """The owner's description; empty if it is none."""
        for _ in range(_READS):
            with suppress(ValueError):  # read while it was written over, with a longer count
                owner = json.loads(self.path.read_bytes())
                return owner if isinstance(owner, dict) else {}
        return {}

    def beat(self, stop: threading.Event) -> None:
        """Writes the lock again and again until it is told to stop."""
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(StoreError):  # tried again; if the store is gone for long, a checkpoint fails
                version = writing.replace(self.path, self.content(), self.version)
                if version is None and not self._is_mine():
                    report_error(
                        f"{self.path.parent}: another run has taken this run's lock, which could not be "
                        f"renewed for over {EXPIRY_SECONDS:.0f} s; this one has stopped, without saving"
                    )
                    os._exit(InputError.exit_status)
                self.version = version or self.path.info().version

    def _is_mine(self) -> bool:
        """Whether the lock is this process's, as after a write whose answer was lost."""
        try:
            return self._read().get("id") == self.owner["id"]
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._is_mine():
            self.path.unlink(missing_ok=True)


def _is_alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
