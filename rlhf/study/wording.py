"""How a study writes its numbers, and by which rule an interval becomes a word."""

from __future__ import annotations

from collections.abc import Sequence


def interval(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) -> "[low, high]"; "" where the data gave none."""
    _, low, high = values
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def signed(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) of a difference -> "+value [+low, +high]"."""
    value, low, high = values
    if value is None:
        return ""
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdict(values: Sequence[float | None]) -> str:
    """`higher` or `lower` where the interval (value, low, high) leaves 0 out, else `no difference shown`."""
    _, low, high = values
    if low is not None and low > 0:
        return "higher"
    if high is not None and high < 0:
        return "lower"
    return "no difference shown"
