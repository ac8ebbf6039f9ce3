"""Notes and progress bars on stderr, so that stdout holds only the output."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")


# Control characters, except tab and newline, and how they are shown: escape sequences can move a terminal's
# cursor, set its title, or answer for its user.
_ESCAPES = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def printable(text: str) -> str:
    r"""Escapes control characters, as in `\x1b`: for names and texts that come from elsewhere."""
    return text.translate(_ESCAPES)


def write(text: str) -> None:
    """Writes generated text to stdout at once: as it is to a file or a pipe, `printable` on a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def note(text: str) -> None:
    """Prints a line of information on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def console(*, stderr: bool = False) -> Console:
    """A rich console; without any style where `NO_COLOR` is set, bold and underlined text included."""
    system: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return _Console(stderr=stderr, highlight=False, color_system=system)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1


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
    screen = console(stderr=True)
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task(title, total=None)
    started = False

    def update(done: int, total: int, _: str = "") -> None:
        nonlocal started
        if not started:
            started = True
            bar.start()
            if fallback and not screen.is_terminal:
                note(fallback)
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if started:
            bar.stop()


@contextlib.contextmanager
def counting_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar on stderr for each kind of work, from its first update until the block ends.

    Yields:
      update(title, done, total).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = console(stderr=True)
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:

        def update(title: str, done: int, total: int) -> None:
            if title not in bars:
                bars[title] = progress.add_task(title, total=total)
            progress.update(bars[title], completed=done, total=total)

        yield update


def spinner(text: str) -> contextlib.AbstractContextManager[object]:
    """Shows a spinner on stderr while the block runs; nothing if stderr is not a terminal."""
    return console(stderr=True).status(text)


def spin_until_first(start: Callable[[], Iterable[T]]) -> Iterator[T]:
    """Yields the items of `start()`, with a spinner until the first one: XLA compiles before it."""
    with spinner("waiting for the first token (XLA compiles once per model and length) ..."):
        items = iter(start())
        first = list(itertools.islice(items, 1))
    yield from first
    yield from items


def human_bytes(nbytes: float) -> str:
    """Formats a number of bytes with a unit, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
