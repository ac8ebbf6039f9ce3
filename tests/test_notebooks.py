"""The notebook runner reports success and failure, with the failing cell."""

from __future__ import annotations

import asyncio

import pytest

from notebooks import run

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
pytest.importorskip("nbconvert")
pytest.importorskip("ipykernel")

HEADER = "# %% [markdown]\n# # A story\n\n"


def test_there_are_notebooks_and_each_begins_with_a_title():
    assert run.names()
    for name in run.names():
        text = (run.FOLDER / f"{name}.py").read_text(encoding="utf-8")
        first = text.partition("# %% [markdown]\n")[2]
        assert first.startswith("# # "), name
        assert max(map(len, text.splitlines())) <= 110, name


@pytest.mark.slow
def test_what_a_notebook_came_to(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(f"{HEADER}# %%\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\n\n# %%\nprint(1)\n")
    bad = tmp_path / "bad.py"
    bad.write_text(
        f"{HEADER}# %%\nx = 1\n\n# %%\n# a cell\nassert x == 2, 'not two'\n\n# %%\nprint('never')\n"
    )

    async def both():  # at a time
        return await asyncio.gather(run.run(good, tmp_path / "out"), run.run(bad, None))

    report, failed = asyncio.run(both())
    assert (report.error, report.cells, report.figures, report.remarks) == ("", 2, 1, "ok")
    assert '"image/png"' in (tmp_path / "out" / "good.ipynb").read_text()
    page = (tmp_path / "out" / "good.html").read_text()
    assert "A story" in page and "data:image/png;base64," in page

    assert failed.error.startswith("bad.py, the cell at line 8:\n    # a cell\n    assert x == 2")
    assert "AssertionError: not two" in failed.error and "\x1b" not in failed.error
    assert failed.remarks == "failed, no figure"


def test_an_unknown_name_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "99"])
    assert run.main() == 2
    assert capsys.readouterr().err.startswith(
        "error: there is no notebook '99'; there are 01_the_llama_block"
    )
