"""Notes and progress bars on stderr, where they are in no program's way."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def note(text: str) -> None:
    """Prints a remark on stderr, where it is in no program's way."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Prints what the block warns of as one line each, without the place in the source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {' '.join(str(message).split())}")
        yield


@contextlib.contextmanager
def progress_bar(what: str, *, otherwise: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Shows a bar on stderr from the first report until the block ends.

    Args:
      what: the bar's title.
      otherwise: a note to print once instead, where stderr is no terminal.

    Yields:
      A function to call with (bytes done, bytes in all, what is being read).
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)
    started = False

    def update(done: int, total: int, _: str = "") -> None:
        nonlocal started
        if not started:
            started = True
            bar.start()
            if otherwise and not console.is_terminal:
                note(otherwise)
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if started:
            bar.stop()


def spinner(what: str) -> contextlib.AbstractContextManager[object]:
    """Shows on stderr, if a person is watching, that the block is at work."""
    return Console(stderr=True).status(what)


def human_bytes(nbytes: float) -> str:
    """Returns a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
