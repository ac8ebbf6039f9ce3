"""What the processes of a run tell each other outside the training step: a key-value store, and agreements.

No method is a collective on the devices: the step's own collectives are the only ones, so that the host can
dispatch steps ahead of the devices.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax._src.distributed import global_state  # private: tests/test_private_seams.py

ENDED = "llama_jax/ended/"  # how each process that has ended did so
_EVENTS = "llama_jax/events/"
_POLL_SECONDS = 0.02  # while this process waits for the others' counts


class Store(Protocol):
    """A small key-value store that all processes share."""

    def set(self, key: str, value: str) -> None:
        """Sets a key that has no value yet; the first value stays."""

    def read(self, prefix: str) -> dict[str, str]:
        """The values of all keys with a prefix, by the rest of the key; empty if the store has gone."""


class KeyValueStore:
    """That of JAX's coordination service, which process 0 hosts."""

    def __init__(self) -> None:
        self._client: Any = global_state.client

    def set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception):  # it has a value; or the service has gone
            self._client.key_value_set(key, value)

    def read(self, prefix: str) -> dict[str, str]:
        with contextlib.suppress(Exception):  # the service may be gone
            return {key[len(prefix) :]: value for key, value in self._client.key_value_dir_get(prefix)}
        return {}


def process() -> tuple[int, int]:
    """The index of this process and their number, without JAX's backend, which waits for all of them."""
    return global_state.process_id, global_state.num_processes


class Agreement:
    """Events that any process requests, and all processes act on between the same two steps.

    Each process counts its calls of `poll`. A background thread that finds an event in the store publishes
    this process's count, and holds up its next `poll` until all counts are known; the event is due at the
    first call that no process has begun. So `poll` waits only when there is an event, for the time that the
    others' threads take to notice it.

    Args:
      store: shared by the processes; None for a single one.
      index, count: of this process, and the number of processes.
    """

    def __init__(self, store: Store | None = None, index: int = 0, count: int = 1) -> None:
        self._store, self._index, self._count = store, index, count
        self._lock = threading.Lock()
        self._polls = 0
        self._requested: list[str] = []  # by this process, not agreed on yet
        self._next_event = 0
        self._due: list[tuple[int, str]] = []  # the call of `poll`, the event
        self.wake = threading.Event()  # set by `request`: `exchange` has something to do

    @staticmethod
    def of_run() -> Agreement:
        """Of the processes that `jax.distributed` has joined."""
        if not jax.distributed.is_initialized():
            return Agreement()
        return Agreement(KeyValueStore(), *process())

    def request(self, event: str) -> None:
        """Asks for an event, once until it is agreed on; from any thread."""
        if self._store is None:
            if (0, event) not in self._due:
                self._due.append((0, event))
        elif event not in self._requested:
            self._requested.append(event)
            self.wake.set()

    def poll(self) -> list[str]:
        """The events that are due now; every process must call it equally often."""
        with self._lock:
            self._polls += 1
            events = [event for due, event in self._due if due <= self._polls]
            self._due = [entry for entry in self._due if entry[0] > self._polls]
            return events

    def meet(self, place: str) -> None:
        """Waits for all processes; for no longer than the watchdog lets it.

        Gloo gives a process 30 s to appear at its first collective with another, and one may compile for
        longer than that while another finds its program in the compilation cache.
        """
        if self._store is None:
            return
        prefix = f"llama_jax/met/{place}/"
        self._store.set(f"{prefix}{self._index}", "")
        while len(self._store.read(prefix)) < self._count:
            time.sleep(_POLL_SECONDS)

    def exchange(self, check: Callable[[], bool] = lambda: True) -> None:
        """Publishes requests and agrees on events, in the background thread.

        Args:
          check: called while others are waited for; False gives up.
        """
        self.wake.clear()
        while self._exchange_one(check):
            pass

    def _exchange_one(self, check: Callable[[], bool]) -> bool:
        """Agrees on the next event; whether there is one."""
        if self._store is None:
            return False
        prefix = f"{_EVENTS}{self._next_event}/"
        if self._requested:
            self._store.set(f"{prefix}event", self._requested[0])  # unless another was faster
        event = self._store.read(prefix).get("event")
        if event is None:
            return False
        with self._lock:
            self._store.set(f"{prefix}count/{self._index}", str(self._polls))
            last = self._last_count(f"{prefix}count/", check)
            if last is not None:
                self._due.append((last + 1, event))
        self._next_event += 1
        if event in self._requested:
            self._requested.remove(event)
        return last is not None

    def _last_count(self, prefix: str, check: Callable[[], bool]) -> int | None:
        """The greatest of all processes' counts; None if one has ended: it will not poll again."""
        assert self._store is not None
        while check():
            counts = self._store.read(prefix)
            if len(counts) == self._count:
                return max(map(int, counts.values()))
            if self._store.read(ENDED):
                return None
            time.sleep(_POLL_SECONDS)
        return None
