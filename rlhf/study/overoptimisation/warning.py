"""Run `prudent study warning`: how many steps before gold falls does each signal of a PPO run cross a threshold?

Gold is not known in practice, so a threshold on a signal must come from other runs. Here it is fixed on the runs with
another seed (or another gold) in which gold stays: the smallest that at most 5 % (10 %) of them ever cross.
Everything is read from the runs' metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...evaluation.statistics import mean_interval, share_interval
from ...job.config import load_config
from ...job.log import read_metrics
from ...ppo.config import PPOConfig
from ..result import StudyResult, command, run_study
from . import warning_report
from .config import WarningConfig

Side = Literal["up", "down", "both"]
# metric -> its name in tables, and the side on which it warns
WATCHED: dict[str, tuple[str, Side]] = {
    "reward/distance": ("distance", "up"),
    "text/foreign": ("share foreign", "up"),
    "reward/disagreement": ("heads' disagreement", "up"),
    "reward/head_std": ("heads' std", "up"),
    "reward/gap": ("gap, nominal - worst", "up"),
    "reward/mean": ("reward", "up"),
    "kl/sequence": ("KL", "up"),
    "policy/entropy": ("entropy", "down"),
    "text/length": ("length", "both"),
    "policy/grad_norm": ("gradient norm", "up"),
}


class Watched(NamedTuple):
    """A run: gold and signals [T], averaged over the window; `fall`: the step at which gold has fallen, or None."""

    name: str
    gold: str
    seed: int
    fall: int | None
    signals: dict[str, Tensor]


def run_warning(config: WarningConfig, *, progress: bool = True) -> StudyResult:
    """Read every run under `config.runs`; write warning.json, warning.md and warning.png.

    Raises:
        ValueError: for a folder without runs that have a gold, runs of one group only, or runs of which none falls or
            none stays; for an output folder that holds other files.
        ImportError: naming the extra, if matplotlib is not installed.
    """
    return run_study("warning", config, lambda: measure(config), warning_report.markdown, warning_report.picture)


def measure(config: WarningConfig) -> dict[str, Any]:
    """The content of warning.json."""
    runs = read_runs(config)
    fallen = [run for run in runs if run.fall is not None]
    if not fallen or len(fallen) == len(runs):
        found = f"{len(fallen)} of {len(runs)} falling"
        raise ValueError(f"runs: expected some whose gold falls and some whose gold stays, got {found}")
    names = [name for name in WATCHED if all(name in run.signals for run in runs)]
    named = config.model_copy(update={"runs": Path(config.runs.name)})
    return {
        "command": command("warning", named),
        "config": named.model_dump(mode="json", exclude={"output"}),
        "runs": len(runs),
        "fallen": len(fallen),
        "signals": {
            WATCHED[name][0]: {f"{share:g}": _warnings(runs, name, share, config) for share in config.false_alarms}
            for name in names
        },
        "falls": [{"run": run.name, "fall": run.fall} for run in fallen],
    }


def read_runs(config: WarningConfig) -> list[Watched]:
    """The runs with gold, by name."""
    found = []
    for file in sorted(config.runs.rglob("metrics.jsonl")):
        rows = [row for row in read_metrics(file.parent) if row.get("gold/mean") is not None]
        if not rows:
            continue
        if len(rows) < 2 * config.window:
            raise ValueError(f"runs: {file}: expected at least {2 * config.window} steps with gold, got {len(rows)}")
        ppo = load_config(PPOConfig, file.with_name("config.yaml"))
        names = [name for name in WATCHED if all(row.get(name) is not None for row in rows)]
        signals = {name: _warning(name, [row[name] for row in rows], config.window) for name in names}
        gold = smoothed([row["gold/mean"] for row in rows], config.window)
        place = str(file.parent.relative_to(config.runs))
        found.append(Watched(place, Path(str(ppo.gold)).name, ppo.seed, fall_of(gold, config.fall), signals))
    groups = {_group(run, config) for run in found}
    if len(groups) < 2:
        raise ValueError(f"runs: expected runs of at least two {config.hold_out}s in {config.runs}, got {len(groups)}")
    return found


def _group(run: Watched, config: WarningConfig) -> object:
    return run.seed if config.hold_out == "seed" else run.gold


def smoothed(values: Sequence[float], window: int) -> Tensor:
    """[T] fp64: the mean of the last `window` values at each step, of fewer at the beginning."""
    total = torch.tensor(values, dtype=torch.float64).cumsum(dim=0)
    before = torch.cat([total.new_zeros(window), total])[: len(total)]
    counts = torch.arange(1, len(total) + 1).clamp(max=window)
    return (total - before) / counts


def fall_of(gold: Tensor, fall: float) -> int | None:
    """The first step from which gold [T] stays more than `fall` below its maximum so far, to the end; None: none."""
    below = gold.cummax(dim=0).values - gold > fall
    if not bool(below[-1]):
        return None
    inside = (~below).nonzero()
    return int(inside[-1]) + 1  # the first step is at its own maximum


def _warning(name: str, values: Sequence[float], window: int) -> Tensor:
    """[T]: how far the signal is from its mean over the first window, on the side that warns; 0 in that window."""
    series = smoothed(values, window)
    change = series - series[window - 1]
    side = WATCHED[name][1]
    change = {"up": change, "down": -change, "both": change.abs()}[side]
    change[:window] = 0.0
    return change


def _warnings(runs: list[Watched], name: str, share: float, config: WarningConfig) -> dict[str, Any]:
    """Of one signal at one share of false alarms.

    recall: (share, low, high) of the falls with an alarm before the fall   lead: (mean, low, high) of steps between
    alarm and fall, where there was one in time; median   false_alarms: (share, low, high) of the runs that stay, each
    with the threshold of the other groups
    """
    leads: list[int] = []
    falls = alarms = stays = 0
    for run in runs:
        others = [other for other in runs if _group(other, config) != _group(run, config) and other.fall is None]
        if not others:
            raise ValueError(f"runs: {run.name}: expected runs of another {config.hold_out} whose gold stays, got none")
        limit = threshold(torch.stack([other.signals[name].max() for other in others]), share)
        crossed = (run.signals[name] > limit).nonzero()
        first = int(crossed[0]) if len(crossed) else None
        if run.fall is None:
            stays += 1
            alarms += first is not None
        else:
            falls += 1
            leads += [run.fall - first] if first is not None and first <= run.fall else []
    values = torch.tensor(leads, dtype=torch.float64)
    lead = mean_interval(values, resamples=config.resamples)
    return {
        "recall": _rounded(share_interval(len(leads), falls)),
        "lead": _rounded(lead),
        "median_lead": float(values.median()) if leads else None,
        "false_alarms": _rounded(share_interval(alarms, stays)),
    }


def threshold(peaks: Tensor, share: float) -> float:
    """The smallest of the peaks [N] that at most `share` of them exceed."""
    ordered = peaks.sort().values
    return float(ordered[len(ordered) - 1 - math.floor(share * len(ordered))])


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in values]
