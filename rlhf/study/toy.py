"""Run `prudent study toy`: BRME's figure 1 (arXiv 2409.15360, section 4) over many seeds.

There are 8 prompts and 8 responses; the best response to prompt i is response i. The preference data pairs the best
response to every prompt with two random others: 16 pairs, which leave 40 of the 64 cells without a label. One reward
model trained on them is the nominal one; `models` others of the same shape with other initial weights are the
uncertainty set. PPO trains a 3-layer MLP policy on each arm's reward, with the exact value of the policy as its critic.
A policy is optimal if its likeliest response is the right one for all 8 prompts.

The paper gives no widths, learning rates, steps or KL coefficient: they are keys of the config, and a table shows their
influence. It does not say either whether the nominal model is in the set: both readings are arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation.statistics import mean_interval, share_interval
from . import toy_report
from .config import ToyConfig
from .networks import repeated
from .result import StudyResult, command, run_study
from .toy_world import (
    SIZE,
    Judged,
    fresh_policies,
    preference_pairs,
    reward_models,
    right,
    train_policies,
)

LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


# settings that the paper does not give, one change at a time
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "as above": {},
    "initial weights of the reward models x 1 (torch's own)": {"reward": {"scale": 1.0}},
    "initial weights of the reward models x 5": {"reward": {"scale": 5.0}},
    "relu in the reward models": {"reward": {"activation": "relu"}},
    "relu, initial weights x 1": {"reward": {"activation": "relu", "scale": 1.0}},
    "reward models of one hidden layer of 256": {"reward": {"layers": 1, "width": 256}},
    "reward models trained 200 steps at 1e-2": {"reward": {"steps": 200, "lr": 1e-2}},
    "each reward model z-scored": {"reward": {"normalise": "model"}},
    "each reward model centred by prompt": {"reward": {"normalise": "prompt"}},
    "an uncertainty set of 7": {"set": {"models": 7}},
    "no KL": {"policy": {"kl": 0.0}},
    "KL coefficient 0.1": {"policy": {"kl": 0.1}},
    "KL coefficient 0.1, 600 PPO steps": {"policy": {"kl": 0.1, "steps": 600}},
}


class Arm(NamedTuple):
    """A reward: table [S, 8, 8] plus `worst` times the set's model with the lowest mean under the policy (eq. 6)."""

    table: Tensor
    worst: float = 0.0


def run_toy(config: ToyConfig, *, progress: bool = True) -> StudyResult:
    """Train every arm's policies and write config.yaml, toy.json, toy.md and toy.png into `config.output`.

    Raises:
        ValueError: for a folder that holds other files, or this study with another config.
        ImportError: naming the extra, if matplotlib is not installed.
    """
    return run_study("toy", config, lambda: _measure(config, progress), toy_report.markdown, toy_report.picture)


def _measure(config: ToyConfig, progress: bool) -> dict[str, Any]:
    """The content of toy.json."""
    settings = SETTINGS if config.sensitivity else {"as above": {}}
    known: dict[str, tuple[Tensor, Tensor]] = {}
    compared = ("single", f"tradeoff:{config.lam:g}", "worst of the set", "mean of all")
    table: dict[str, Any] = {}
    main: dict[str, Any] = {}
    for name, change in tqdm(settings.items(), desc="toy", unit="setting", disable=not progress):
        changed = _changed(config, change)
        key = changed.reward.model_dump_json() + str(changed.models)
        if key not in known:
            known[key] = _reward_models(changed)
        rewards, fitted = known[key]
        every = arms(rewards, changed.lam)
        if not change:
            sweep = {f"lambda {lam:g}": arms(rewards, lam)[f"tradeoff:{lam:g}"] for lam in LAMBDAS}
            results, policies = train_arms(every | sweep, rewards[:, 1:], changed)
            main = {
                "arms": {arm: results[arm] for arm in every},
                "lambda": {f"{lam:g}": results[f"lambda {lam:g}"] for lam in LAMBDAS},
                "pairs_ranked_right": float(fitted.mean()),
                "reward_models_right": [float(n) for n in right(rewards).double().mean(dim=0)],
                "example": _example(rewards, every, policies, results),
            }
        else:
            results, _ = train_arms({arm: every[arm] for arm in compared}, rewards[:, 1:], changed)
        table[name] = {arm: results[arm] for arm in compared}
    metrics = {"command": command("toy", config), "config": config.model_dump(mode="json", exclude={"output"}), **main}
    return metrics | {"settings": table, "torch": torch.__version__}


def _changed(config: ToyConfig, change: Mapping[str, dict[str, Any]]) -> ToyConfig:
    update: dict[str, Any] = dict(change.get("set", {}))
    for group in ("reward", "policy"):
        if group in change:
            update[group] = getattr(config, group).model_copy(update=change[group])
    return config.model_copy(update=update)


