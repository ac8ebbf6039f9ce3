"""Output of the subcommands on stdout: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len

from llama_jax.console import terminal

_GAP = "  "
_LEAST_TEXT = 24  # the narrowest column whose text is wrapped


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout."""
    print(json.dumps(value, allow_nan=False))


def print_line(text: str) -> None:
    """Prints a line that holds names from files, see `terminal.write`."""
    terminal.write(text + "\n")


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int] = ()) -> None:
    """Prints a table on stdout, and an empty line.

    Columns without content are left out. On a terminal that is too narrow the text of the last column is
    wrapped; if that holds numbers, the first column's names get lines of their own. Names are never broken.

    Args:
      rows: the cells.
      header: the column names.
      right: indices of the right-aligned columns.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 30
    filled = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]  # others are not shown
    cells = [[terminal.printable(row[i]) for i in filled] for row in (header, *rows)]
    right = [place for place, i in enumerate(filled) if i in right]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    last = len(filled) - 1
    wrapped = excess > 0 and last not in right and widths[last] - excess >= _LEAST_TEXT
    names_above = excess > 0 and not wrapped
    if wrapped:
        widths[last] -= excess
    elif names_above:
        widths[0] = 0
    for number, row in enumerate(cells):
        if names_above:
            print(row[0])
        columns = [[cell] for cell in row]
        if names_above:
            columns[0] = [""]
        elif wrapped:
            columns[last] = textwrap.wrap(row[last], widths[last])
        for line in zip_longest(*columns, fillvalue=""):
            aligned = [_align(cell, widths[i], i in right) for i, cell in enumerate(line)]
            print(_GAP.join(aligned).rstrip())
        if number == 0:
            print("─" * min(width, sum(widths) + len(_GAP) * last))
    print()


def _align(text: str, width: int, right: bool) -> str:
    padding = " " * max(width - cell_len(text), 0)
    return padding + text if right else text + padding
