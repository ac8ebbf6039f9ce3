"""The reference model's log-probabilities: computed once, of every pair, and kept with the run.

The file is a line of a fingerprint and a SHA-256, then f32 [records, 2] in the order of the data's records:
log p_ref of the chosen and of the rejected answer, NaN where a record is no usable pair.
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
from llama_jax.text.pretrained import open_model
from llama_jax.weights.adapters import adapter_folder

from ..checkpoints.atomic_write import write_whole
from ..config.run import RunConfig
from ..data import Data
from ..data.files import File, sampled_digest
from ..devices import compute_dtype
from ..feed import Feed
from ..trainable import Tuning
from .objective import answer_logprobs

NAME = "reference.f32"


def reference_logprobs(
    run: RunConfig,
    run_dir: Path,
    model: LlamaConfig,
    platform: str,
    data: Data,
    feed: Feed,
    tuning: Tuning,
    *,
    beginning: Callable[[], Any],
    stop: Callable[[], int],
    say: Callable[[str], None],
) -> np.ndarray | None:
    """Reads what an earlier launch of the run computed, or computes it; every process gets the same.

    A file that is damaged, or of other data, weights or settings, is replaced: what counts is what the model
    gives that the run would compare with if it computed as it went.

    Args:
      run, model, platform, data, feed, tuning: of the run.
      run_dir: its directory.
      beginning: gives the parameters that training began with; called only where there is work for them.
      stop: the signal that any process was asked to stop by, or 0; all processes call it.
      say: called with a line about what takes time.

    Returns:
      f32 [records, 2], what `Data.with_reference` takes; None if it was stopped, of which nothing is kept.

    Raises:
      DataError: if a record cannot be read, or the model gives an answer no finite number.
      InputError: if the file cannot be written.
    """
    first, path, known, table = jax.process_index() == 0, run_dir / NAME, "", None
    if first:
        known = _fingerprint(run, model, platform, data, tuning)
        table = _read(path, known, data.records, say)
    table = _agreed(table, data.records)
    if table is not None:
        return table
    say(f"reference: the log-probabilities of {data.records} pairs, once, into {path}")
    table = _compute(run, model, platform, data, feed, beginning(), stop)
    if first and table is not None:
        write_whole(path, _encoded(known, table))
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
    answers = answer_logprobs(model, run.train, platform)

    @jax.jit
    def placed(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Both whole in every process: which rows are whose is the mesh's business."""
        return tuple(sharding.constrain(x, P(None, None)) for x in (batch["place"], answers(params, batch)))  # type: ignore[return-value]

    table = np.full((data.records, 2), np.nan, np.float32)
    console = Console(stderr=True)
    hidden = jax.process_index() > 0 or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("reference", total=data.records)
        for batch in data.pairs():
            if stop():
                return None
            place, found = map(np.asarray, placed(params, feed.put(batch)))
            here = place > 0
            at = place[here] - 1
            table.reshape(-1)[at] = found[here]
            if not (finite := np.isfinite(found[here])).all():
                record = int(at[~finite].min()) // 2
                raise DataError(
                    f"{data.where(record)}: the model that training begins with gives an answer the "
                    f"log-probability {found[here][~finite][0]}; look at model.init_from, or set "
                    'train.dtype = "float32"'
                )
            bar.update(task, completed=int(at.max()) // 2 + 1)
    return table


def _fingerprint(run: RunConfig, model: LlamaConfig, platform: str, data: Data, tuning: Tuning) -> str:
    """A hash of what decides the numbers: pairs, initial weights, and what they are held and computed in.

    Of the weights' files sizes and samples are hashed.
    """
    digest = hashlib.blake2b(digest_size=16)
    computed = [compute_dtype(run.train, platform).name, tuning.adapter is not None and tuning.base]
    said = [data.pairs_fingerprint, dataclasses.asdict(model), computed, run.train.seed]
    digest.update(json.dumps(said[:3] if run.model.init_from else said).encode())
    if run.model.init_from:
        opened = open_model(run.model.init_from)
        held = {info.file for info in opened.source.tensors.values()}
        for file in [*sorted(held), *map(adapter_folder, opened.adapters)]:
            for part in sorted(file.rglob("*")) if file.is_dir() else [file]:
                if part.is_file():
                    info = part.stat()
                    digest.update(sampled_digest(File(str(part), part.name, info.st_size, info.st_mtime_ns)))
    return digest.hexdigest()


def _encoded(fingerprint: str, table: np.ndarray) -> bytes:
    numbers = table.astype("<f4").tobytes()
    return f"{fingerprint} {hashlib.sha256(numbers).hexdigest()}\n".encode() + numbers


def _read(path: Path, fingerprint: str, records: int, say: Callable[[str], None]) -> np.ndarray | None:
    """What a file holds, or None where it is not there or not what `_encoded` made of these records."""
    empty = np.zeros((records, 2), np.float32)
    start = len(_encoded(fingerprint, empty)) - empty.nbytes
    try:
        if path.stat().st_size == start + empty.nbytes:
            content = path.read_bytes()
            table = np.frombuffer(content[start:], "<f4").reshape(records, 2).astype(np.float32)
            if content == _encoded(fingerprint, table):
                return table
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"{path} cannot be read ({error.strerror}): it is computed again")
        return None
    say(f"{path} is damaged, or of other data, weights or settings: it is computed again")
    return None


def _agreed(table: np.ndarray | None, records: int) -> np.ndarray | None:
    """What the first process has, in every process."""
    if jax.process_count() == 1:
        return table
    if not multihost_utils.broadcast_one_to_all(np.bool_(table is not None)):
        return None
    return np.asarray(
        multihost_utils.broadcast_one_to_all(np.zeros((records, 2), np.float32) if table is None else table)
    )
