"""Copies of the state on each host, more frequent than checkpoints: a restart loses fewer steps.

Each process writes the shards of its devices to a directory of its host, in memory or on a disk, and no host
writes to shared storage. After a restart each device gets its shard from its host's copy, or, where that host
was replaced, from the copy of a replica: over the interconnect, from a device at the same place of another
slice. A copy is used if all shards are found, on the mesh that saved them; else the run resumes from its
newest checkpoint.

Orbax's emergency CheckpointManager writes copies in all slices but the first, so that losing a host of the
second loses them, keeps neither data states nor checksums, and needs parsed absl flags.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.storage.atomic import write_atomically
from llama_jax.weights import digests

from .state_tree import from_named_leaves, named_leaves

_IDENTITY = (
    "local_copies.id"  # in the run's checkpoints: copies of an earlier run at the same place are not its
)
_RECORD = "record.json"
_KEPT = 2  # copies, besides the one that is being written


class LocalCopies:
    """The copies of a run on this process's host; every process calls the same methods in the same order.

    Args:
      local_dir: the directory of this host; hosts may share a file system, but need not.
      checkpoints: the directory of the run's checkpoints, shared by all processes.
      warn: called with a message if a copy cannot be written or used.
    """

    def __init__(self, local_dir: str, checkpoints: Path, warn: Callable[[str], None]) -> None:
        self.folder = Path(local_dir).expanduser().absolute()
        self._checkpoints, self.warn = checkpoints, warn
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(self, step: int, state: Any, record: Mapping[str, Any], data: Any) -> None:
        """Copies this process's shards to the host, and starts to write them.

        Args:
          step: the step.
          state: the training state; it may be donated as soon as this returns.
          record: the step's metadata.
          data: the state of this process's data iterator.
        """
        self.wait()
        root = self._run_folder(create=True)
        assert root is not None
        folder = root / f"{step}-process-{jax.process_index()}"
        leaves = named_leaves(state)
        pending = digests.start(leaves)
        shards = {
            (name, _place(shard.index)): np.array(shard.data)
            for name, leaf in leaves.items()
            for shard in leaf.addressable_shards
        }
        contents = {**record, "step": step, "data": _gather(data)}
        self._thread = threading.Thread(target=self._write, args=(folder, shards, contents, pending))
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last copy is written; warns once if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            self.warn(f"the copy in {self.folder} could not be written: {self._problem}; training goes on")
            self._problem = None

    def _write(self, folder: Path, shards: Any, contents: dict[str, Any], pending: Any) -> None:
        try:
            temporary = folder.with_suffix(".partial")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            places = []
            with (temporary / "shards.bin").open("wb") as file:
                for (name, place), array in shards.items():
                    places.append([name, place, file.tell()])
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            contents |= {"places": places, "digests": {name: digests.text(d) for name, d in pending.items()}}
            (temporary / _RECORD).write_text(json.dumps(contents))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            process = folder.name.partition("-")[2]
            own = sorted(
                held for held in self._held(folder.parent) if held[1].name.partition("-")[2] == process
            )
            for _, old in own[:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._problem = error.strerror or type(error).__name__

    def restore(
        self, newer_than: int, abstract_state: Any, run: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest copy of which all shards are found, on this host or a replica's.

        Args:
          newer_than: the step of the newest checkpoint.
          abstract_state: the state's shapes, dtypes and shardings.
          run: the run's metadata, which the copy must have been saved with.

        Returns:
          The state, and the step's record, with `data` the states of all data iterators; None if there is no
          such copy.
        """
        root = self._run_folder(create=False)
        held: dict[int, list[Path]] = {}
        for step, path in self._held(root) if root is not None else ():
            held.setdefault(step, []).append(path)
        for step in sorted({*_gather_ints(list(held))}, reverse=True):
            if step <= newer_than:
                break
            found = self._restore_step(step, held.get(step, []), named_leaves(abstract_state), run)
            if found is not None:
                self.warn(f"resuming from the copies of step {step} on the hosts")
                return from_named_leaves(abstract_state, found[0]), found[1]
        return None

    def _restore_step(
        self, step: int, folders: list[Path], abstract: Mapping[str, jax.ShapeDtypeStruct], run: Any
    ) -> tuple[dict[str, jax.Array], dict[str, Any]] | None:
        shards: dict[tuple[str, str], tuple[Path, int]] = {}
        record: dict[str, Any] | None = None
        for folder in folders:
            try:
                found = json.loads((folder / _RECORD).read_text())
                if found["run"] != run:
                    continue
                shards |= {(name, place): (folder / "shards.bin", at) for name, place, at in found["places"]}
                record = found
            except (OSError, ValueError, KeyError, TypeError):
                continue
        records = [found for found in _gather(record) if found is not None]
        if not records or set(records[0]["digests"]) != set(abstract):
            return None
        read = {name: _read_leaf(shards, name, leaf) for name, leaf in sorted(abstract.items())}
        if all(_gather(all(held.all() for _, held in read.values()))):
            arrays = {name: array for name, (array, _) in read.items()}
        else:
            filled = {name: _from_replicas(array, held) for name, (array, held) in read.items()}
            if not all(complete for _, complete in filled.values()):
                self.warn(f"the copies of step {step} in {self.folder} lack shards of lost hosts; not used")
                return None
            arrays = {name: array for name, (array, _) in filled.items()}
        for name, digest in digests.start(arrays).items():
            if digests.text(digest) != records[0]["digests"][name]:
                self.warn(f"the copies of step {step} in {self.folder} are damaged: {name}; not used")
                return None
        return arrays, {key: value for key, value in records[0].items() if key not in ("places", "digests")}

    def _run_folder(self, *, create: bool) -> Path | None:
        """The directory of this run's copies; None if the run has none. All processes call it together."""
        path = self._checkpoints / _IDENTITY
        if create and jax.process_index() == 0 and not path.exists():
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path, uuid.uuid4().hex)
        identity = next(iter(_gather(path.read_text() if path.exists() else "")))
        if not identity:
            return None
        return self.folder / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _held(self, root: Path) -> Iterator[tuple[int, Path]]:
        for path in root.iterdir() if root.is_dir() else ():
            step, _, rest = path.name.partition("-")
            if step.isdigit() and rest.startswith("process-") and path.suffix != ".partial":
                yield int(step), path


