"""Reads the directory of a zip archive whose entries are plain: uncompressed, unencrypted, each in its place.

PKWARE's APPNOTE.TXT has the format. Python's `zipfile` reads more than this, and believes more of it.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import check_overlaps, quote

# An entry's own header, its header in the directory, and what ends the directory: of a large archive a longer
# end that the locator leads to comes first.
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
END = struct.Struct("<4s4H2LH")
LOCAL_MAGIC, CENTRAL_MAGIC, END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
END64_MAGIC, LOCATOR64_MAGIC = b"PK\x06\x06", b"PK\x06\x07"

FULL = 0xFFFFFFFF  # stands for a number too large for its place, which is in an extra field instead
ZIP64 = 1  # that field's id

_MAX_DIRECTORY = 16 << 20  # 200,000 entries; a model of 1,000 tensors takes 100 kB
_ENCRYPTED = 0x2041
_SYMLINK = 0o12


class Entry(NamedTuple):
    """One file in an archive: where its bytes begin, how many they are, and their checksum."""

    begin: int
    size: int
    crc: int

    def read(self, path: Path, file: BinaryIO, limit: int) -> bytes:
        """Reads a small one whole.

        Raises:
          CheckpointError: if it is larger than `limit`, or not what its checksum says.
        """
        if self.size > limit:
            raise damaged(path, f"an entry has {self.size} bytes, where at most {limit} are read")
        file.seek(self.begin)
        data = file.read(self.size)
        if zlib.crc32(data) != self.crc:
            raise damaged(path, f"the checksum of the entry at byte {self.begin} does not match")
        return data


def read_directory(path: Path, file: BinaryIO, size: int) -> dict[str, Entry]:
    """Reads an archive's directory and every entry's own header.

    Args:
      path: the archive's, for messages.
      file: it, open.
      size: its bytes.

    Returns:
      The entries by name.

    Raises:
      CheckpointError: if the archive is truncated or malformed, or an entry is compressed, encrypted, a link,
        shares bytes or a name with another, or has a name that leads elsewhere.
    """
    begin, end, count = _find_directory(path, file, size)
    file.seek(begin)
    directory = file.read(end - begin)
    entries: dict[str, Entry] = {}
    spans = []
    at = 0
    while at + CENTRAL.size <= len(directory):
        header = CENTRAL.unpack_from(directory, at)
        magic, _, _, flags, method, _, _, crc, packed, nbytes, *lengths, disk, _, mode, place = header
        raw, extra, comment = _split(directory[at + CENTRAL.size :][: sum(lengths)], lengths)
        at += CENTRAL.size + sum(lengths)
        name = raw.decode("utf-8", "replace")
        if magic != CENTRAL_MAGIC or disk or len(comment) != lengths[2]:
            raise damaged(path, "its directory is malformed")
        if method or flags & _ENCRYPTED:
            raise damaged(path, f"entry {quote(name)} is compressed or encrypted")
        if not _is_plain(name) or mode >> 28 == _SYMLINK:
            raise damaged(path, f"entry {quote(name)} is a link, or has a name that leads elsewhere")
        if name in entries:
            raise damaged(path, f"entry {quote(name)} is there twice")
        nbytes, packed, place = _zip64(path, extra, nbytes, packed, place)
        data = _data_offset(path, file, place, raw, nbytes) if place < begin else place
        if nbytes != packed or data + nbytes > begin:
            raise damaged(path, f"entry {quote(name)} at byte {place} has {packed} bytes for {nbytes}")
        entries[name] = Entry(data, nbytes, crc)
        spans.append((place, data + nbytes, name))
    if at != len(directory) or len(entries) != count:
        raise damaged(path, f"its directory has {len(entries)} entries in {at} bytes, not {count}")
    check_overlaps(path, spans)
    return entries


def _find_directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Returns where the directory begins and ends, and how many entries it has."""
    file.seek(max(size - END.size, 0))
    tail = file.read(END.size)
    if len(tail) < END.size or tail[:4] != END_MAGIC:
        raise CheckpointError(f"{path}: truncated: no zip directory is at its end; get it again")
    _, *disks, _, count, length, begin, comment = END.unpack(tail)
    place = size - END.size
    file.seek(max(place - LOCATOR64.size - END64.size, 0))
    before = file.read(END64.size + LOCATOR64.size)
    if before[END64.size :].startswith(LOCATOR64_MAGIC):
        place -= len(before)
        magic, _, _, _, *disks, _, count, length, begin = END64.unpack_from(before)
        if magic != END64_MAGIC or LOCATOR64.unpack_from(before, END64.size)[2] != place:
            raise damaged(path, "the end of its directory is malformed")
    if any(disks) or comment or begin + length != place:
        raise damaged(path, f"its directory of {length} bytes at byte {begin} does not end at byte {place}")
    if length > _MAX_DIRECTORY:
        raise damaged(path, f"its directory has {length} bytes, where at most {_MAX_DIRECTORY} are read")
    return begin, place, count


def _data_offset(path: Path, file: BinaryIO, place: int, name: bytes, nbytes: int) -> int:
    """Returns where an entry's bytes begin, from its own header, which must agree with the directory."""
    file.seek(place)
    start = file.read(LOCAL.size + len(name))
    if len(start) == LOCAL.size + len(name):
        magic, _, flags, method, _, _, _, packed, size, name_length, extra_length = LOCAL.unpack_from(start)
        same_name = name_length == len(name) and start.endswith(name)
        same_sizes = {packed, size} <= {0, FULL, nbytes}  # 0 where they follow the data, as in torch's files
        if magic == LOCAL_MAGIC and not method and not flags & _ENCRYPTED and same_name and same_sizes:
            return place + len(start) + extra_length
    shown = quote(name.decode("utf-8", "replace"))
    raise damaged(path, f"the header of entry {shown} at byte {place} is not what the directory says")


def _split(data: bytes, lengths: list[int]) -> tuple[bytes, bytes, bytes]:
    first, second = lengths[0], lengths[0] + lengths[1]
    return data[:first], data[first:second], data[second:]


def _zip64(path: Path, extra: bytes, *numbers: int) -> list[int]:
    """Fills in the numbers that stand in the zip64 field, in their order."""
    wide = b""
    while len(extra) >= 4 and not wide:
        kind, length = struct.unpack_from("<2H", extra)
        wide = extra[4 : 4 + length] if kind == ZIP64 else b""
        extra = extra[4 + length :]
    out = []
    for number in numbers:
        if number == FULL:
            if len(wide) < 8:
                raise damaged(path, "an entry of its directory lacks its size or place")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        out.append(number)
    return out


def _is_plain(name: str) -> bool:
    """Whether a name is a relative path that goes down alone."""
    return not set(name.split("/")) & {"", ".", ".."} and not set(name) & set("\\:\0\r\n\ufffd")


def damaged(path: Path, what: str) -> CheckpointError:
    """An error that names the archive and says what is wrong with it."""
    return CheckpointError(f"{path}: {what}; the file is damaged, or not of torch.save: get it again")
