"""Notes and progress bars on stderr, so that stdout holds only the output."""

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
    """Prints a line of information on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Prints each warning of the block as one line on stderr, without its source location."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {' '.join(str(message).split())}")
        yield


@contextlib.contextmanager
def progress_bar(title: str, *, fallback: str = "") -> Iterator[Callable[[int, int, str], None]]:
    """Shows a progress bar on stderr, from the first update until the block ends.

    Args:
      title: shown before the bar.
      fallback: a note to print once in place of the bar if stderr is not a terminal.

    Yields:
      update(bytes_done, bytes_total, name of the item in progress).
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
    task = bar.add_task(title, total=None)
    started = False

    def update(done: int, total: int, _: str = "") -> None:
        nonlocal started
        if not started:
            started = True
            bar.start()
            if fallback and not console.is_terminal:
                note(fallback)
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if started:
            bar.stop()


def spinner(text: str) -> contextlib.AbstractContextManager[object]:
    """Shows a spinner on stderr while the block runs; nothing if stderr is not a terminal."""
    return Console(stderr=True).status(text)


def human_bytes(nbytes: float) -> str:
    """Formats a number of bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
