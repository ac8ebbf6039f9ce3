"""Tables that benchmarks keep in pages."""

from __future__ import annotations

import pytest

from benchmarks import page_table


def test_a_table_replaces_what_stood_between_its_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- b -->\nold\n<!-- end of b -->\nafter\n")
    for cell in ("1", "2"):
        page_table.write_into(page, "b", page_table.markdown(["x", "y"], [[cell, "z"]]))
        assert page.read_text() == (
            f"before\n<!-- b -->\n| x | y |\n| --- | --- |\n| {cell} | z |\n<!-- end of b -->\nafter\n"
        )


def test_a_page_without_the_comments_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- b -->\n")
    with pytest.raises(ValueError, match="<!-- b --> with its end"):
        page_table.write_into(page, "b", "table")
    assert page.read_text() == "<!-- b -->\n"
