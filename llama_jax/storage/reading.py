"""Reads from stores: a part of an object, several parts at a time, or a file object that reads ahead.

Everything that a program reads of an object after opening it is of the version that was there then: if it is
replaced meanwhile the read fails, rather than mixing two versions.
"""

from __future__ import annotations

import collections
import errno
import io
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol

import numpy as np

from llama_jax.errors import StoreError
from llama_jax.storage import client
from llama_jax.storage.client import Address, Info

PART_BYTES = 16 << 20  # of a large read, each a request
IN_FLIGHT = 8  # requests at a time, of a process
_FIRST_BYTES = 128 << 10  # of a file object's first read: a header
_AHEAD = 4  # parts that a file object reads ahead
_TRIES = 3  # of a body that ends early
_EARLY_ENDS = ("ClientPayloadError", "ResponseStreamingError", "IncompleteReadError")
_MAX_WHOLE = 1 << 30  # bytes of an object that is read at once

_versions: dict[str, Info] = {}  # of the objects that this process has opened, by address
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


class Object(Address, Protocol):
    """An object that can describe itself."""

    def info(self) -> Info: ...


def pin(path: Object, info: Info | None = None) -> Info:
    """Opens an object: its version from now on is the only one that this process reads.

    Raises:
      FileNotFoundError: if there is none.
      StoreError: if the store cannot say.
    """
    info = info or path.info()
    _versions[str(path)] = info
    return info


def read_object(path: Object, offset: int, nbytes: int) -> np.ndarray:
    """Reads a part of an object, in the version that was opened first: see `read_range`."""
    info = _versions.get(str(path)) or pin(path)
    nbytes = max(0, min(nbytes, info.size - offset))
    if nbytes <= PART_BYTES:
        return np.frombuffer(_read_part(path, info, offset, nbytes), np.uint8)
    out = np.empty(nbytes, np.uint8)

    def read(start: int) -> None:
        stop = min(start + PART_BYTES, nbytes)
        out[start:stop] = np.frombuffer(_read_part(path, info, offset + start, stop - start), np.uint8)

    for _ in _pool().map(read, range(0, nbytes, PART_BYTES)):
        pass
    return out


def read_whole(path: Object) -> bytes:
    """Reads an object of at most 1 GB."""
    info = pin(path)
    if info.size > _MAX_WHOLE:
        raise StoreError(f"{path}: has {info.size:,} bytes; at most {_MAX_WHOLE:,} are read at once")
    return read_object(path, 0, info.size).tobytes()


def open_reader(path: Object) -> BinaryIO:
    """Opens an object as a buffered file that reads ahead where it is read in order."""
    return io.BufferedReader(_Reader(path), _FIRST_BYTES)


def _pool() -> ThreadPoolExecutor:
    """This process's threads for requests; a fork makes its own."""
    with _lock:
        if os.getpid() not in _pools:
            _pools.clear()
            _pools[os.getpid()] = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="store-read")
        return _pools[os.getpid()]


def _read_part(path: Object, info: Info, offset: int, nbytes: int) -> bytes:
    """Reads with one request; again if the body ends early."""
    if nbytes == 0:
        return b""
    for attempt in range(_TRIES):
        try:
            data = client.call(path, "read", _request, path, info.version, offset, nbytes, nbytes=nbytes)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: was deleted while it was read; restore it") from error
        except FileExistsError as error:  # a condition on the version failed
            raise StoreError(
                f"{path}: was replaced while it was read; run the same command again when nobody writes it"
            ) from error
        if len(data) == nbytes:
            return bytes(data)
        time.sleep(0.1 * 2**attempt)
    raise StoreError(
        f"{path}: the store sent {len(data)} bytes of {nbytes} at {offset}, {_TRIES} times; run the same "
        "command again",
        transient=True,
    )


async def _request(store: Any, path: Object, version: str, offset: int, nbytes: int) -> bytes:
    stop = offset + nbytes
    if path.scheme == "gs":
        return await store._cat_file(path.address, start=offset, end=stop, generation=version or None)
    condition = {"IfMatch": version} if version else {}
    found = {"Bucket": path.bucket, "Key": path.key, "Range": f"bytes={offset}-{stop - 1}"}
    response = await store._call_s3("get_object", **found, **condition)
    async with response["Body"] as body:
        try:
            return await body.read()
        except Exception as error:  # aiohttp's, which is not imported here
            if type(error).__name__ not in _EARLY_ENDS:
                raise
            return b""  # asked for again; gcsfs does so itself


class _Reader(io.RawIOBase):
    """The unbuffered file: reads a little first, and more ahead the longer it is read in order."""

    def __init__(self, path: Object) -> None:
        super().__init__()
        self.path = path
        self.info = pin(path)
        self.name = str(path)
        self._position = 0
        self._start, self._data = 0, b""  # what was read last
        self._ahead: collections.deque[tuple[int, Future[bytes]]] = collections.deque()
        self._end = 0  # of what is being read ahead
        self._size = _FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(self.path))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.info.size - self._position)
        if wanted <= 0:
            return 0
        begin = self._position - self._start
        if not 0 <= begin < len(self._data):
            self._fetch(wanted)
            begin = self._position - self._start
        chunk = memoryview(self._data)[begin : begin + wanted]
        view[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def _fetch(self, wanted: int) -> None:
        """Reads on from the position; in order, from what is being read ahead."""
        if not self._ahead or self._ahead[0][0] != self._position:
            in_order = self._data and self._position == self._start + len(self._data)
            self._size = min(2 * self._size, PART_BYTES) if in_order else _FIRST_BYTES
            self._ahead.clear()
            self._end = self._position
            self._request(max(self._size, min(wanted, PART_BYTES)))
        start, future = self._ahead.popleft()
        if self._size >= PART_BYTES:
            while len(self._ahead) < _AHEAD and self._end < self.info.size:
                self._request(PART_BYTES)
        self._start, self._data = start, future.result()

    def _request(self, nbytes: int) -> None:
        nbytes = min(nbytes, self.info.size - self._end)
        future = _pool().submit(_read_part, self.path, self.info, self._end, nbytes)
        self._ahead.append((self._end, future))
        self._end += nbytes
