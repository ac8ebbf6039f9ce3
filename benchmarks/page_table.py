"""Tables that a benchmark keeps in a page of docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def write_into(page: Path, benchmark: str, table: str) -> None:
    """Replaces what stands between the page's comments `<!-- NAME -->` and `<!-- end of NAME -->`."""
    begin, end = f"<!-- {benchmark} -->", f"<!-- end of {benchmark} -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page} has no {begin} with its end")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
