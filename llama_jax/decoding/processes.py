"""Generation over the processes of a mesh: one call in all of them, and results that each can read.

Nothing here is used while tracing: `generate` inside `jit` stays a pure function.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # private: tests/test_private_seams.py
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import InputError

TIMEOUT_SECONDS = 300.0  # that a process waits for the others to make the same call
_FOLDER = "llama_jax/decoding"  # in the coordination service's key-value store


@dataclasses.dataclass
class _Group:
    """The processes of a mesh.

    Attributes:
      processes: their indices, in order.
      calls: how many calls they have made, which numbers the next.
      deleted: how many of them have no keys left.
    """

    processes: tuple[int, ...]
    calls: int = 0
    deleted: int = 0

    def folder(self, call: int) -> str:
        """Of a call in the key-value store."""
        return f"{_FOLDER}/{_digest(self.processes)}/{call}"

    def next_folder(self) -> str:
        self.calls += 1
        return self.folder(self.calls - 1)


def spans(x: Any) -> bool:
    """Whether other processes hold a part of an array that this one does not."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated


def fetch(tree: Any) -> Any:
    """The arrays of a tree in numpy, in every process whole: also rows on devices of other processes."""
    if any(map(spans, jax.tree.leaves(tree))):
        tree = _gather(sharding.mesh_of(tree))(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))


def put_like(values: np.ndarray, x: jax.Array) -> jax.Array:
    """Puts values made of `fetch(x)` where `x` is; replicated if processes share it, or if rows are cut.

    Then any process can read it, and any number of rows is right.
    """
    if x.is_fully_addressable and values.shape[:1] == x.shape[:1]:
        return jax.device_put(values, x.sharding)
    assert isinstance(x.sharding, NamedSharding)
    whole = NamedSharding(x.sharding.mesh, P())
    return jax.make_array_from_callback(values.shape, whole, lambda index: values[index])


def truncate(output: Any, *size: int) -> Any:
    """The first rows, columns, ... of arrays that have them.

    Sliced on the host: on the device each size would compile a program.
    """
    return jax.tree.map(
        lambda values, x: put_like(values[tuple(map(slice, size[: x.ndim]))], x),
        fetch(output),
        output,
    )


def check_same_call(call: Mapping[str, Any]) -> None:
    """Checks that every process of the current mesh makes the same call; does nothing for a single process.

    Processes with different prompts would compute a text of neither, or wait for one another for ever.

    Args:
      call: the arguments by what they are called in the error; `function` is the function's name.

    Raises:
      InputError: in every process, naming the process and what differs; or the process that has not made a
        call within `TIMEOUT_SECONDS`, or whose call failed.
    """
    if group := _current_group():
        digests = {name: value if name == "function" else _digest(value) for name, value in call.items()}
        if verdict := _verdict(group, digests):
            raise InputError(verdict)


def tell_failure(error: InputError) -> None:
    """Tells the other processes of the current mesh that this one's call failed, so that they do not wait."""
    if group := _current_group():
        own, message = jax.process_index(), str(error)
        leads = own == group.processes[0]
        value = _failed(own, message) if leads else json.dumps({"error": message})
        _client().key_value_set(f"{group.next_folder()}/{'verdict' if leads else own}", value)


def _client() -> Any:
    """Of the coordination service; None without `jax.distributed.initialize`."""
    return global_state.client


def _current_group() -> _Group | None:
    """The processes of the current mesh, this one among them; None for a single one, and while tracing."""
    if _client() is None or jax.sharding.get_abstract_mesh().empty:
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # while tracing
        return None
    return _group(_processes_of(mesh)) if isinstance(mesh, Mesh) else None


@functools.cache
def _processes_of(mesh: Mesh) -> tuple[int, ...]:
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


@functools.cache
def _group(processes: tuple[int, ...]) -> _Group | None:
    return _Group(processes) if len(processes) > 1 and jax.process_index() in processes else None


def _verdict(group: _Group, digests: dict[str, str]) -> str:
    """What is wrong with a call, in every process: the first one compares, the others read its verdict."""
    client, own, first = _client(), jax.process_index(), group.processes[0]
    folder = group.next_folder()
    if own != first:
        client.key_value_set(f"{folder}/{own}", json.dumps(digests))
        verdict = _get(f"{folder}/verdict", TIMEOUT_SECONDS + 10)  # the first one waits too
        return _absent(first, digests["function"]) if verdict is None else verdict
    problem = ""
    for process in group.processes[1:]:
        found = _get(f"{folder}/{process}", TIMEOUT_SECONDS)
        problem = problem or _problem(process, first, None if found is None else json.loads(found), digests)
        if found is None:
            break
    else:  # all are here, so they have read the verdicts of earlier calls
        for call in range(group.deleted, group.calls - 1):
            client.key_value_delete(f"{group.folder(call)}/")
        group.deleted = group.calls - 1
    client.key_value_set(f"{folder}/verdict", problem)
    return problem


def _problem(process: int, first: int, found: dict[str, str] | None, digests: dict[str, str]) -> str:
    """How the call of `process` differs from that of `first`; empty if it does not."""
    if found is None:
        return _absent(process, digests["function"])
    if "error" in found:
        return _failed(process, found["error"])
    if found["function"] != digests["function"]:
        return (
            f"process {process} called {found['function']} where process {first} called "
            f"{digests['function']}; every process of a mesh must make the same calls in the same order"
        )
    differing = [name for name, digest in digests.items() if found.get(name) != digest]
    if not differing:
        return ""
    return (
        f"{digests['function']} has other {' and '.join(differing)} in process {process} than in process "
        f"{first}; every process of a mesh must make the same call"
    )


def _absent(process: int, function: str) -> str:
    return (
        f"process {process} has not called {function} within {TIMEOUT_SECONDS:.0f} s; every process of a "
        "mesh must make the same call: look at that process's log"
    )


def _failed(process: int, error: str) -> str:
    return f"process {process} failed, and so this one stops: {error}"


def _get(key: str, seconds: float) -> str | None:
    """A value of the key-value store once it is there; None if it is not in time.

    Raises:
      RuntimeError: JAX's, if the coordination service cannot be reached.
    """
    try:
        value = _client().blocking_key_value_get(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
    return value.decode() if isinstance(value, bytes) else str(value)


def _digest(value: Any) -> str:
    """Of a tree of arrays and plain values; of arrays that span processes only shape and dtype count."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(value, is_leaf=lambda x: x is None):
        if spans(leaf):
            digest.update(repr((leaf.shape, leaf.dtype)).encode())
        elif isinstance(leaf, jax.Array | np.ndarray):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
            digest.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()
