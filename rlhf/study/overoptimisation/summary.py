"""Choose the constants and compare the arms: from the cells to the numbers of overoptimisation.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...evaluation.crossed import crossed_interval
from .attacks import mixture, pools
from .candidates import attack_count
from .cells import arms_of, ns_of, read_cell, settings
from .config import OveroptimisationConfig, View
from .heads import Setting
from .rewards import GRIDS, TUNED, Arm, reported_arms

CHOICE_RULE = (
    "the value whose best-of-n brings the most gold at the largest n, mean over the reference policy's candidates "
    "and the "
    "mixture with the most foreign ones, over the tuning golds, all numbers of pairs and shares of noise, and seeds of "
    "their own"
)


def summary_of_view(view: str, config: OveroptimisationConfig) -> dict[str, Any]:
    """The numbers of one view.

    Returns:
        constants: kind -> grid -> mean gold of each value, and the chosen one; also by tuning gold alone.
        golds: gold -> attack -> arm -> see `_arm`.
    """
    heads = View.parse(view).heads
    every = [arm for at, arm in arms_of(heads, config) if at in ("", view)]
    rows = [i for i, (at, _) in enumerate(arms_of(heads, config)) if at in ("", view)]
    constants = _choose(config, heads, every, rows)
    chosen = {kind: found["chosen"] for kind, found in constants.items()}
    arms = reported_arms(chosen)
    places = [rows[every.index(arm)] for arm in arms]
    return {
        "constants": constants,
        "golds": {gold: _gold(config, heads, gold, arms, places) for gold in config.golds},
    }


def attack_names(config: OveroptimisationConfig) -> list[str]:
    return list(pools(config.samples.candidates, attack_count(config), config.shares))


def _choose(config: OveroptimisationConfig, heads: tuple[str, ...], arms: list[Arm], rows: list[int]) -> dict[str, Any]:
    names = attack_names(config)
    attacks = [0, names.index(mixture(max(config.shares)))] if config.shares else [0]
    by_gold: dict[str, Tensor] = {}  # gold -> [A]
    for gold in config.tuning_golds:
        cells = [read_cell(config, heads, s) for s in settings(config, tuning=True) if s.gold == gold]
        values = torch.stack([cell.gold[rows][:, attacks, :, -1].double() for cell in cells])
        by_gold[gold] = values.mean(dim=(0, 2, 3))
    mean = torch.stack(list(by_gold.values())).mean(dim=0)
    result = {}
    for kind, grid in GRIDS.items():
        at = [arms.index(Arm(kind, value)) for value in grid]

        def best(values: Tensor, grid: tuple[float, ...] = grid, at: list[int] = at) -> float:
            return grid[int(values[at].argmax())]

        result[kind] = {
            "grid": list(grid),
            "gold": [round(float(mean[i]), 4) for i in at],
            "chosen": best(mean),
            "by_gold": {gold: best(values) for gold, values in by_gold.items()},
        }
    return result


def _gold(
    config: OveroptimisationConfig, heads: tuple[str, ...], gold: str, arms: list[Arm], places: list[int]
) -> dict[str, Any]:
    """attack -> arm -> numbers."""
    wanted = [s for s in settings(config, tuning=False) if s.gold == gold]
    cells = {s: read_cell(config, heads, s) for s in wanted}
    seeds = sorted({s.seed for s in wanted})
    groups = [(pairs, noise) for pairs in config.pairs for noise in config.noise]

    def stacked(part: str) -> Tensor:
        return torch.stack(
            [
                torch.stack([getattr(cells[Setting(gold, *group, seed)], part)[places] for seed in seeds])
                for group in groups
            ]
        )

    values, proxies = stacked("gold").double(), stacked("proxy")  # [G, S, A, K, P, M], [G, S, A, K, M]
    result: dict[str, Any] = {}
    for k, attack in enumerate(attack_names(config)):
        result[attack] = {
            arm.name: _arm(config, values[:, :, a, k], values[:, :, 0, k], proxies[:, :, a, k], groups)
            for a, arm in enumerate(arms)
        }
    assert arms[0].kind == TUNED
    return result


def _arm(
    config: OveroptimisationConfig, values: Tensor, tuned: Tensor, proxy: Tensor, groups: list[tuple[int, float]]
) -> dict[str, Any]:
    """Numbers of one arm under one attack, in sd of the gold; values, tuned [G, S, P, M], proxy [G, S, M].

    gold        (mean, low, high) at the largest n          difference   the same less the tuned single head's
    settings    "PAIRS-NOISE" -> difference                 curve, proxy [M] means over everything
    turns       the n with the most gold                    trend        gold at the largest n less that at n / 4
    """
    ns = ns_of(config)
    early = max((i for i, n in enumerate(ns) if 4 * n <= ns[-1]), default=0)
    difference = values[..., -1] - tuned[..., -1]  # [G, S, P]
    curve = values.mean(dim=(0, 1, 2))

    def interval(found: Tensor) -> list[float | None]:
        return [None if v is None else round(v, 4) for v in crossed_interval(found, config.resamples)]

    return {
        "gold": interval(values[..., -1].mean(dim=0)),
        "difference": interval(difference.mean(dim=0)),
        "settings": {f"{pairs}-{noise:g}": interval(difference[i]) for i, (pairs, noise) in enumerate(groups)},
        "curve": [round(v, 4) for v in curve.tolist()],
        "proxy": [round(v, 4) for v in proxy.mean(dim=(0, 1)).tolist()],
        "turns": ns[int(curve.argmax())],
        "trend": interval((values[..., -1] - values[..., early]).mean(dim=0)),
    }
