"""Rows from processes to devices: each lands once, where its mesh says, whoever read it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.sharding import TOKENS_BT, make_mesh, named
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
        "context=8",
        "tensor=8",
    ],
)
def test_one_process_puts_the_batch_as_it_is(spec):
    mesh, batch = make_mesh(spec), rows()
    feed = Feed.over(mesh, BATCH, LENGTH)
    assert (feed.share, feed.shares) == (0, 1)
    put = feed.put(batch)
    assert set(put) == {"tokens", "segment_ids", "positions"}
    for name, array in put.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == named(mesh, TOKENS_BT) and array.dtype == np.int32


def test_without_a_mesh_too():
    put = Feed.over(None, BATCH, LENGTH).put(rows())
    np.testing.assert_array_equal(put["tokens"], rows()["tokens"])


@dataclasses.dataclass(frozen=True, eq=False)
class Elsewhere:
    """A device that belongs to a process of the test's choosing."""

    process_index: int


class Layout:
    """A mesh's layout of the batch whose devices belong to several processes."""

    def __init__(self, mesh: Any, process_of: Any) -> None:
        self.real, self.process_of = named(mesh, TOKENS_BT), process_of

    def devices_indices_map(self, shape: tuple[int, int]) -> Any:
        real = self.real.devices_indices_map(shape)
        return {Elsewhere(self.process_of(device.id)): index for device, index in real.items()}


def feeds(monkeypatch: pytest.MonkeyPatch, spec: str, process_of: Any) -> dict[int, Feed]:
    """What each process makes of the mesh."""
    monkeypatch.setattr(feed_module, "named", lambda mesh, _: Layout(mesh, process_of))
    made = {}
    for process in sorted({process_of(device.id) for device in jax.devices()}):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        made[process] = Feed.over(make_mesh(spec), BATCH, LENGTH)
    return made


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
    made = feeds(monkeypatch, spec, process_of)
    landed = np.full((BATCH, LENGTH), -1)

    def callback(shape: Any, layout: Layout, part: Any) -> None:
        """What JAX does: asks each process for the parts of its own devices, and for no others."""
        for device, index in layout.real.devices_indices_map(shape).items():
            if process_of(device.id) == process:
                before, now = landed[index], part(index)
                assert ((before == -1) | (before == now)).all()  # copies of a part are equal
                landed[index] = now

    monkeypatch.setattr(jax, "make_array_from_callback", callback)
    for process, feed in made.items():  # noqa: B007  # the callback reads `process`
        size = BATCH // feed.shares
        feed.put(dict.fromkeys(rows(), whole[feed.share * size : (feed.share + 1) * size]))
    assert sorted(landed[:, 0]) == sorted(whole[:, 0])  # each row once
    np.testing.assert_array_equal(landed, whole[landed[:, 0] // LENGTH])  # and in one piece
    if processes == "in order":
        np.testing.assert_array_equal(landed, whole)  # as one process would have it
    assert {feed.share for feed in made.values()} == set(range(made[0].shares))


@pytest.mark.parametrize(
    ("spec", "batch", "length", "message"),
    [
        (
            "data=2,fsdp=4",
            12,
            8,
            "train.global_batch_size is 12, which mesh.data x mesh.fsdp = 8 does not divide; make it 16",
        ),
        ("fsdp=2,context=4", 2, 10, "train.seq_len is 10, which mesh.context 4 does not divide; make it 12"),
    ],
)
def test_a_batch_that_does_not_divide_is_named_with_one_that_would(spec, batch, length, message):
    with pytest.raises(ConfigError) as error:
        Feed.over(make_mesh(spec), batch, length)
    assert message in str(error.value)


@pytest.mark.parametrize("process_of", [lambda i: i // 3, lambda i: min(i, 1)], ids=["overlap", "uneven"])
def test_processes_that_no_equal_shares_fit(process_of, monkeypatch):
    with pytest.raises(ConfigError, match=r"let mesh.tensor x mesh.context divide the devices of a process"):
        feeds(monkeypatch, "fsdp=4,tensor=2", process_of)
