"""Divides the encoding of records among the processes of a run."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llama_jax.errors import DataError

T = TypeVar("T")
_FIRST = 16  # records that each process encodes in the first round
_ROUND_BYTES = 1 << 22  # of one process's records in a round, about


@dataclasses.dataclass(frozen=True)
class Peers:
    """The processes of a run.

    Attributes:
      index, count: this process, and how many there are.
      gather: returns the bytes of every process, in order; all processes must call it alike.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda data: [data]


ALONE = Peers()


@dataclasses.dataclass
class Cost:
    """What encoding took this process.

    Attributes:
      records: how many it has encoded.
      seconds: for these, and with those of the others.
    """

    records: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Failed(Generic[T]):
    """An error in place of a record: it is raised where the record is used, in every process."""

    message: str


def encoded_once(count: int, encode: Callable[[int], T], peers: Peers, cost: Cost) -> Iterator[T]:
    """Yields encode(0), ..., encode(count - 1), each computed by one process and sent to the others.

    The processes must take the same number of them.

    Args:
      count: the number of records.
      encode: encodes one.
      peers: the processes.
      cost: what is added to.

    Raises:
      DataError: that `encode` raised, in any process.
    """
    first, size = 0, _FIRST if peers.count > 1 else 1
    while first < count:
        begin = time.perf_counter()
        end = min(first + size * peers.count, count)
        mine = [_attempt(encode, i) for i in range(first + peers.index, end, peers.count)]
        cost.records += len(mine)
        parts = [mine]
        if peers.count > 1:
            sent = peers.gather(pickle.dumps(mine))
            parts = [pickle.loads(data) for data in sent]
            if 2 * max(map(len, sent)) <= _ROUND_BYTES:
                size *= 2
        cost.seconds += time.perf_counter() - begin
        for i in range(end - first):
            item = parts[i % peers.count][i // peers.count]
            if isinstance(item, _Failed):
                raise DataError(item.message)
            yield item
        first = end


def _attempt(encode: Callable[[int], T], i: int) -> T | _Failed[T]:
    try:
        return encode(i)
    except DataError as error:
        return _Failed(str(error))
