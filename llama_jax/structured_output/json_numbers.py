"""Numbers of JSON within bounds, as regular expressions."""

from __future__ import annotations

import math
from decimal import Decimal

# No longer than that: a float holds fifteen digits, and a model might not stop.
_DIGITS = 15
_LIMIT = 10**_DIGITS - 1
INTEGER = rf"-?(?:0|[1-9][0-9]{{0,{_DIGITS - 1}}})"
NUMBER = rf"{INTEGER}(?:\.[0-9]{{1,{_DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"


def integer(low: Decimal | None, high: Decimal | None) -> str | None:
    """Integers from `low` to `high`, both included, of at most 15 digits; None if there are none."""
    if low is None and high is None:
        return INTEGER
    smallest = -_LIMIT if low is None else max(math.ceil(low), -_LIMIT)
    largest = _LIMIT if high is None else min(math.floor(high), _LIMIT)
    negative = ["-" + "".join(digits) for digits in _ranges(max(1, -largest), -smallest)]
    return _any_of(negative + ["".join(digits) for digits in _ranges(max(0, smallest), largest)])


def number(
    low: Decimal | None, high: Decimal | None, *, above: bool = False, below: bool = False
) -> str | None:
    """Numbers without an exponent from `low` to `high`; None if there are none.

    Args:
      low: the lower bound.
      high: the upper bound.
      above: whether the lower bound itself is out.
      below: whether the upper bound itself is out.
    """
    if low is None and high is None:
        return NUMBER
    low = Decimal(-_LIMIT) if low is None else max(low, Decimal(-_LIMIT))
    high = Decimal(_LIMIT) if high is None else min(high, Decimal(_LIMIT))
    # In units of the last place of the bounds.
    places = max(0, *(-int(bound.normalize().as_tuple().exponent) for bound in (low, high)))
    first, last = int(low.scaleb(places)), int(high.scaleb(places))
    parts = []
    if places:
        smallest, largest = math.ceil(low), math.floor(high)
        smallest, largest = smallest + (above and smallest == low), largest - (below and largest == high)
        parts = [whole] if (whole := integer(Decimal(smallest), Decimal(largest))) else []
    if first < 0:
        parts += ["-" + text for text in _decimals(max(0, -last), -first, places, last >= 0 or below, above)]
    if last >= 0:
        parts += _decimals(max(0, first), last, places, above and first >= 0, below)
    return _any_of(parts)


def _decimals(low: int, high: int, places: int, above: bool, below: bool) -> list[str]:
    """The numbers from low to high, in units of the last of `places` places; without these two, if so."""
    more = rf"[0-9]{{0,{max(1, _DIGITS - places)}}}" if places else rf"(?:\.[0-9]{{1,{_DIGITS}}})?"
    inside = _any_of([_with_point(digits, places) for digits in _ranges(low + above, high - 1, places + 1)])
    texts = [] if inside is None else [inside + more]
    if above and low < high:
        texts += [
            _with_point(digits, places) + ("" if places else r"\.") + "0{0,6}[1-9][0-9]{0,7}"
            for digits in _ranges(low, low, places + 1)
        ]
    if not below and low + above <= high:
        texts += [_with_point(digits, places) for digits in _ranges(high, high, places + 1)]
    return texts


def _with_point(digits: list[str], places: int) -> str:
    whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :]
    return "".join(whole) + (r"\." + "".join(fraction) if places else "")


def _ranges(low: int, high: int, width: int = 1) -> list[list[str]]:
    """The decimal texts of low..high with at least `width` digits: sequences of digits and classes."""
    out: list[list[str]] = []
    for length in range(max(width, len(str(low))), max(width, len(str(high))) + 1):
        first = low if length == width else max(low, 10 ** (length - 1))
        last = min(high, 10**length - 1)
        if first <= last:
            out += _between(str(first).zfill(length), str(last).zfill(length))
    return out


def _between(low: str, high: str) -> list[list[str]]:
    """The texts of digits from low to high, which have equal lengths."""
    if low == high:
        return [list(low)]
    if low[0] == high[0]:
        return [[low[0], *rest] for rest in _between(low[1:], high[1:])]
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    first, last = int(low[0]), int(high[0])
    before: list[list[str]] = []
    after: list[list[str]] = []
    if low[1:] != zeros:
        before, first = [[low[0], *rest] for rest in _between(low[1:], nines)], first + 1
    if high[1:] != nines:
        after, last = [[high[0], *rest] for rest in _between(zeros, high[1:])], last - 1
    middle = [[f"[{first}-{last}]", *["[0-9]"] * len(zeros)]] if first <= last else []
    return before + middle + after


def _any_of(texts: list[str]) -> str | None:
    return f"(?:{'|'.join(texts)})" if texts else None
