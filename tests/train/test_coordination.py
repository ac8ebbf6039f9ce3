"""Agreements between processes, over a store in memory and with threads in place of processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.train.coordination import ENDED, Agreement
from llama_jax.train.peers import crash_status
from llama_jax.train.signals import FAILED, Interrupts


class MemoryStore:
    """As JAX's: the first value of a key stays."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self.values.setdefault(key, value)

    def read(self, prefix: str) -> dict[str, str]:
        with self._lock:
            return {key[len(prefix) :]: x for key, x in self.values.items() if key.startswith(prefix)}


class Processes:
    """Agreements of several processes, each with its background thread."""

    def __init__(self, count: int) -> None:
        self.store = MemoryStore()
        self.agreements = [Agreement(self.store, index, count) for index in range(count)]
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(each,)) for each in self.agreements]

    def __enter__(self) -> Processes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, agreement: Agreement) -> None:
        while not self._ended.is_set():
            agreement.exchange(lambda: not self._ended.is_set())
            agreement.wake.wait(0.001)


def run_all(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(2, 4),
    requests=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.sampled_from("abc")), max_size=4),
)
def test_every_process_sees_every_event_at_the_same_call(count, requests):
    """However far one is ahead of another, and whatever several request at once."""
    seen: list[list[tuple[int, str]]] = [[] for _ in range(count)]
    asked = {event for index, _, event in requests if index < count}
    with Processes(count) as processes:

        def loop(index: int) -> None:
            agreement, call = processes.agreements[index], 0
            while call < 40 or {event for _, event in seen[index]} != asked:
                for who, at, event in requests:
                    if (who, at) == (index, call):
                        agreement.request(event)
                call += 1
                seen[index] += [(call, event) for event in agreement.poll()]
                assert call < 1_000_000

        run_all([lambda index=index: loop(index) for index in range(count)])
    assert all(events == seen[0] for events in seen)


def test_a_call_without_an_event_asks_nothing_of_the_store():
    """No round trip, let alone a collective, between two steps."""

    class Silent(MemoryStore):
        def read(self, prefix: str) -> dict[str, str]:
            raise AssertionError(prefix)

    agreement = Agreement(Silent(), 0, 2)
    assert [agreement.poll() for _ in range(5)] == [[]] * 5


def test_processes_meet():
    with Processes(3) as processes:
        met: list[int] = []

        def go(index: int) -> None:
            processes.agreements[index].meet("here")
            met.append(len(processes.store.read("llama_jax/met/here/")))

        run_all([lambda index=index: go(index) for index in range(3)])
        assert met == [3, 3, 3]
    Agreement().meet("alone")


def test_a_process_that_has_ended_is_not_waited_for():
    with Processes(2) as processes:
        processes.store.set(f"{ENDED}1", "{}")
        other = processes.agreements[1]
        other.exchange = lambda check: None  # type: ignore[method-assign]  # its thread has ended
        processes.agreements[0].request("stop 15")
        while not processes.store.read("llama_jax/events/0/count/0"):
            pass
        assert processes.agreements[0].poll() == []


def test_all_processes_return_the_signal_of_one_and_go_on_to():
    with Processes(2) as processes:
        interrupts = [Interrupts(agreement) for agreement in processes.agreements]
        interrupts[1]._handle(signal.SIGTERM)
        calls: list[list[int]] = [[], []]

        def loop(index: int) -> None:
            while not (calls[index] and calls[index][-1]):
                calls[index].append(interrupts[index].agreed_stop())

        run_all([lambda: loop(0), lambda: loop(1)])
        assert calls[0] == calls[1]
        assert calls[0][-1] == interrupts[0].agreed_stop() == signal.SIGTERM


@pytest.mark.parametrize("ask", [Interrupts.ask_to_save, Interrupts.fail])
def test_a_single_process_agrees_with_itself(ask):
    interrupts = Interrupts()
    assert interrupts.agreed_stop() == 0 and not interrupts.save_is_due
    ask(interrupts)
    ask(interrupts)
    stop = interrupts.agreed_stop()
    assert (stop, interrupts.save_is_due) == ((0, True) if ask == Interrupts.ask_to_save else (FAILED, False))
    assert interrupts.agreed_stop() == stop and not interrupts.save_is_due


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: device halted"), 197),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), 197),
        (jax.errors.JaxRuntimeError("FAILED_PRECONDITION: a program"), None),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), None),
        (ValueError("a bug"), None),
    ],
)
def test_errors_of_devices_and_connections_are_worth_another_start(error, status):
    assert crash_status(error) == status
