"""How a head's L2 penalty was chosen (`RidgeFit.summary`), as a sentence and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..job.files import read_json

FIT_FILE = "fit.json"  # in the folder of a model whose head was fitted exactly

_EDGES = {
    "low": "; it fell up to the smallest penalty tried",
    "high": "; it fell up to the largest penalty tried, as if the pairs held nothing to learn",
}


def read_fit(model: str) -> dict[str, Any] | None:
    """Return the choice that is saved with the model in the folder `model`; None for another model or a hub name."""
    file = Path(model) / FIT_FILE
    return dict(read_json(file)) if file.is_file() else None


def fit_sentence(fit: Mapping[str, Any]) -> str:
    """Say which penalty was chosen, and how."""
    if not fit["curve"]:
        return f"single head: exact fit with L2 {fit['l2']:g}"
    best = next(point for point in fit["curve"] if point["l2"] == fit["l2"])
    chosen = (
        f"single head: L2 {fit['l2']:g} has the least log-loss on held-out {fit['held_out']}s, {best['log_loss']:.4f} "
        f"(standard error {best['standard_error']:.4f}, {fit['folds']} folds){_EDGES.get(fit['edge'], '')}"
    )
    if fit["held_out"] == "pair":
        chosen += "; all pairs have one prompt, so responses are shared between folds and the log-loss is too low"
    return chosen


def fit_rows(fit: Mapping[str, Any]) -> list[list[str]]:
    """A header, then the held-out log-loss of each penalty, its standard error, and a mark at the chosen one."""
    rows = [["L2 penalty", "held-out log-loss", "standard error", ""]]
    for point in fit["curve"]:
        mark = "chosen" if point["l2"] == fit["l2"] else ""
        rows.append([f"{point['l2']:g}", f"{point['log_loss']:.4f}", f"{point['standard_error']:.4f}", mark])
    return rows
