"""The compatibility matrix: checkpoints as other programs write them give the same here as there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

for package in ("torch", "transformers", "peft", "xllamacpp"):
    pytest.importorskip(package, reason="needs the `parity` extra")

from tests.parity.compatibility.compare import TOLERANCE, compare  # noqa: E402
from tests.parity.compatibility.variants import VARIANTS  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str) -> None:
    result = compare(VARIANTS[name])
    assert result.lines == ()
    assert result.error <= TOLERANCE
    assert result.text == result.reference_text
    assert result.chat is not False


def test_the_page_lists_every_variant() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert [row for row in re.findall(r"^\| (.+?) \|", page, re.M) if row not in ("variant", "---")] == [
        *VARIANTS
    ]
