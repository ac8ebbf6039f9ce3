"""Local files to stores: for what has to be written on a disk first, by a library or in any order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llama_jax.storage.store_path import StorePath

_FILES = 4  # at a time
_CHUNK = 8 << 20

Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, the file


def upload(
    source: Path, target: StorePath, *, last: Sequence[str] = (), progress: Progress | None = None
) -> None:
    """Copies a file, or a folder with all that is in it, into a store.

    Args:
      source: the file or folder.
      target: the object or folder, which need not exist.
      last: names of files that are written after all others, in this order: who finds these finds all.
      progress: called with what has been written.

    Raises:
      OSError: if a file cannot be read.
      StoreError: if one cannot be written.
    """
    if source.is_file():
        pairs = [(source, target)]
    else:
        files = sorted(path for path in source.rglob("*") if path.is_file())
        pairs = [(path, target.joinpath(*path.relative_to(source).parts)) for path in files]
    total, done = sum(path.stat().st_size for path, _ in pairs), [0]

    def copy(pair: tuple[Path, StorePath]) -> None:
        with pair[0].open("rb") as file, pair[1].open("wb") as out:
            while chunk := file.read(_CHUNK):
                out.write(chunk)
                done[0] += len(chunk)
                if progress is not None:
                    progress(min(done[0], total), total, pair[0].name)

    first = [pair for pair in pairs if pair[0].name not in last]
    with ThreadPoolExecutor(_FILES) as pool:
        for _ in pool.map(copy, first):
            pass
    for name in last:
        for pair in pairs:
            if pair[0].name == name:
                copy(pair)


@contextmanager
def local_folder(folder: Path, *, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a folder on a disk: the given one, or a temporary one, uploaded if the block ends without error.

    Args:
      folder: where the files go.
      last: as for `upload`.
    """
    if not isinstance(folder, StorePath):
        yield folder
        return
    temporary = Path(tempfile.mkdtemp(prefix="llama_jax-"))
    try:
        yield temporary
        upload(temporary, folder, last=last)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
