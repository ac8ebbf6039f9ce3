"""The batches that a process trains on, made ahead of it, and where they have got to."""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from llama_jax.errors import DataError

from .lanes import LaneBatches, State

AHEAD = 4  # batches that wait ready
Batch = dict[str, np.ndarray]
Make = Callable[[range, Mapping[str, State] | None], LaneBatches]


class Batches(Iterator[Batch]):
    """An endless iterator of this process's rows of the global batches.

    Batches are made ahead in a thread, from which worker processes are fed, if there are any. Close it
    to stop them.

    Attributes:
      skipped: bad records passed over since the run began, by reason, on this process's lanes.
    """

    def __init__(self, lanes: range, lane_count: int, workers: int, make: Make):
        """See `Data.train`.

        Args:
          lanes: this process's rows of the global batch.
          lane_count: the rows of the global batch.
          workers: how many processes may read and tokenize.
          make: returns the LaneBatches of `lanes` that go on from given states.
        """
        self._lanes = lanes
        self._lane_count = lane_count
        self._workers = max((w for w in range(1, workers + 1) if len(lanes) % w == 0), default=0)
        self._make = make
        self._start(None)

    def _start(self, states: Mapping[str, State] | None) -> None:
        source: LaneBatches = self._make(self._lanes, states)
        self._states: dict[str, State] = dict(states) if states is not None else iter(source).get_state()
        steps: grain.IterDataset = source
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain asks absl for its own, which nobody gave
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=AHEAD)
            steps = source.mp_prefetch(options, worker_init_fn=_begin_worker)
            steps = steps.batch(self._workers, batch_fn=_interleave)
        self._ahead = [iter(ThreadPrefetchIterDataset(steps, prefetch_buffer_size=AHEAD))]
        self._close = weakref.finalize(self, _stop, self._ahead)  # at exit, too, while Grain still stands

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """Returns int32 [rows, seq_len] `tokens`, `segment_ids` (0 is padding) and `positions`.

        For every objective but pretraining also int32 `mask` and f32 `value`, and of pairs perhaps f32
        `reference`, as packing.py says.

        Raises:
          DataError: if a record or file cannot be read.
        """
        if not self._ahead:
            raise StopIteration
        try:
            batch = next(self._ahead[0])
        except DataError as error:
            raise DataError(str(error)) from None
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                f"a data worker process died ({' '.join(str(error).split())[:120]}); lower data.workers"
            ) from None
        self._states = json.loads(batch.pop("state"))
        return batch

    @property
    def skipped(self) -> dict[str, int]:
        total: collections.Counter[str] = collections.Counter()
        for state in self._states.values():
            total.update(state["parent_state"]["skipped"])
        return dict(total)

    def state(self) -> dict[str, Any]:
        """Returns, as JSON-able values, where the batches handed out so far have got to."""
        return {"batch_size": self._lane_count, "lanes": self._states}

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Goes on from where every process's `state()` says; there may have been more or fewer of them.

        Raises:
          DataError: if they are not the states of all rows of this batch size.
        """
        lanes: dict[str, State] = {}
        for state in states:
            if state["batch_size"] != self._lane_count:
                raise DataError(
                    f"the checkpoint's data state is of batch_size {state['batch_size']}, and the run's is "
                    f"{self._lane_count}; resume with the batch size that the run began with"
                )
            lanes.update(state["lanes"])
        missing = [lane for lane in self._lanes if str(lane) not in lanes]
        if missing:
            raise DataError(
                f"the checkpoint's data state lacks row {missing[0]} of the batch; restore with the states "
                "of every process of the run"
            )
        self.close()
        self._start({str(lane): lanes[str(lane)] for lane in self._lanes})

    def close(self) -> None:
        """Stops the thread and the worker processes; there are no batches afterwards."""
        self._close()


def _stop(ahead: list[grain.DatasetIterator]) -> None:
    with contextlib.suppress(RuntimeError):  # in its own thread, where the last reference may go: it ends
        ahead.pop().close()


def _interleave(parts: Any) -> dict[str, Any]:
    """Puts the rows of workers, who have every W-th each, back in order."""
    states: dict[str, State] = {}
    for part in parts:
        states.update(json.loads(part["state"]))
    names = [name for name in parts[0] if name != "state"]
    stacked = {name: np.stack([part[name] for part in parts], axis=1) for name in names}
    merged: dict[str, Any] = {name: x.reshape(-1, x.shape[-1]) for name, x in stacked.items()}
    return {**merged, "state": json.dumps(dict(sorted(states.items(), key=lambda item: int(item[0]))))}


def _begin_worker(worker: int, workers: int) -> None:
    """Makes a worker process live as long as its parent, and no longer."""
    del worker, workers
    import jax

    jax.config.update("jax_platforms", "cpu")  # Grain imports JAX, for its pytrees alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
