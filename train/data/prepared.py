"""A folder that `llama-jax data prepare` wrote: documents as token ids, in shards, with a manifest.

The manifest, `tokens.json`, is written last. Opening a folder reads it and the sizes of the shards, nothing
else. The training documents are numbered as those of the text are, and lie in the order of the first epoch
(layout.py); the validation documents follow, in the order of the files. A document that was skipped or
occurred before is there, and empty: the others keep their numbers, and with them the run its batches.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from .encode import Document, Encoder
from .files import INDEX, File
from .layout import place_of
from .records import Blocks
from .tables import Readers

VERSION = 3
HEADER_BYTES = 4  # before a document's ids: the UTF-8 length of its text, little-endian
COMMAND = "`llama-jax data prepare`"
_AGAIN = f"remove the folder and run {COMMAND} again"
_STATS = 16  # sizes that are asked for at once, which file systems across a network answer together


class PreparedSource:
    """The documents of a prepared folder.

    Attributes:
      names, counts: of the shards, and their numbers of documents.
      nbytes: number of bytes of text.
      blocks: as in `Records`, of the training documents alone.
      fingerprint: of the text's documents and their order.
      train_index, validation_index: the numbers of each split.
      validation_fraction: `data.validation_fraction` when it was prepared.
    """

    def __init__(self, folder: Path, encode: Encoder):
        manifest = read_manifest(folder / INDEX)
        if manifest["tokenizer"] != encode.fingerprint:
            raise DataError(
                f"{folder} was prepared with another tokenizer or data.parse_special; prepare the text again "
                "with this one, or use the original"
            )
        trained, held_out = (sum(row[1] for row in manifest[name]) for name in ("train", "validation"))
        rows = [*manifest["train"], *manifest["validation"]]
        with ThreadPoolExecutor(_STATS) as pool:
            self._files = list(pool.map(lambda row: _shard(folder / row[0], row[2]), rows))
        self._ends = np.cumsum([row[1] for row in rows], dtype=np.int64)
        self._readers = Readers(self._files)
        self._dtype = np.dtype(manifest["dtype"])
        self._vocab_size = encode.vocab_size
        self._seed = manifest["seed"]
        self.names = [row[0] for row in rows]
        self.counts = np.array([row[1] for row in rows], np.int64)
        self.train_index, self.validation_index = range(trained), range(trained, trained + held_out)
        self.nbytes = manifest["bytes"]
        self.blocks = read_blocks(manifest["blocks"])
        self.fingerprint = manifest["fingerprint"]
        self.validation_fraction = manifest["validation_fraction"]

    def __len__(self) -> int:
        return len(self.train_index) + len(self.validation_index)

    def earlier_fingerprint(self) -> str:
        return self.fingerprint

    def document(self, index: int) -> Document:
        """Returns one document.

        Raises:
          DataError: if it cannot be read.
        """
        place = index
        if self._seed is not None and index < len(self.train_index):
            place = place_of(index, len(self.train_index), self._seed)
        shard = int(np.searchsorted(self._ends, place, side="right"))
        number = place - (int(self._ends[shard - 1]) if shard else 0)
        data = self._readers.read(shard, number)
        where = f"{self._files[shard].path}, record {number}"
        if len(data) < HEADER_BYTES or (len(data) - HEADER_BYTES) % self._dtype.itemsize:
            raise DataError(f"{where}: not a document; {_AGAIN}")
        ids = np.frombuffer(data, self._dtype, offset=HEADER_BYTES).astype(np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"{where}: token ids outside the vocabulary; {_AGAIN}")
        return Document(ids, int.from_bytes(data[:HEADER_BYTES], "little"))


def _shard(path: Path, size: int) -> File:
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from None
    if info.st_size != size:
        raise DataError(f"{path} has {info.st_size} bytes, and had {size} when it was written; {_AGAIN}")
    return File(str(path), path.name, size, info.st_mtime_ns)


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns a manifest.

    Raises:
      DataError: if there is none, or it is not a manifest of this version.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); use a folder that {COMMAND} wrote"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON; {_AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION or not _valid(manifest):
        raise DataError(f"{path} was not written by this version of {COMMAND}; {_AGAIN}")
    return manifest


def _valid(manifest: dict[str, Any]) -> bool:
    types = {**dict.fromkeys(("tokenizer", "fingerprint", "dtype"), str), "bytes": int}
    fraction, seed = manifest.get("validation_fraction"), manifest.get("seed")
    return (
        all(isinstance(manifest.get(name), kind) for name, kind in types.items())
        and manifest["dtype"] in ("<u2", "<u4")
        and isinstance(fraction, float)
        and "seed" in manifest
        and (seed is None or (type(seed) is int and 0 <= seed < 1 << 32))
        and "blocks" in manifest
        and _valid_blocks(manifest["blocks"])
        and all(_valid_shards(manifest.get(name)) for name in ("train", "validation"))
    )


def _valid_shards(value: Any) -> bool:
    """Returns whether `value` is a list of [file name, records, bytes, digest], of files in the folder."""
    return isinstance(value, list) and all(
        isinstance(row, list)
        and list(map(type, row)) == [str, int, int, str]
        and Path(row[0]).name == row[0]
        and row[1] > 0
        and row[2] >= 0
        for row in value
    )


def _valid_blocks(value: Any) -> bool:
    """Returns whether `value` is null, or the sizes of blocks and the number that is shuffled together."""
    if value is None:
        return True
    sizes, window = (value.get("sizes"), value.get("window")) if isinstance(value, dict) else (None, None)
    numbers = [*sizes, window] if isinstance(sizes, list) else [None]
    return all(type(number) is int and number >= 0 for number in numbers)


def write_blocks(blocks: Blocks | None) -> dict[str, Any] | None:
    """Returns blocks as in a manifest."""
    return None if blocks is None else {"sizes": blocks.sizes.tolist(), "window": blocks.window}


def read_blocks(value: Any) -> Blocks | None:
    """Returns the blocks of a manifest."""
    return None if value is None else Blocks(np.array(value["sizes"], np.int64), value["window"])
