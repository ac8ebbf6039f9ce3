"""The batches that a process trains on, prefetched, with their checkpointable state."""

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

PREFETCH = 4  # batches ready in advance
Batch = dict[str, np.ndarray]
MakeLaneBatches = Callable[[range, Mapping[str, State] | None], LaneBatches]


class Batches(Iterator[Batch]):
    """An infinite iterator of this process's rows of the global batches.

    A thread prefetches them, from worker processes if there are any. `close` stops both.

    Attributes:
      skipped: count of bad records skipped since the run started, by reason, on this process's lanes.
    """

    def __init__(self, lanes: range, lane_count: int, workers: int, make_lane_batches: MakeLaneBatches):
        """See `Data.train`.

        Args:
          lanes: this process's rows of the global batch.
          lane_count: number of rows of the global batch.
          workers: maximum number of processes that read and tokenize.
          make_lane_batches: returns the LaneBatches of `lanes`, starting from the given states.
        """
        self._lanes = lanes
        self._lane_count = lane_count
        self._workers = max((w for w in range(1, workers + 1) if len(lanes) % w == 0), default=0)
        self._make_lane_batches = make_lane_batches
        self._start(None)

    def _start(self, states: Mapping[str, State] | None) -> None:
        source: LaneBatches = self._make_lane_batches(self._lanes, states)
        self._states: dict[str, State] = dict(states) if states is not None else iter(source).get_state()
        steps: grain.IterDataset = source
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its absl flags, which nobody has parsed
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=PREFETCH)
            steps = source.mp_prefetch(options, worker_init_fn=init_worker)
            steps = steps.batch(self._workers, batch_fn=_interleave)
        self._prefetched = [iter(ThreadPrefetchIterDataset(steps, prefetch_buffer_size=PREFETCH))]
        self._close = weakref.finalize(
            self, _close_iterator, self._prefetched
        )  # also at exit, before Grain is torn down

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        """Returns int32 [rows, seq_len] `tokens`, `segment_ids` (0 is padding) and `positions`.

        Finetuning batches also have int32 `mask` and f32 `value`, and pairs with precomputed reference
        log-probabilities f32 `reference`; see `packing.packed_row`.

        Raises:
          DataError: if a record or file cannot be read.
        """
        if not self._prefetched:
            raise StopIteration
        try:
            batch = next(self._prefetched[0])
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
            total.update(state["parent_state"]["skipped"])  # private: tests/test_private_seams.py
        return dict(total)

    def state(self) -> dict[str, Any]:
        """Returns the position in the data after the batches returned so far, as JSON-serializable values."""
        return {"batch_size": self._lane_count, "lanes": self._states}

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Continues from the `state()` of every process; the number of processes may have changed.

        Raises:
          DataError: if they are not the states of all rows of this batch size.
        """
        lanes: dict[str, State] = {}
        for state in states:
            if state["batch_size"] != self._lane_count:
                raise DataError(
                    f"the checkpoint's data state is for batch size {state['batch_size']}, and the run's is "
                    f"{self._lane_count}; resume with the train.global_batch_size that the run started with"
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
        """Stops the thread and the worker processes; the iterator is exhausted afterwards."""
        self._close()


def _close_iterator(prefetched: list[grain.DatasetIterator]) -> None:
    with contextlib.suppress(
        RuntimeError
    ):  # raised when the last reference dies in the prefetch thread itself
        prefetched.pop().close()


def _interleave(parts: Any) -> dict[str, Any]:
    """Restores the row order: worker w of W has rows w, w + W, w + 2W, ..."""
    states: dict[str, State] = {}
    for part in parts:
        states.update(json.loads(part["state"]))
    names = [name for name in parts[0] if name != "state"]
    stacked = {name: np.stack([part[name] for part in parts], axis=1) for name in names}
    merged: dict[str, Any] = {name: x.reshape(-1, x.shape[-1]) for name, x in stacked.items()}
    return {**merged, "state": json.dumps(dict(sorted(states.items(), key=lambda item: int(item[0]))))}


def init_worker(worker: int, workers: int) -> None:
    """Ends a worker process when its parent ends."""
    del worker, workers
    import jax

    jax.config.update("jax_platforms", "cpu")  # Grain imports JAX for its pytrees
    # Ctrl-C signals the whole process group; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
