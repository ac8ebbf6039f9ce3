"""Writes to stores: objects of any size in parts, and small ones under a condition on their version."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from llama_jax.storage import client
from llama_jax.storage.client import Address

PART_BYTES = 32 << 20  # of an upload; S3 takes 10,000 parts, which is 320 GB


class ObjectWriter(io.RawIOBase):
    """Writes an object in parts: it appears when the file is closed, and not after an error.

    Args:
      path: the object.
      new: it must not exist.
    """

    def __init__(self, path: Address, *, new: bool = False) -> None:
        super().__init__()
        self.path = path
        self.name = str(path)
        store = client.client(path.scheme)
        mode = "xb" if new else "wb"
        self._file = self._do(lambda: store.open(path.address, mode, block_size=PART_BYTES))

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._do(lambda: self._file.write(bytes(data)))

    def close(self) -> None:
        """Completes the object."""
        if not self.closed:
            super().close()
            self._do(self._file.close)

    def abandon(self) -> None:
        """Closes the file without an object."""
        if not self.closed:
            super().close()
            with contextlib.suppress(Exception):  # what is left of an upload, the store forgets
                self._file.discard()
            self._file.closed = True

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close() if kind is None else self.abandon()

    def _do(self, action: Any) -> Any:
        try:
            return action()
        except Exception as error:  # of two libraries
            client.raise_for(self.path, "written", error)


def create(path: Address, content: bytes) -> str | None:
    """Writes a small object that must not exist; returns its version, None if it exists.

    Raises:
      StoreError: if the store fails.
    """
    return _write_if(path, content, None)


def replace(path: Address, content: bytes, version: str) -> str | None:
    """Writes a small object over one version of it; returns the new version, None if that is not there.

    Raises:
      StoreError: if the store fails.
    """
    return _write_if(path, content, version)


def _write_if(path: Address, content: bytes, version: str | None) -> str | None:
    try:
        return client.call(path, "written", _conditional, path, content, version)
    except (FileExistsError, FileNotFoundError):
        return None


async def _conditional(store: Any, path: Address, content: bytes, version: str | None) -> str:
    if path.scheme == "gs":
        url = f"{store._location}/upload/storage/v1/b/{path.bucket}/o"
        condition = {"name": path.key, "ifGenerationMatch": version or "0"}
        headers = {"Content-Type": "application/octet-stream"}
        found = await store._call(
            "POST", url, uploadType="media", data=content, headers=headers, json_out=True, **condition
        )
        return str(found["generation"])
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    found = await store._call_s3("put_object", Bucket=path.bucket, Key=path.key, Body=content, **condition)
    return str(found["ETag"]).strip('"')
