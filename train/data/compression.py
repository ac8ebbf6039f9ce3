"""Compressed files and files of other encodings: converted into plain UTF-8 text before they are read."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import io
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import DataError

from ..config.data import Format
from .cache import Sink, converted
from .files import COMPRESSED, File, read_chunks

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 8 << 10
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "lz4": b"\x04\x22\x4d\x18",
}
_SKIPPABLE = b"\x2a\x4d\x18"  # after one byte: a skippable frame of zstd or lz4, with which pzstd begins
_ENCODINGS = {  # UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNPACK = "is a {} archive; unpack it, and use the files in it"
_NUMBERS = "holds numbers, not text; use the text that they were made from"
_PICKLE = "is a pickle, which can run any code when it is loaded; write it as JSON Lines or Parquet"
_OTHER_FILES = {  # what files with these first bytes are, whatever their names
    b"PK\x03\x04": _UNPACK.format("zip"),
    b"7z\xbc\xaf\x27\x1c": _UNPACK.format("7z"),
    b"Rar!": _UNPACK.format("rar"),
    b"PAR1": 'is a Parquet file; name it .parquet, or set data.format = "parquet"',
    b"ARROW1": 'is an Arrow file; name it .arrow, or set data.format = "arrow"',
    b"SQLite format 3": "is a database; export it as CSV or JSON Lines",
    b"\x93NUMPY": _NUMBERS,
    **{b"\x80" + bytes([protocol]): _PICKLE for protocol in range(2, 6)},
}
_NOT_TEXT = {  # files that could pass for text, by suffix
    **dict.fromkeys((".bin", ".npy", ".npz", ".idx"), _NUMBERS),
    **dict.fromkeys((".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".zip", ".rar", ".7z"), _UNPACK.format("{suffix}")),
    ".lzma": "is compressed; decompress it",
    **dict.fromkeys(
        (".xlsx", ".xls", ".ods", ".orc", ".avro", ".h5", ".hdf5"), "is a table; write it as CSV"
    ),
}


@dataclasses.dataclass(frozen=True)
class Plain:
    """Turns the files of one format into what is read: decompressed, and in UTF-8.

    Attributes:
      file_format: their format.
      auto: whether the format was told by the names: then files of other formats are refused as text.
    """

    file_format: Format
    auto: bool

    def __call__(self, file: File) -> File:
        """Returns the file, with a converted copy if it is compressed, or in another encoding.

        Raises:
          DataError: if it cannot be decompressed, or is no text.
        """
        codec, encoding = self._inspect(file)
        if codec:
            compressed = file
            file = converted(file, codec, lambda sink: _decompress(compressed, codec, sink))
            if not self._is_text:
                return file
            encoding = _encoding(_head(file))
        if encoding:
            wide = file
            return converted(file, encoding, lambda sink: _recode(wide, encoding, sink))
        if codec:
            _check_content(file, _head(file), self._is_named_text)
        return file

    def changes(self, file: File) -> bool:
        """Returns whether another file is read in this one's place.

        Raises:
          DataError: if it is no text.
        """
        return any(self._inspect(file))

    @property
    def _is_text(self) -> bool:
        return self.file_format in ("text", "jsonl", "csv")

    @property
    def _is_named_text(self) -> bool:
        return self.auto and self.file_format == "text"

    def _inspect(self, file: File) -> tuple[str | None, str | None]:
        """Returns how a file is compressed, or else how it is encoded if that is not UTF-8."""
        if not self._is_text and Path(file.path).suffix.lower() not in COMPRESSED:
            return None, None
        if self._is_named_text:
            _check_suffix(file)
        head = _head(file)
        if codec := _codec(file, head):
            return codec, None
        encoding = _encoding(head) if self._is_text else None
        if self._is_text and not encoding:
            _check_content(file, head, self._is_named_text)
        return None, encoding


def _encoding(head: bytes) -> str | None:
    return next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)


def _head(file: File) -> bytes:
    with file.open() as opened:
        return opened.read(_HEAD_BYTES)


def _codec(file: File, head: bytes) -> str | None:
    """Returns how a file is compressed, from its first bytes.

    Raises:
      DataError: if its name says that it is compressed, and it is not.
    """
    named = COMPRESSED.get(Path(file.path).suffix.lower())
    for codec, magic in _MAGIC.items():
        if head.startswith(magic) and (codec != "bz2" or head[4:10] == b"1AY&SY" or named == codec):
            return codec
    if named in ("zstd", "lz4") and head[1:4] == _SKIPPABLE:
        return named
    if named:
        raise DataError(
            f"{file.path} is not compressed by {named}, as its name says; copy it again, or name it "
            f"{Path(file.path).stem!r} if it is not compressed"
        )
    return None


def _decompress(file: File, codec: str, sink: Sink) -> None:
    try:
        with file.open() as opened, _decompressor(opened, codec) as stream:
            for chunk in read_chunks(stream, _CHUNK_BYTES):
                sink.write(chunk)
    except ImportError as error:
        raise DataError(f"{file.path} needs Python's module {error.name}; decompress it yourself") from None
    except Exception as error:  # each library has its own
        if isinstance(error, DataError) or getattr(error, "errno", None) is not None:
            raise  # not of the decompressor
        why = " ".join(str(error).split())[:120]
        raise DataError(f"{file.path} cannot be decompressed ({codec}: {why}); copy it again") from None


def _decompressor(opened: BinaryIO, codec: str) -> BinaryIO:
    if codec == "gzip":  # unlike Arrow's, it accepts padding after the last member, as gzip does
        return gzip.GzipFile(fileobj=opened)  # type: ignore[return-value]
    if codec == "bz2":
        import bz2

        return bz2.BZ2File(opened)  # type: ignore[return-value]
    if codec == "xz":
        import lzma

        return lzma.LZMAFile(opened)  # type: ignore[return-value]
    import pyarrow

    return pyarrow.CompressedInputStream(opened, codec)


def _recode(file: File, encoding: str, sink: Sink) -> None:
    with file.open() as opened:
        try:
            reader = io.TextIOWrapper(opened, encoding, newline="")
            while text := reader.read(_CHUNK_BYTES):
                sink.write(text.encode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.path} begins like {encoding.upper()} and is not ({error.reason}); copy it again"
            ) from None


def _check_suffix(file: File) -> None:
    suffix = Path(file.name).suffix.lower()
    if what := _NOT_TEXT.get(suffix):
        raise DataError(f"{file.path} {what.format(suffix=suffix)}; {_way_out(file)}")


def _check_content(file: File, head: bytes, by_name: bool) -> None:
    """Refuses what is no text; `by_name` also what could be."""
    what = next((what for magic, what in _OTHER_FILES.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        what = _UNPACK.format("tar")
    if what:
        raise DataError(f"{file.path} {what}")
    if by_name and b"\0" in head:
        raise DataError(f"{file.path} is not text (it has a byte 0); {_way_out(file)}")


def _way_out(file: File) -> str:
    path = Path(file.path)
    some = path.name if path.suffix.lower() in COMPRESSED or not path.suffix else path.suffix
    return f'leave it out with data.exclude = ["*{some}"], or set data.format = "text" if it is text'
