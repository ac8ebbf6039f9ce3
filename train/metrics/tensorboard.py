"""TensorBoard event files, written at once and by the calling thread.

The writer of tensorboardX does so in a thread behind a bounded queue: after a moment's full disk that thread
is dead, and the training waits for it forever. Here a record that cannot be written is left out, with a
warning.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text as summary_of_text

from llama_jax.errors import InputError, StoreError

from .append_file import AppendFile


class EventWriter:
    """Writes scalars to an event file of its own.

    Args:
      folder: the directory of event files that TensorBoard reads.
      first_step: TensorBoard hides what earlier files hold of this step and later ones.
      warn: called with a message when events cannot be written, once until they can be again.
    """

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file, self._warn = AppendFile(folder / name), warn
        self._failing = False
        start = SessionLog(status=SessionLog.START)
        # Begins every event file; kept until a record is written, so that the file never lacks it.
        self._header = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._header += _record(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of a step, by tag; NaN and infinity too."""
        self._add(
            Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step
        )

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text in Markdown."""
        self._add(summary_of_text(tag, text), step)

    def _add(self, summary: Summary, step: int) -> None:
        try:
            self._file.append(
                self._header + _record(Event(wall_time=time.time(), step=step, summary=summary))
            )
            self._header, self._failing = b"", False
        except (InputError, StoreError) as error:
            if not self._failing:
                self._warn(f"warning: {error}; until it can be, training goes on without TensorBoard")
            self._failing = True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _record(event: Event) -> bytes:
    """Serializes an event as a TFRecord: its length and its bytes, each with a CRC."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))]
    )
