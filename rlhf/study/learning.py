"""Run `prudent study learning`: PPO against each reward on a small language model, evaluated by a gold reward.

Gold is VADER's sentiment of the words. Proxies are reward heads on the frozen trunk's features, trained on pairs of the
model's own samples with a share of the labels flipped. PPO sees only the proxy. The study measures whether the gold
reward of the policy's samples rises, whether it stays high, and which proxy gives the most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..job.log import read_metrics
from ..ppo.config import KLConfig, PolicyConfig, PPOConfig, RewardConfig, UpdateConfig
from ..ppo.loop import run_ppo
from ..ppo.watch.monitor import read_texts
from ..sampling.config import RolloutConfig
from . import learning_report
from .config import LearningConfig
from .learning_rewards import prepare
from .processes import in_processes
from .result import StudyResult, command, run_study

SHOWN = ("gold/mean", "reward/mean", "kl/sequence", "text/length", "text/truncated", "policy/entropy")
BLOCK = 5  # steps
RESUMABLE_CHANGES = ("output", "seeds", "kl", "lambdas", "processes", "window")  # no run in the folder depends on them


class Arm(NamedTuple):
    """A reward: its name in tables, its model's folder within a seed's folder, and the aggregation."""

    name: str
    folder: str
    aggregation: str


def run_learning(config: LearningConfig, *, progress: bool = True) -> StudyResult:
    """Do every run that is not done yet, then write learning.json, learning.md and learning.png.

    The folder: seed-S/ (samples, pairs and the reward models of a seed), runs/ (PPO runs, see `run_ppo`).

    Raises:
        ValueError: for a model that cannot be used, or a folder that holds other files or runs of another config;
            seeds, lambdas and KL coefficients may be added.
        ImportError: naming the extra to install.
    """
    return run_study(
        "learning",
        config,
        lambda: _measure(config, progress),
        learning_report.markdown,
        learning_report.picture,
        resumable_changes=RESUMABLE_CHANGES,
    )


def _measure(config: LearningConfig, progress: bool) -> dict[str, Any]:
    """The content of learning.json."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    jobs = [(config.model_dump_json(), seed) for seed in seeds]
    prepared = dict(zip(seeds, in_processes(_prepare, jobs, config.processes, "rewards", progress), strict=True))
    # all arms of a seed before the next seed, so that an interrupted study has complete seeds
    runs = [(kl, seed, arm) for kl in config.kl for seed in seeds for arm in arms(config)]
    tasks = [(ppo_config(config, kl, seed, arm).model_dump_json(),) for kl, seed, arm in runs]
    rows = in_processes(_run, tasks, config.processes, "PPO runs", progress)
    results = [
        {"kl": kl, "seed": seed, "arm": arm.name, **summary(curves, config.window), "text": text}
        for (kl, seed, arm), (curves, text) in zip(runs, rows, strict=True)
    ]
    named = config.model_copy(update={"model": Path(config.model).name})
    return {
        "command": command("learning", named),
        "config": named.model_dump(mode="json", exclude={"output"}),
        "rewards": {str(seed): numbers for seed, numbers in prepared.items()},
        "runs": results,
        "torch": torch.__version__,
    }


def arms(config: LearningConfig) -> list[Arm]:
    """The rewards to compare, the single head first.

    Heads are compared by their means: with sampled heads, the noise would differ between rewards, too.
    """
    rewards = [(f"lambda {lam:g}", f"tradeoff:{lam:g}") for lam in config.lambdas]
    rewards += [("mean of heads", "mean"), ("max of heads", "max"), ("worst head of the step", "batch_worst")]
    return [
        Arm("single head", "single", "mean"),
        *(Arm(name, "ensemble", f"{spec},source=mean") for name, spec in rewards),
        Arm("PET, single head", "pet_single", "mean"),
        Arm(
            f"PET, ensemble, lambda {config.pet_lambda:g}",
            "pet_ensemble",
            f"tradeoff:{config.pet_lambda:g},source=mean",
        ),
    ]


def ppo_config(config: LearningConfig, kl: float, seed: int, arm: Arm) -> PPOConfig:
    """The config of the PPO run with one reward, seed and KL coefficient."""
    ppo, folder = config.ppo, config.output / f"seed-{seed}"
    name = arm.name.replace(",", "").replace(" ", "-")
    return PPOConfig(
        model=config.model,
        prompts=str(folder / "prompts.txt"),
        output=config.output / "runs" / f"{name}-kl-{kl:g}-seed-{seed}",
        reward=RewardConfig(source=str(folder / arm.folder), kind="shared", aggregation=arm.aggregation),
        steps=ppo.steps,
        seed=seed,
        policy=PolicyConfig(mode=ppo.mode),
        rollout=RolloutConfig(
            prompts_per_step=ppo.prompts_per_step,
            samples_per_prompt=ppo.samples_per_prompt,
            max_new_tokens=config.rewards.max_new_tokens,
        ),
        kl=KLConfig(coef=kl),
        update=UpdateConfig(estimator=ppo.estimator, epochs=ppo.epochs, minibatches=ppo.minibatches, lr=ppo.lr),
        gold="vader",
        save_every=ppo.steps,
        sample_every=ppo.steps,
    )


def summary(curves: dict[str, list[float | None]], window: int) -> dict[str, Any]:
    """Summarise a run's curves.

    final: each metric's mean over the last `window` steps.   peak_gold: of gold's best `window` steps in a row.
    curves: gold, proxy and KL as means of `BLOCK` steps. A step without a number (null) is skipped.
    """
    gold = [value for value in curves["gold/mean"] if value is not None]
    width = min(window, len(gold))
    means = [sum(gold[i : i + width]) / width for i in range(len(gold) - width + 1)]
    blocks = {
        name: [_mean(curves[name][i : i + BLOCK]) for i in range(0, len(curves[name]), BLOCK)] for name in SHOWN[:3]
    }
    final = {name: _mean(values[-window:]) for name, values in curves.items()}
    return {"final": final, "peak_gold": round(max(means), 4), "curves": blocks}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _prepare(config: str, seed: int) -> dict[str, Any]:
    """Train the reward models of one seed."""
    whole = LearningConfig.model_validate_json(config)
    return prepare(whole.model, whole.output / f"seed-{seed}", whole.rewards, seed, f"tradeoff:{whole.pet_lambda:g}")


def _run(config: str) -> tuple[dict[str, list[float | None]], str]:
    """Start or resume one PPO run; return its curves and its last text of the first prompt."""
    ppo = PPOConfig.model_validate_json(config)
    run_ppo(ppo, resume=True, progress=False)
    rows, texts = read_metrics(ppo.output), read_texts(ppo.output)
    last = next(row for row in texts if row["step"] == texts[-1]["step"])
    return {name: [row.get(name) for row in rows] for name in SHOWN}, f"{last['prompt']} | {last['response']}"
