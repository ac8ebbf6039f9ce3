"""Where the quantized goldens are; make_quantized.py writes them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "quantized"
