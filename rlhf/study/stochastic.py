"""Run `prudent study stochastic`: lemma 1's stochastic case (BRME, arXiv 2409.15360, 6.2 and appendix E).

Lemma 1: a constant reward has advantage 0 under an exact critic, so the policy gradient is 0. The paper's experiment
finds that random rewards, N(0, 1), hurt a policy most, that the minimum of several random heads hurts less, and that a
constant hurts least. Here policies that solve the toy are trained on each of them; gold is the probability of the right
response.

The minimum of K has a smaller variance (its mean and variance are printed), which could be why it hurts less. Updates
that are invariant to the reward's scale exclude this reason: Adam divides by the gradient's scale, whitening by the
advantages' std. So the arms run under SGD and Adam, for one epoch and for four, whitened, and with a KL penalty.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..evaluation.statistics import mean_interval
from . import stochastic_report
from .config import StochasticConfig, ToyPolicyConfig
from .networks import Layers, repeated, trained
from .result import StudyResult, command, run_study
from .toy_world import SIZE, Judged, fresh_policies, log_policy, train_policies

ARMS = ("constant", "worst of random", "random")


class Setting(NamedTuple):
    """A policy update: optimizer, epochs per step, KL coefficient, and whether advantages are whitened."""

    optimizer: Literal["adam", "sgd"]
    epochs: int = 1
    kl: float = 0.0
    whiten: bool = False


def run_stochastic(config: StochasticConfig, *, progress: bool = True) -> StudyResult:
    """Train good policies on meaningless rewards; write config.yaml, stochastic.json, stochastic.md and stochastic.png.

    Raises:
        ValueError: for a folder that holds other files, or this study with another config.
        ImportError: naming the extra, if matplotlib is not installed.
    """
    return run_study(
        "stochastic", config, lambda: _measure(config, progress), stochastic_report.markdown, stochastic_report.picture
    )


def _measure(config: StochasticConfig, progress: bool) -> dict[str, Any]:
    """The content of stochastic.json."""
    start = good_policies(config)
    results: dict[str, Any] = {}
    for name, setting in tqdm(settings(config).items(), desc="stochastic", unit="setting", disable=not progress):
        gold = degrade(start, setting, config)
        loss = {arm: curve[0] - curve[-1] for arm, curve in gold.items()}  # [S]
        results[name] = {
            arm: {
                "degradation": list(mean_interval(loss[arm])),
                "less_than_random": list(mean_interval(loss["random"] - loss[arm])),
                "curve": curve.mean(dim=1).tolist(),
            }
            for arm, curve in gold.items()
        }
    mean, variance = minimum_moments(config.heads)
    return {
        "command": command("stochastic", config),
        "config": config.model_dump(mode="json", exclude={"output"}),
        "oracle": {str(k): list(minimum_moments(k)) for k in sorted({2, 3, 4, 5, config.heads})},
        "minimum": {"mean": mean, "variance": variance, "std": math.sqrt(variance)},
        "settings": results,
        "torch": torch.__version__,
    }


def settings(config: StochasticConfig) -> dict[str, Setting]:
    """The updates to try, by their names in the tables."""
    return {
        "SGD": Setting("sgd"),
        "SGD, whitened advantages": Setting("sgd", whiten=True),
        f"SGD, {config.epochs} epochs": Setting("sgd", config.epochs),
        "Adam": Setting("adam"),
        f"Adam, {config.epochs} epochs": Setting("adam", config.epochs),
        f"Adam, KL {config.kl:g}": Setting("adam", kl=config.kl),
    }


def minimum_moments(k: int) -> tuple[float, float]:
    """Mean and variance of the minimum of k iid N(0, 1) by fp64 quadrature; k = 5 gives -1.1630 and 0.4475."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    upper = 0.5 * torch.erfc(x / math.sqrt(2))
    density = k * upper ** (k - 1) * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    mean = float(torch.trapezoid(x * density, x))
    return mean, float(torch.trapezoid((x - mean).square() * density, x))


def good_policies(config: StochasticConfig) -> Layers:
    """S policies, fitted until the right response has probability `start` at every prompt."""
    generator = torch.Generator().manual_seed(config.first_seed)
    layers = fresh_policies(config.seeds, ToyPolicyConfig(width=config.width), generator)
    leaves = trained(layers)
    adam = torch.optim.Adam(leaves, lr=1e-2)
    for _ in range(400):
        gold = log_policy(layers).exp().diagonal(dim1=1, dim2=2)
        adam.zero_grad()
        (gold - config.start).square().sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    return [(weight.detach(), bias.detach()) for weight, bias in layers]


def degrade(start: Layers, setting: Setting, config: StochasticConfig) -> dict[str, Tensor]:
    """PPO from the same policies on each of `ARMS`: arm -> gold [steps + 1, S], the right response's probability.

    The critic is exact: the mean of the reward, which is the same for every response.
    """
    count, mean = len(ARMS), minimum_moments(config.heads)[0]
    values = torch.tensor([0.0, mean, 0.0]).repeat_interleave(config.seeds)[:, None, None]
    noise = torch.Generator().manual_seed(config.first_seed + 1)
    gold: list[Tensor] = []

    def reward(probability: Tensor, drawn: Tensor) -> Judged:
        heads = torch.randn(config.heads, config.seeds, *drawn.shape[1:], generator=noise)
        rewards = torch.cat([torch.zeros_like(heads[0]), heads.amin(dim=0), heads[0]])
        return Judged(rewards, values.expand(-1, SIZE, 1))

    policy = ToyPolicyConfig(
        width=config.width,
        steps=config.steps,
        epochs=setting.epochs,
        samples=config.samples,
        clip=config.clip,
        lr=config.adam_lr if setting.optimizer == "adam" else config.sgd_lr,
        kl=setting.kl,
        optimizer=setting.optimizer,
        whiten=setting.whiten,
    )
    train_policies(
        repeated(start, count),
        reward,
        policy,
        torch.Generator().manual_seed(config.first_seed + 2),
        seeds=config.seeds,
        each_step=lambda probability: gold.append(probability.diagonal(dim1=1, dim2=2).mean(dim=1)),
    )
    curves = torch.stack(gold).view(config.steps + 1, count, config.seeds)
    return {arm: curves[:, i] for i, arm in enumerate(ARMS)}
