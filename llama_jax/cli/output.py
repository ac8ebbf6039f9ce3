"""Output of the subcommands on stdout: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout."""
    print(json.dumps(value, allow_nan=False))


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int] = ()) -> None:
    """Prints a table on stdout.

    Args:
      rows: the cells.
      header: the column names.
      right: indices of the right-aligned columns.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    _Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200).print(table, "")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with status 1; `exit_status` handles this error
