"""Errors of the engine that callers tell apart."""

from __future__ import annotations


class ItemError(ValueError):
    """An item cannot be encoded. `reason` is the message without the item's name, for callers with a file and line."""

    def __init__(self, reason: str, name: str = "item") -> None:
        super().__init__(f"Scorer: {name}: {reason}")
        self.reason = reason