def _place(index: tuple[slice, ...]) -> str:
    """The position of a shard in its array, as text."""
    return ",".join(str(part.start or 0) for part in index)


def _read_leaf(
    shards: Mapping[tuple[str, str], tuple[Path, int]], name: str, leaf: jax.ShapeDtypeStruct
) -> tuple[jax.Array, np.ndarray]:
    """Makes an array of the shards that are on this host, and zeros.

    Returns:
      The array, and for each local device, in the mesh's order, whether its shard was found.
    """
    sharding = leaf.sharding
    assert sharding is not None
    shape = sharding.shard_shape(leaf.shape)
    nbytes, found = math.prod(shape) * leaf.dtype.itemsize, {}
    places = sharding.addressable_devices_indices_map(leaf.shape)
    for place in {_place(index or ()) for index in places.values()}:
        path, offset = shards.get((name, place), (None, 0))
        with contextlib.suppress(OSError):
            raw = np.fromfile(path, np.uint8, count=nbytes, offset=offset) if path else None
            if raw is not None and raw.size == nbytes:
                found[place] = raw.view(leaf.dtype).reshape(shape)
    empty = np.zeros(shape, leaf.dtype)
    array = jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: found.get(_place(index or ()), empty)
    )
    return array, np.array([_place(index or ()) in found for index in places.values()])


def _from_replicas(array: jax.Array, held: np.ndarray) -> tuple[jax.Array, bool]:
    """Fills the shards that hosts lack from the first replica; all processes call it together.

    Returns:
      The array, and whether all shards were found.
    """
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return array, bool(held.all())
    mesh, devices = sharding.mesh, sharding.mesh.devices
    local = sharding.addressable_devices_indices_map(array.shape)
    flags = jax.make_array_from_single_device_arrays(
        devices.shape,
        NamedSharding(mesh, P(*mesh.axis_names)),
        [
            jax.device_put(np.full((1,) * devices.ndim, flag), device)
            for device, flag in zip(local, held, strict=True)
        ],
    )
    filled, complete = _exchange(mesh, sharding.spec)(array, flags)
    return filled, bool(complete)


@functools.lru_cache(maxsize=64)
def _exchange(mesh: Mesh, spec: P) -> Any:
    """A function that fills the shards which are not held from the first replica that holds them."""
    axes = tuple(mesh.axis_names)
    used = {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}
    replicas = tuple(axis for axis in axes if axis not in used)

    def local(shard: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
        mine = held.reshape(())
        holders = jax.lax.all_gather(mine, replicas).reshape(-1) if replicas else mine[None]
        first = mine & (jnp.argmax(holders) == (jax.lax.axis_index(replicas) if replicas else 0))
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[shard.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(shard, unsigned)  # a sum of integers is exact
        kept = jnp.where(first, bits, 0)
        filled = jax.lax.psum(kept, replicas) if replicas else kept
        lacking = jax.lax.psum((~holders.any()).astype(jnp.int32), axes)
        return jax.lax.bitcast_convert_type(filled, shard.dtype), lacking == 0

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P(*axes)), out_specs=(spec, P()), check_vma=False
    )
    return jax.jit(mapped)


def _gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in order."""
    text = json.dumps(value).encode()
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    buffer = np.zeros(int(sizes.max()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _gather_ints(values: list[int]) -> Iterator[int]:
    for found in _gather(values):
        yield from found
