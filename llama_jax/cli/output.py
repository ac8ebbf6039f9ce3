"""What the verbs print: progress bars and tables for people, one JSON object for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.quantization import Bits
    from llama_jax.text_model import Model


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout."""
    print(json.dumps(value, allow_nan=False))


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


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int] = ()) -> None:
    """Prints a table on stdout.

    Args:
      rows: the cells.
      header: the columns' names.
      right: columns of numbers, aligned on the right.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200).print(table, "")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit at once, with another status


def size(nbytes: float) -> str:
    """Returns a number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def resolve(name_or_path: str) -> Path:
    """Returns a model's path, fetching a known one with a progress bar."""
    from llama_jax import pretrained

    what = f"fetching {name_or_path}"
    with progress_bar(what, otherwise=f"{what} (once) ...") as progress:
        return pretrained.resolve(name_or_path, progress)


def load(name_or_path: str, dtype: str, bits: Bits | None = None, adapter: str | None = None) -> Model:
    """Loads a model with progress bars."""
    from llama_jax import pretrained

    start_jax()
    path = resolve(name_or_path)
    with warnings_as_notes(), progress_bar("loading weights") as progress:
        return pretrained.load(path, dtype, adapter=adapter, bits=bits, stacked=False, progress=progress)


def start_jax() -> None:
    """Has JAX find its devices, and keep what it compiles.

    Raises:
      InputError: if it finds none.
    """
    import jax

    from llama_jax.cli.compiled import keep_compiled_programs

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the platform is known but not here
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX cannot use the platform {platforms!r}: {str(error)[:200] or 'there is none'}; set "
            "JAX_PLATFORMS=cpu, or install JAX for the device"
        ) from None
    keep_compiled_programs()
