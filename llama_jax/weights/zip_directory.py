"""Reads the central directory of a zip archive whose entries are uncompressed and unencrypted.

Format: PKWARE's APPNOTE.TXT. Python's `zipfile` accepts more, and validates less.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import check_overlaps, quote

# Local file header, central directory header, zip64 end of central directory record and its locator (large
# archives only), and end of central directory record.
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, LOCATOR64_MAGIC = b"PK\x06\x06", b"PK\x06\x07"

ZIP64_SENTINEL = 0xFFFFFFFF  # marks a value that does not fit in 32 bits and is in the zip64 extra field
ZIP64_EXTRA_ID = 1

_MAX_DIRECTORY_BYTES = 16 << 20  # 200,000 entries; a model of 1,000 tensors takes 100 kB
_ENCRYPTED = 0x2041
_SYMLINK = 0o12


class Entry(NamedTuple):
    """One file in an archive: offset of its data, size in bytes, and CRC-32.

    A CRC-32 of 0 was not computed: `torch.serialization.set_crc32_options(False)` writes such archives.
    """

    begin: int
    size: int
    crc: int

    def read(self, path: Path, file: BinaryIO, limit: int) -> bytes:
        """Reads the data of a small entry.

        Raises:
          CheckpointError: if it is larger than `limit`, or its checksum does not match.
        """
        if self.size > limit:
            raise archive_error(path, f"an entry has {self.size} bytes; at most {limit} are read")
        file.seek(self.begin)
        data = file.read(self.size)
        if self.crc and zlib.crc32(data) != self.crc:
            raise archive_error(path, f"the checksum of the entry at byte {self.begin} does not match")
        return data


def read_directory(path: Path, file: BinaryIO, size: int) -> dict[str, Entry]:
    """Reads an archive's central directory and every entry's local header.

    Args:
      path: the archive, for error messages.
      file: the open archive.
      size: its size in bytes.

    Returns:
      The entries by name.

    Raises:
      CheckpointError: if the archive is truncated or malformed, or an entry is compressed, encrypted or a
        link, overlaps another, has a duplicate name, or has a path outside the archive.
    """
    begin, end, count = _find_directory(path, file, size)
    file.seek(begin)
    directory = file.read(end - begin)
    entries: dict[str, Entry] = {}
    spans = []
    position = 0
    while position + CENTRAL.size <= len(directory):
        header = CENTRAL.unpack_from(directory, position)
        magic, _, _, flags, method, _, _, crc, compressed, nbytes, *lengths, disk, _, mode, offset = header
        raw, extra, comment = _split(directory[position + CENTRAL.size :][: sum(lengths)], lengths)
        position += CENTRAL.size + sum(lengths)
        name = raw.decode("utf-8", "replace")
        if magic != CENTRAL_MAGIC or disk or len(comment) != lengths[2]:
            raise archive_error(path, "its directory is malformed")
        if method or flags & _ENCRYPTED:
            raise archive_error(path, f"entry {quote(name)} is compressed or encrypted")
        if not _is_plain(name) or mode >> 28 == _SYMLINK:
            raise archive_error(path, f"entry {quote(name)} is a link, or has a path outside the archive")
        if name in entries:
            raise archive_error(path, f"entry {quote(name)} appears twice")
        nbytes, compressed, offset = _resolve_zip64(path, extra, nbytes, compressed, offset)
        data = _data_offset(path, file, offset, raw, nbytes) if offset < begin else offset
        if nbytes != compressed or data + nbytes > begin:
            raise archive_error(
                path, f"entry {quote(name)} at byte {offset} has {compressed} bytes for {nbytes}"
            )
        entries[name] = Entry(data, nbytes, crc)
        spans.append((offset, data + nbytes, name))
    if position != len(directory) or len(entries) != count:
        raise archive_error(
            path, f"its directory has {len(entries)} entries in {position} bytes, not {count}"
        )
    check_overlaps(path, spans)
    return entries


def _find_directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns the begin and end offsets of the central directory, and its number of entries."""
    file.seek(max(size - END.size, 0))
    tail = file.read(END.size)
    if len(tail) < END.size or tail[:4] != END_MAGIC:
        raise CheckpointError(f"{path}: truncated: there is no zip directory at its end; download it again")
    _, *disks, _, count, length, begin, comment = END.unpack(tail)
    end = size - END.size
    file.seek(max(end - LOCATOR64.size - END64.size, 0))
    before = file.read(END64.size + LOCATOR64.size)
    if before[END64.size :].startswith(LOCATOR64_MAGIC):
        end -= len(before)
        magic, _, _, _, *disks, _, count, length, begin = END64.unpack_from(before)
        if magic != END64_MAGIC or LOCATOR64.unpack_from(before, END64.size)[2] != end:
            raise archive_error(path, "the end of its directory is malformed")
    if any(disks) or comment or begin + length != end:
        raise archive_error(
            path, f"its directory of {length} bytes at byte {begin} does not end at byte {end}"
        )
    if length > _MAX_DIRECTORY_BYTES:
        raise archive_error(
            path, f"its directory has {length} bytes; at most {_MAX_DIRECTORY_BYTES} are read"
        )
    return begin, end, count


def _data_offset(path: Path, file: BinaryIO, offset: int, name: bytes, nbytes: int) -> int:
    """Returns the offset of an entry's data, from its local header, which must match the directory."""
    file.seek(offset)
    start = file.read(LOCAL.size + len(name))
    if len(start) == LOCAL.size + len(name):
        magic, _, flags, method, _, _, _, compressed, size, name_length, extra_length = LOCAL.unpack_from(
            start
        )
        same_name = name_length == len(name) and start.endswith(name)
        # Sizes are 0 if they follow the data, as in torch's files.
        same_sizes = {compressed, size} <= {0, ZIP64_SENTINEL, nbytes}
        if magic == LOCAL_MAGIC and not method and not flags & _ENCRYPTED and same_name and same_sizes:
            return offset + len(start) + extra_length
    shown = quote(name.decode("utf-8", "replace"))
    raise archive_error(path, f"the header of entry {shown} at byte {offset} does not match the directory")


def _split(data: bytes, lengths: list[int]) -> tuple[bytes, bytes, bytes]:
    first, second = lengths[0], lengths[0] + lengths[1]
    return data[:first], data[first:second], data[second:]


def _resolve_zip64(path: Path, extra: bytes, *numbers: int) -> list[int]:
    """Replaces sentinel values by the 64-bit values of the zip64 extra field, in order."""
    wide = b""
    while len(extra) >= 4 and not wide:
        kind, length = struct.unpack_from("<2H", extra)
        wide = extra[4 : 4 + length] if kind == ZIP64_EXTRA_ID else b""
        extra = extra[4 + length :]
    out = []
    for number in numbers:
        if number == ZIP64_SENTINEL:
            if len(wide) < 8:
                raise archive_error(path, "an entry of its directory lacks its size or offset")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        out.append(number)
    return out


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path without `..`, `.` or empty components."""
    return not set(name.split("/")) & {"", ".", ".."} and not set(name) & set("\\:\0\r\n\ufffd")


def archive_error(path: Path, problem: str) -> CheckpointError:
    """Returns the error of a malformed or damaged archive."""
    return CheckpointError(
        f"{path}: {problem}; the file is damaged, or torch.save did not write it: download it again"
    )
