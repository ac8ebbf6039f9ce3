"""Precomputed log-probabilities of a reference model: computed once for every record, cached in the run.

The file is a line of a fingerprint and a SHA-256, then f32 [records, 2] in the order of the data's records:
log p_ref of the answers in a record's two segments, NaN where a record cannot be used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress

from llama_jax import LlamaConfig, sharding
from llama_jax.errors import DataError
from llama_jax.storage.atomic import write_atomically

from ..config.run import RunConfig
from ..data import Data
from ..devices import compute_dtype
from ..feed import Feed
from ..trainable import TrainableSpec
from .preference import answer_logprobs

REFERENCE_FILE = "reference.f32"


def reference_logprobs(
    run: RunConfig,
    run_dir: Path,
    model: LlamaConfig,
    platform: str,
    data: Data,
    feed: Feed,
    trainable_spec: TrainableSpec,
    *,
    base: str | None,
    initial_params: Callable[[], Any],
    stop: Callable[[], int],
    log: Callable[[str], None],
) -> np.ndarray | None:
    """Reads the cached log-probabilities, or computes them; every process gets the same array.

    A file that is damaged, or that was computed from other data, weights or settings, is replaced: the values
    are those that the reference model would give if it ran in each step.

    Args:
      run, model, platform, data, feed, trainable_spec: of the run.
      run_dir: its directory.
      base: the fingerprint of the initial weights; None if they are random.
      initial_params: returns the initial parameters; called only if something has to be computed.
      stop: returns the signal that asked any process to stop, or 0; every process calls it.
      log: called with status messages.

    Returns:
      f32 [records, 2], the argument of `Data.with_reference`; None if it was stopped: nothing is saved then.

    Raises:
      DataError: if a record cannot be read, or an answer's log-probability is not finite.
      InputError: if the file cannot be written.
    """
    is_primary, path, fingerprint, table = jax.process_index() == 0, run_dir / REFERENCE_FILE, "", None
    if is_primary:
        fingerprint = _fingerprint(run, model, platform, data, trainable_spec, base)
        table = _read(path, fingerprint, data.records, log)
    table = _broadcast(table, data.records)
    if table is not None:
        return table
    what = "examples" if run.train.objective == "kto" else "pairs"
    log(f"reference: computing the log-probabilities of {data.records} {what} once, into {path}")
    table = _compute(run, model, platform, data, feed, initial_params(), stop)
    if is_primary and table is not None:
        write_atomically(path, _encode(fingerprint, table))
    return table


def _compute(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    data: Data,
    feed: Feed,
    params: Any,
    stop: Callable[[], int],
) -> np.ndarray | None:
    logprobs_fn = answer_logprobs(model, run.train, platform)

    @jax.jit
    def replicated(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Places and log-probabilities, replicated: every process fills the whole table."""
        places, logprobs = batch["place"], logprobs_fn(params, batch)
        return sharding.constrain(places, P(None, None)), sharding.constrain(logprobs, P(None, None))

    table = np.full((data.records, 2), np.nan, np.float32)
    console = Console(stderr=True)
    hidden = jax.process_index() > 0 or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("reference", total=data.records)
        for batch in data.pairs():
            if stop():
                return None
            places, logprobs = map(np.asarray, replicated(params, feed.put(batch)))
            is_answer = places > 0
            indices, values = places[is_answer] - 1, logprobs[is_answer]
            table.reshape(-1)[indices] = values
            if not (finite := np.isfinite(values)).all():
                record = int(indices[~finite].min()) // 2
                raise DataError(
                    f"{data.location(record)}: the reference model gives an answer the log-probability "
                    f"{values[~finite][0]}; check model.init_from, or set "
                    'train.dtype = "float32"'
                )
            bar.update(task, completed=int(indices.max()) // 2 + 1)
    return table


def _fingerprint(
    run: RunConfig,
    model: LlamaConfig,
    platform: str,
    data: Data,
    trainable_spec: TrainableSpec,
    base: str | None,
) -> str:
    """A hash of everything that determines the values: pairs, initial weights, base and compute dtypes."""
    dtypes = [
        compute_dtype(run.train, platform).name,
        trainable_spec.adapter is not None and trainable_spec.base,
    ]
    weights = run.train.seed if base is None else base
    inputs = [data.pairs_fingerprint, dataclasses.asdict(model), dtypes, weights]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def _encode(fingerprint: str, table: np.ndarray) -> bytes:
    values = table.astype("<f4").tobytes()
    return f"{fingerprint} {hashlib.sha256(values).hexdigest()}\n".encode() + values


def _read(path: Path, fingerprint: str, records: int, log: Callable[[str], None]) -> np.ndarray | None:
    """The table in a file; None if it is missing, or not what `_encode` wrote for these records."""
    empty = np.zeros((records, 2), np.float32)
    start = len(_encode(fingerprint, empty)) - empty.nbytes
    try:
        if path.stat().st_size == start + empty.nbytes:
            content = path.read_bytes()
            table = np.frombuffer(content[start:], "<f4").reshape(records, 2).astype(np.float32)
            if content == _encode(fingerprint, table):
                return table
    except FileNotFoundError:
        return None
    except OSError as error:
        log(f"{path} cannot be read ({error.strerror}); computing it again")
        return None
    log(f"{path} is damaged, or was computed from other data, weights or settings; computing it again")
    return None


def _broadcast(table: np.ndarray | None, records: int) -> np.ndarray | None:
    """Process 0's table, in every process."""
    if jax.process_count() == 1:
        return table
    if not multihost_utils.broadcast_one_to_all(np.bool_(table is not None)):
        return None
    return np.asarray(
        multihost_utils.broadcast_one_to_all(np.zeros((records, 2), np.float32) if table is None else table)
    )
