"""Numbers, counts, intervals and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, what: str) -> str:
    """The number of things: "1 sample", "2 samples"."""
    return f"{number} {what}{'s' * (number != 1)}"


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


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text(response: str | list[dict[str, str]]) -> str:
    return response if isinstance(response, str) else "\n".join(message["content"] for message in response)
