"""`StorePath`: an object in a store, or a folder of them, with the methods of `pathlib.Path`.

Stores have no folders: a folder is there as long as an object's key begins with its name, so `mkdir` does
nothing. An object appears whole when its write ends, and replaces one of the same name at once.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fnmatch
import io
import os
import posixpath
import re
import stat
from collections.abc import Generator, Iterable, Sequence
from pathlib import PosixPath, PurePosixPath
from typing import IO, Any, Self

from llama_jax.storage import client
from llama_jax.storage.client import Info
from llama_jax.storage.reading import open_reader, read_whole
from llama_jax.storage.writing import ObjectWriter

SCHEMES = ("gs", "s3")
_IN_FLIGHT = 16  # requests at a time of an operation on many objects


class StorePath(PosixPath):
    """gs://BUCKET/KEY or s3://BUCKET/KEY; made by `as_path`.

    What `pathlib.Path` does with a local file alone (links, permissions, owners) does not exist here.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (str(self),)

    @property
    def parent(self) -> Self:
        return super().parent if len(self.parts) > 2 else self

    @property
    def parents(self) -> Sequence[Self]:
        return [path for path in super().parents if len(path.parts) > 1]

    @property
    def scheme(self) -> str:
        """gs or s3."""
        return self.parts[0].removesuffix(":")

    @property
    def bucket(self) -> str:
        """The name of its bucket."""
        return self.parts[1]

    @property
    def key(self) -> str:
        """Its name in the bucket; empty for the bucket itself."""
        return "/".join(self.parts[2:])

    @property
    def address(self) -> str:
        """BUCKET/KEY, as fsspec's clients name it."""
        return "/".join(self.parts[1:])

    def relative_to(self, *other: Any, **more: Any) -> PurePosixPath:  # type: ignore[override]
        return PurePosixPath(*super().relative_to(*other, **more).parts)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> Self:
        if ".." not in self.parts:
            return self
        inside = posixpath.normpath("/" + self.key)  # .. does not lead out of the bucket
        return type(self)(f"{self.scheme}://{self.bucket}{inside}")

    def resolve(self, strict: bool = False) -> Self:
        return self.absolute()

    def expanduser(self) -> Self:
        return self

    def is_symlink(self) -> bool:
        return False

    def as_posix(self) -> str:
        return str(self)

    # What is there.

    def info(self) -> Info:
        """Returns the object's description.

        Raises:
          FileNotFoundError: if there is no such object; it may be a folder.
          StoreError: if the store cannot say.
        """
        found = self._describe()
        if found is None or found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _info(found)

    def _describe(self) -> dict[str, Any] | None:
        try:
            return client.call(self, "read", "_info", self.address)
        except FileNotFoundError:
            return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._describe() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        found = self._describe()
        return found is not None and found["type"] == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        found = self._describe()
        return found is not None and found["type"] == "directory"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and time of modification; the inode number is made from the version."""
        found = self._describe()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        if found["type"] == "directory":
            return os.stat_result((stat.S_IFDIR | 0o755, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        return _stat_result(_info(found))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def iterdir(self) -> Generator[Self, None, None]:
        """Yields what is in a folder, one level deep.

        Raises:
          FileNotFoundError: if there is nothing of that name.
        """
        yield from (found[0] for found in self._entries())

    def _entries(self) -> Generator[tuple[Self, bool], None, None]:
        """Yields what is in a folder, and whether it is an object."""
        found = client.call(self, "listed", "_ls", self.address, detail=True)
        names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in found}
        for name, entry in sorted(names.items()):
            if entry["name"].rstrip("/") != self.address:
                yield self / name, entry["type"] == "file"

    def find(self) -> dict[Self, Info]:
        """Returns every object under a folder, at any depth, in order; empty if there is none."""
        try:
            found = client.call(self, "listed", "_find", self.address, detail=True)
        except FileNotFoundError:
            return {}
        paths = {
            type(self)(f"{self.scheme}://{name}"): _info(entry)
            for name, entry in found.items()
            if entry["type"] == "file" and not name.endswith("/")
        }
        return dict(sorted((path, info) for path, info in paths.items() if path != self))

    def glob(self, pattern: str, **_: Any) -> Generator[Self, None, None]:
        """Yields the objects, and the folders unless the pattern has `**`, that match below this folder."""
        yield from (found[0] for found in self.matches(pattern))

    def matches(self, pattern: str) -> Generator[tuple[Self, bool], None, None]:
        """Yields what `glob` does, and whether it is an object."""
        if "/" not in pattern and "**" not in pattern:
            with contextlib.suppress(FileNotFoundError):
                yield from (found for found in self._entries() if fnmatch.fnmatchcase(found[0].name, pattern))
            return
        is_match = re.compile(_glob_regex(pattern)).fullmatch
        depth = None if "**" in pattern else pattern.count("/") + 1
        seen = set()
        for path in list(self.find()):
            parts = path.parts[len(self.parts) :]
            cut = parts if depth is None else parts[:depth]
            candidate = self.joinpath(*cut)
            if is_match("/".join(cut)) and candidate not in seen:
                seen.add(candidate)
                yield candidate, len(cut) == len(parts)

    def rglob(self, pattern: str, **_: Any) -> Generator[Self, None, None]:
        return self.glob(f"**/{pattern}")

    # Reading and writing.

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Opens the object: to read (with seeking), or to write it whole (`w`, or `x` if it must be new)."""
        kind = mode.replace("b", "").replace("t", "")
        if kind == "r":
            binary: Any = open_reader(self)
        elif kind in ("w", "x"):
            binary = ObjectWriter(self, new=kind == "x")  # the client buffers parts
        else:
            raise ValueError(f"mode {mode!r}: an object cannot be changed or appended to")
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    def read_bytes(self) -> bytes:
        return read_whole(self)

    def read_text(
        self, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict").replace("\r\n", "\n")

    def write_bytes(self, data: Any) -> int:
        content = bytes(data)
        client.call(self, "written", "_pipe_file", self.address, content, nbytes=len(content))
        return len(content)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.exists():
            self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there when something is in it."""

    def rmdir(self) -> None:
        """Does nothing: a folder without objects is not there."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            client.call(self, "deleted", _delete, self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Deletes every object under a folder."""
        client.call(self, "deleted", _delete_all, [path.address for path in self.find()])

    def rename(self, target: str | os.PathLike[str]) -> Self:
        """Copies the object, or all of a folder, to a new name within the store, and deletes the old one.

        Not at once, as on a disk: others may see both, or a part of a folder.
        """
        new = target if isinstance(target, type(self)) else type(self)(os.fspath(target))
        pairs = [(self, new)] if self.is_file() else []
        pairs = pairs or [(path, new.joinpath(*path.parts[len(self.parts) :])) for path in self.find()]
        if not pairs:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        addresses = [(old.address, copy.address) for old, copy in pairs]
        client.call(self, "copied", _copy_all, addresses, nbytes=sum(old.info().size for old, _ in pairs))
        client.call(self, "deleted", _delete_all, [old for old, _ in addresses])
        return new

    def replace(self, target: str | os.PathLike[str]) -> Self:
        return self.rename(target)


def _info(entry: dict[str, Any]) -> Info:
    """An object's description, from fsspec's, which differs between stores and between calls."""
    when = entry.get("mtime") or entry.get("LastModified") or 0.0
    if isinstance(when, datetime.datetime):
        when = when.timestamp()
    etag = str(entry.get("ETag") or entry.get("etag") or "").strip('"')
    version = str(entry.get("generation") or etag)
    digest = f"crc32c:{entry['crc32c']}" if entry.get("crc32c") else f"etag:{etag}"
    return Info(int(entry["size"] or 0), version, float(when or 0.0), digest)


def _stat_result(info: Info) -> os.stat_result:
    inode = int.from_bytes(info.version.encode()[-8:], "little")
    seconds = int(info.modified)
    values = (stat.S_IFREG | 0o644, inode, 0, 1, 0, 0, info.size, seconds, seconds, seconds)
    return os.stat_result(values, {"st_mtime": info.modified, "st_mtime_ns": round(info.modified * 1e9)})


def _glob_regex(pattern: str) -> str:
    """A regular expression for a glob, in which * and ? stop at a slash and **/ is any number of folders."""
    out = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern):
        if part == "**/":
            out.append("(?:[^/]+/)*")
        elif part == "**":
            out.append(".*")
        elif part == "*":
            out.append("[^/]*")
        elif part == "?":
            out.append("[^/]")
        elif part.startswith("["):
            out.append(part.replace("[!", "[^").replace("\\", r"\\"))
        else:
            out.append(re.escape(part))
    return "".join(out)


async def _delete(store: Any, path: StorePath) -> None:
    if path.scheme == "s3":  # which deletes what is not there
        await store._info(path.address)
    await store._rm_file(path.address)


async def _delete_all(store: Any, addresses: list[str]) -> None:
    for start in range(0, len(addresses), 500):
        await _each(store._rm_file, [(address,) for address in addresses[start : start + 500]])


async def _copy_all(store: Any, pairs: list[tuple[str, str]]) -> None:
    await _each(store._cp_file, pairs)


async def _each(function: Any, arguments: Iterable[tuple[str, ...]]) -> None:
    """Awaits a function of each of some arguments, several at a time."""
    import asyncio

    gate = asyncio.Semaphore(_IN_FLIGHT)

    async def one(values: tuple[str, ...]) -> None:
        async with gate:
            await function(*values)

    await asyncio.gather(*(one(values) for values in arguments))
