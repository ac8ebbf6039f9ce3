"""Runs the notebooks from top to bottom: `python -m notebooks.run [NAME ...] [--out FOLDER] [--jobs N]`.

Each is a text file of cells (jupytext's percent format), converted to a notebook in memory and run in its own
kernel. The first cell that fails ends its notebook; the cell and its error are printed, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SLOW_S = 180  # a notebook that runs alone should take less
CELL_TIMEOUT_S = 900
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of running one notebook; `error` is empty on success."""

    name: str
    seconds: float
    cells: int
    figures: int
    error: str

    @property
    def remarks(self) -> str:
        """What needs attention, or `ok`."""
        found = [
            ("failed", bool(self.error)),
            ("no figure", not self.figures),
            ("over three minutes", self.seconds > SLOW_S),
        ]
        return ", ".join(text for text, applies in found if applies) or "ok"


def names() -> list[str]:
    """The names of all notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


async def run(path: Path, out: Path | None) -> Report:
    """Runs one notebook in its own folder, as Jupyter would, and writes it to `out`, as .ipynb and .html."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbconvert import HTMLExporter

    notebook = jupytext.read(path)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    start, error = time.perf_counter(), ""
    try:
        await client.async_execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as raised:
        error = failure(path, notebook, raised)
    seconds = time.perf_counter() - start
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out / f"{path.stem}.ipynb")
        html, _ = HTMLExporter().from_notebook_node(notebook)
        (out / f"{path.stem}.html").write_text(html, encoding="utf-8")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    figures = sum("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    return Report(path.stem, seconds, len(code), figures, error)


async def run_all(selected: list[str], out: Path | None, jobs: int) -> list[Report]:
    """Runs notebooks, `jobs` of them at a time; a failure is printed when it happens."""
    gate = asyncio.Semaphore(jobs)

    async def one(name: str) -> Report:
        async with gate:
            print(f"{name} ...", flush=True)
            report = await run(FOLDER / f"{name}.py", out)
        print(f"{name}: {report.seconds:.0f} s", flush=True)
        if report.error:
            print(report.error, file=sys.stderr, flush=True)
        return report

    return await asyncio.gather(*map(one, selected))


def failure(path: Path, notebook: Any, raised: Exception) -> str:
    """The failing cell's file and line, its source, and the traceback."""
    started = [c for c in notebook.cells if c.cell_type == "code" and "iopub.status.busy" in _times(c)]
    cell = started[-1] if started else None
    source = cell.source if cell else ""
    before = path.read_text(encoding="utf-8").partition(source)[0] if source else ""
    shown = [o for o in (cell.outputs if cell else []) if o.output_type == "error"]
    trace = "\n".join(shown[0].traceback) if shown else f"{type(raised).__name__}: {raised}"
    numbered = "\n".join(f"    {line}" for line in source.splitlines())
    return f"{path.name}, the cell at line {before.count(chr(10)) + 1}:\n{numbered}\n\n{ANSI.sub('', trace)}"


def _times(cell: Any) -> Any:
    return cell.metadata.get("execution", {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a name or its prefix, such as 03; all by default"
    )
    parser.add_argument(
        "--out", type=Path, help="write the notebooks with their outputs here, as .ipynb and .html"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time (default: 1)")
    args = parser.parse_intermixed_args()
    selected = [name for name in names() if not args.names or any(map(name.startswith, args.names))]
    for given in args.names:
        if not any(name.startswith(given) for name in names()):
            print(f"error: there is no notebook {given!r}; there are {', '.join(names())}", file=sys.stderr)
            return 2
    reports = asyncio.run(run_all(selected, args.out, args.jobs))
    print(f"\n{'notebook':<32}{'seconds':>8}{'cells':>7}{'figures':>9}  ")
    for report in reports:
        print(
            f"{report.name:<32}{report.seconds:>8.0f}{report.cells:>7}{report.figures:>9}  {report.remarks}"
        )
    return int(any(report.error for report in reports))


if __name__ == "__main__":
    sys.exit(main())
