"""One file for each setting and set of taps that heads read: the gold that best-of-n brings against every arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....engine.weights import reading_weights
from ...evaluation.best_of_n import powers_of_two
from ...job.files import atomic_file
from ..processes import in_processes
from .attacks import best_of_n, pools
from .candidates import attack_count
from .config import OveroptimisationConfig, View
from .heads import Setting, fit_setting
from .rewards import Arm, every_arm, reward, score
from .world import World, slug


class Cell(NamedTuple):
    """gold [A, K, P, M], of A arms, K attacks, P held-out prompts, M values of n; proxy [A, K, M] (see `best_of_n`)."""

    gold: Tensor
    proxy: Tensor


def settings(config: OveroptimisationConfig, tuning: bool) -> list[Setting]:
    """Those that choose constants, or those that are reported: other golds and other seeds."""
    if tuning:
        golds, first, count = config.tuning_golds, config.first_seed + (1 << 20), config.tuning_seeds
    else:
        golds, first, count = config.golds, config.first_seed, config.seeds
    # all settings of a seed before the next seed
    return [
        Setting(gold, pairs, noise, seed)
        for seed in range(first, first + count)
        for gold in golds
        for pairs in config.pairs
        for noise in config.noise
    ]


def arms_of(heads: Sequence[str], config: OveroptimisationConfig) -> list[tuple[str, Arm]]:
    """(view, arm) of every arm whose heads read the taps `heads`; the view is "" for an arm that reads no distance."""
    views = [text for text in config.views if View.parse(text).heads == tuple(heads)]
    priced = [(text, arm) for text in views for arm in every_arm(distant=True)]
    return [*(("", arm) for arm in every_arm(distant=False)), *priced]


def ns_of(config: OveroptimisationConfig) -> list[int]:
    return powers_of_two(config.samples.candidates)


def fill_cells(config: OveroptimisationConfig, *, progress: bool = True) -> None:
    """Compute every cell that is missing, the reported settings first."""
    heads = list(dict.fromkeys(View.parse(text).heads for text in config.views))
    every = [
        (side, setting)
        for side in heads
        for setting in (*settings(config, tuning=False), *settings(config, tuning=True))
    ]
    todo = [(side, setting) for side, setting in every if not _done(config, side, setting)]
    tasks = [(config.model_dump_json(), side, tuple(setting)) for side, setting in todo]
    in_processes(_compute, tasks, config.processes, "settings", progress)


def read_cell(config: OveroptimisationConfig, heads: Sequence[str], setting: Setting) -> Cell:
    """The cell of a setting, whose arms are those of `arms_of`."""
    file = _file(config.output, heads, setting)
    with reading_weights(file), safe_open(file, "pt") as stored:
        return Cell(stored.get_tensor("gold"), stored.get_tensor("proxy"))


def _file(folder: Path, heads: Sequence[str], setting: Setting) -> Path:
    return folder / "cells" / slug(heads) / f"{setting}.safetensors"


def _label(config: OveroptimisationConfig, heads: Sequence[str]) -> dict[str, str]:
    arms = [[view, arm.name] for view, arm in arms_of(heads, config)]
    return {"arms": json.dumps(arms), "shares": json.dumps(config.shares)}


def _done(config: OveroptimisationConfig, heads: Sequence[str], setting: Setting) -> bool:
    file = _file(config.output, heads, setting)
    if not file.is_file():
        return False
    with reading_weights(file), safe_open(file, "pt") as stored:
        found: dict[str, str] = stored.metadata() or {}
    return {key: found.get(key) for key in ("arms", "shares")} == _label(config, heads)


@lru_cache(maxsize=1)
def _config(text: str) -> OveroptimisationConfig:
    return OveroptimisationConfig.model_validate_json(text)


def _compute(text: str, heads: tuple[str, ...], given: tuple[str, int, float, int]) -> None:
    """Fit one setting and attack every arm."""
    config, setting = _config(text), Setting(*given)
    world = World(config)
    features, gold = world.features(heads), world.gold(setting.gold)
    fitted = fit_setting(features, gold.training, setting, config)
    scored = score(fitted, features)
    arms = arms_of(heads, config)
    distances = {view: world.distance(View.parse(view).distance).candidates for view, _ in arms if view}
    rewards = torch.stack([reward(arm, scored, distances.get(view)).float() for view, arm in arms])
    ns = ns_of(config)
    found = [
        best_of_n(rewards[..., pool], gold.candidates[:, pool], ns)
        for pool in pools(config.samples.candidates, attack_count(config), config.shares).values()
    ]
    cell = Cell(*(torch.stack(parts, dim=1).float() for parts in zip(*found, strict=True)))
    label = {**_label(config, heads), "l2": f"{fitted.l2:g}"}
    with atomic_file(_file(config.output, heads, setting)) as temporary:
        save_file({key: value.contiguous() for key, value in cell._asdict().items()}, temporary, label)
