"""Feed: every row of a batch reaches the devices once, with the mesh's sharding, for any process layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.meshes import make_mesh
from llama_jax.sharding import TOKENS_BT, named
from llama_jax.train import feed as feed_module
from llama_jax.train.feed import Feed

BATCH, LENGTH = 16, 8


def rows(count: int = BATCH) -> dict[str, np.ndarray]:
    tokens = np.arange(count * LENGTH, dtype=np.int32).reshape(count, LENGTH)
    return {"tokens": tokens, "segment_ids": tokens % 3, "positions": tokens % LENGTH, "bytes": 17}


@pytest.mark.parametrize(
    "spec",
    [
        "fsdp=8",
        "data=2,fsdp=4",
        "fsdp=2,context=2,tensor=2",
        "data=2,fsdp=2,tensor=2",
        "fsdp=2,context=4",
        "tensor=8",
    ],
)
def test_one_process_puts_the_batch_unchanged(spec):
    mesh, batch = make_mesh(spec), rows()
    feed = Feed.for_mesh(mesh, BATCH, LENGTH)
    assert (feed.shard, feed.num_shards) == (0, 1)
    put = feed.put(batch)
    assert set(put) == {"tokens", "segment_ids", "positions"}
    for name, array in put.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == named(mesh, TOKENS_BT) and array.dtype == np.int32


def test_put_without_a_mesh():
    put = Feed.for_mesh(None, BATCH, LENGTH).put(rows())
    np.testing.assert_array_equal(put["tokens"], rows()["tokens"])


@dataclasses.dataclass(frozen=True, eq=False)
class FakeDevice:
    """A device of a given process."""

    process_index: int


class FakeSharding:
    """A mesh's sharding of the batch, with devices that belong to several processes."""

    def __init__(self, mesh: Any, process_of: Any) -> None:
        self.real, self.process_of = named(mesh, TOKENS_BT), process_of

    def devices_indices_map(self, shape: tuple[int, int]) -> Any:
        real = self.real.devices_indices_map(shape)
        return {FakeDevice(self.process_of(device.id)): index for device, index in real.items()}


def feeds(monkeypatch: pytest.MonkeyPatch, spec: str, process_of: Any) -> dict[int, Feed]:
    """Each process's feed for the mesh."""
    monkeypatch.setattr(feed_module, "named", lambda mesh, _: FakeSharding(mesh, process_of))
    by_process = {}
    for process in sorted({process_of(device.id) for device in jax.devices()}):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        by_process[process] = Feed.for_mesh(make_mesh(spec), BATCH, LENGTH)
    return by_process


PROCESSES = {
    "in order": lambda i: i // 4,
    "interleaved": lambda i: i % 2,
    "four": lambda i: i // 2,
    "backwards": lambda i: 3 - i // 2,
}


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize(
    "spec", ["fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2", "fsdp=2,context=2,tensor=2", "tensor=8"]
)
def test_several_processes_put_every_row_once(spec, processes, monkeypatch):
    process_of, whole = PROCESSES[processes], rows()["tokens"]
    by_process = feeds(monkeypatch, spec, process_of)
    result = np.full((BATCH, LENGTH), -1)

    def callback(shape: Any, sharding: FakeSharding, block: Any) -> None:
        """As in JAX, each process provides the blocks of its own devices only."""
        for device, index in sharding.real.devices_indices_map(shape).items():
            if process_of(device.id) == process:
                before, now = result[index], block(index)
                assert ((before == -1) | (before == now)).all()  # replicas are equal
                result[index] = now

    monkeypatch.setattr(jax, "make_array_from_callback", callback)
    for process, feed in by_process.items():  # noqa: B007  # the callback reads `process`
        size = BATCH // feed.num_shards
        feed.put(dict.fromkeys(rows(), whole[feed.shard * size : (feed.shard + 1) * size]))
    assert sorted(result[:, 0]) == sorted(whole[:, 0])  # each row once
    np.testing.assert_array_equal(result, whole[result[:, 0] // LENGTH])  # and whole
    if processes == "in order":
        np.testing.assert_array_equal(result, whole)  # as with one process
    assert {feed.shard for feed in by_process.values()} == set(range(by_process[0].num_shards))


@pytest.mark.parametrize(
    ("spec", "batch", "length", "message"),
    [
        (
            "data=2,fsdp=4",
            12,
            8,
            "train.global_batch_size is 12, which mesh.data x mesh.fsdp = 8 does not divide; make it 16",
        ),
        (
            "fsdp=2,context=4",
            2,
            12,
            "train.seq_len is 12, which 2 x mesh.context = 8 does not divide; make it 16",
        ),
    ],
)
def test_batch_that_the_mesh_does_not_divide_is_an_error_with_one_that_works(spec, batch, length, message):
    with pytest.raises(ConfigError) as error:
        Feed.for_mesh(make_mesh(spec), batch, length)
    assert message in str(error.value)


@pytest.mark.parametrize("process_of", [lambda i: i // 3, lambda i: min(i, 1)], ids=["overlap", "uneven"])
def test_processes_without_equal_shards_are_an_error(process_of, monkeypatch):
    with pytest.raises(ConfigError, match=r"let mesh.tensor x mesh.context divide the devices of a process"):
        feeds(monkeypatch, "fsdp=4,tensor=2", process_of)
