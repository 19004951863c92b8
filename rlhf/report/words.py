"""Numbers, intervals, tables and messages as text."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

FEW_PROMPTS = 20  # a percentile bootstrap over fewer clusters gives intervals that are too narrow


def count(number: int, what: str) -> str:
    """A number with its noun: "1 sample", "2 samples"."""
    return f"{number} {what}{'s' * (number != 1)}"


def plain_text(text: str | Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> str:
    """Return a text unchanged, and messages as their contents and tool calls (as JSON), one per line."""
    if isinstance(text, str):
        return text
    if isinstance(text, Mapping) and "text" in text:
        return f"{text['system']}\n\n{text['text']}"
    parts = []
    for message in text["messages"] if isinstance(text, Mapping) else text:
        parts += [message["content"]] if message.get("content") else []
        parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(parts)


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """A table whose columns are padded to their widest cell; cells of the columns `left` start at the left edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def interval(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) -> "[low, high]"; "" if the data gave no interval."""
    _, low, high = values
    return "" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def signed(values: Sequence[float | None], digits: int = 2) -> str:
    """(value, low, high) of a difference -> "+value [+low, +high]"; without an interval the value alone."""
    value, low, high = values
    if value is None:
        return ""
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdict(
    values: Sequence[float | None],
    higher: str = "higher",
    lower: str = "lower",
    neither: str = "no difference shown",
    *,
    reference: float = 0.0,
) -> str:
    """`higher` or `lower` if the interval of (value, low, high) excludes `reference`, else `neither`."""
    _, low, high = values
    if low is not None and low > reference:
        return higher
    if high is not None and high < reference:
        return lower
    return neither


def accuracy_cells(found: Mapping[str, Any], *, sign: bool = False) -> list[str]:
    """An accuracy, or with `sign` a difference of two, and its interval in percent: ["71.9", "65.0 to 80.0"].

    found: has "value", "low" and "high", as `Interval._asdict()`; None becomes "-".
    """
    form = "+.1f" if sign else ".1f"
    value, low, high = (
        None if found[key] is None else f"{100 * found[key]:{form}}" for key in ("value", "low", "high")
    )
    return [value or "-", "-" if low is None or high is None else f"{low} to {high}"]


def few_prompts(prompts: int) -> str:
    """A warning if intervals resample so few prompts that they are too narrow, else ""."""
    if prompts >= FEW_PROMPTS:
        return ""
    return f"The intervals resample {count(prompts, 'prompt')}; with fewer than {FEW_PROMPTS} they are too narrow."


def truncated_texts(truncated: int, texts: int) -> str:
    """Say how many of `texts` were longer than the model reads and lost their beginning; "" if none did."""
    if not truncated:
        return ""
    verb = "was" if truncated == 1 else "were"
    return f"{truncated} of {count(texts, 'text')} {verb} too long and read without the beginning"
