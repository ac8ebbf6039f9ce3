"""Prices of TPU chips: Google Cloud's list prices on demand, as published in 2025, in regions of the US.

From https://cloud.google.com/tpu/pricing: v4 in us-central2, v5e in us-central1, v5p and v6e in us-east5.
Commitments and spot capacity cost less, other regions more. A chip without a price here needs one given.
"""

from __future__ import annotations

PRICES_DATE = "2025"

# Dollars per chip and hour.
DOLLARS_PER_CHIP_HOUR = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}


def chip_hour_dollars(kind: str, given: float | None = None) -> tuple[float | None, str]:
    """The price of an hour of a chip, and where it is from; None where none is known.

    Args:
      kind: the chip, such as `v5p`.
      given: a price that replaces the table's.
    """
    if given is not None:
        return given, "as given"
    price = DOLLARS_PER_CHIP_HOUR.get(kind)
    if price is None:
        return None, f"no price of {kind} is listed; give one with --price"
    return price, f"list price on demand, US, {PRICES_DATE}"
