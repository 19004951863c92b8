"""Preference pairs whose right answer is one word."""

from __future__ import annotations

import json
from pathlib import Path

GOOD, BAD = ("good", "great", "happy", "lovely", "nice", "fine"), ("bad", "awful", "sad", "poor", "ugly", "boring")


def write_pairs(file: Path, hows: tuple[str, ...]) -> Path:
    """6 prompts and 36 pairs for each of `hows`, as JSON lines."""
    rows = [
        {"prompt": f"was the {thing} {how}", "chosen": f"the {thing} was {good}", "rejected": f"the {thing} was {bad}"}
        for thing in ("day", "food", "hotel", "train", "film", "room")
        for how in hows
        for good, bad in zip(GOOD, BAD, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