def _reward_models(config: ToyConfig) -> tuple[Tensor, Tensor]:
    """Train the reward models: all settings share the pairs; seed and shapes determine the initial weights."""
    pairs = preference_pairs(config.seeds, torch.Generator().manual_seed(config.first_seed))
    generator = torch.Generator().manual_seed(config.first_seed + 1)
    return reward_models(pairs, 1 + config.models, config.reward, generator)


def arms(rewards: Tensor, lam: float) -> dict[str, Arm]:
    """[S, 1 + M, 8, 8] rewards, the nominal model first -> each arm's reward."""
    nominal, others = rewards[:, 0], rewards[:, 1:].amin(dim=1)
    everyone = rewards.amin(dim=1)
    truth = torch.eye(SIZE).expand_as(nominal)
    return {
        "single": Arm(nominal),
        f"tradeoff:{lam:g}": Arm(lam * nominal + (1 - lam) * others),
        f"tradeoff:{lam:g}, nominal in the set": Arm(lam * nominal + (1 - lam) * everyone),
        f"tradeoff:{lam:g}, one worst model (eq. 6)": Arm(lam * nominal, 1 - lam),
        "worst of the set": Arm(others),
        "worst of all": Arm(everyone),
        "mean of all": Arm(rewards.mean(dim=1)),
        "max of all": Arm(rewards.amax(dim=1)),
        "the truth": Arm(truth * nominal.std(dim=(1, 2), keepdim=True)),
    }


def train_arms(
    arms: Mapping[str, Arm], others: Tensor, config: ToyConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """PPO on every arm at once, from the same initial policies with the same random numbers.

    others [S, M, 8, 8]: the uncertainty set. Returns each arm's outcome, and its policies [S, 8, 8].
    """
    count, seeds = len(arms), config.seeds
    nominal = next(iter(arms.values())).table
    unit = nominal.std(
        dim=(1, 2), keepdim=True
    )  # one unit for all arms of a seed, so that the KL coefficient means the same
    tables = torch.stack([arm.table / unit for arm in arms.values()])  # [A, S, 8, 8]
    worst = torch.tensor([arm.worst for arm in arms.values()])[:, None, None, None]
    others = others / unit[:, None]

    def reward(probability: Tensor, drawn: Tensor) -> Judged:
        policy = probability.view(count, seeds, SIZE, SIZE)
        table = tables
        if bool(worst.any()):
            expected = (policy[:, :, None] * others).sum(dim=(3, 4))  # [A, S, M]
            table = tables + worst * others[torch.arange(seeds), expected.argmin(dim=2)]
        flat = table.reshape(-1, SIZE, SIZE)
        return Judged(flat.gather(2, drawn), (probability * flat).sum(dim=2, keepdim=True))

    generator = torch.Generator().manual_seed(config.first_seed + 2)
    layers = repeated(fresh_policies(seeds, config.policy, generator), count)
    final = train_policies(layers, reward, config.policy, generator, seeds=seeds).view(count, seeds, SIZE, SIZE)
    policies = dict(zip(arms, final, strict=True))
    base = right(final[0])
    return {name: outcome(policy, arms[name].table, base) for name, policy in policies.items()}, policies


def outcome(policy: Tensor, table: Tensor, base: Tensor) -> dict[str, Any]:
    """policy and its reward table [S, 8, 8], base [S] the first arm's prompts right -> counts, means, 95 % intervals.

    followed: the share of prompts where the policy's likeliest response has the highest reward.
    """
    found = right(policy)
    optimal = int((found == SIZE).sum())
    best = policy.diagonal(dim1=1, dim2=2).mean(dim=1)
    return {
        "optimal": optimal,
        "optimal_share": list(share_interval(optimal, len(found))),
        "right": list(mean_interval(found)),
        "right_minus_single": list(mean_interval(found - base)),
        "probability_of_the_best": list(mean_interval(best)),
        "followed": float((policy.argmax(dim=2) == table.argmax(dim=2)).double().mean()),
        "right_by_seed": found.tolist(),
    }


def _example(
    rewards: Tensor, every: Mapping[str, Arm], policies: Mapping[str, Tensor], results: Mapping[str, Any]
) -> dict[str, Any]:
    """One seed for the picture: the first in which the single model fails and the trade-off succeeds, as in the paper's
    figure; without one, the first whose gain from the trade-off is the median."""
    name = list(every)[1]
    single, tradeoff = (torch.tensor(results[arm]["right_by_seed"]) for arm in ("single", name))
    like = (single < SIZE) & (tradeoff == SIZE)
    gain = tradeoff - single
    seed = int((like if bool(like.any()) else gain == gain.median()).nonzero()[0])
    tables = {"single": rewards[seed, 0], name: every[name].table[seed]}
    return {
        "seed": seed,
        "like_figure_1": int(like.sum()),
        "rewards": {name: table.tolist() for name, table in tables.items()},
        "policies": {name: policies[name][seed].tolist() for name in every},
    }
