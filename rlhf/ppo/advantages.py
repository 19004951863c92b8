"""Turn rewards into advantages: penalty, clip, centring and KL, then GAE, RLOO or group-relative estimates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...kernels import advantages
from .batch import Experience, Samples, Scored
from .config import KL_ERROR_BOUND, PPOConfig
from .losses import kl_estimate

GROUP_STD_FLOOR = 1e-4  # added to a group's std, as TRL's GRPO does


class KLController:
    """The KL coefficient: fixed, or adapted so that a sequence's KL approaches `target` (arXiv 1909.08593, 2.2).

        e = clip(KL / target - 1, -0.2, 0.2)        coef <- coef * (1 + e * n / horizon)

    after each step of n sequences. Without a target, coef is constant. It stays above 0 if horizon > 0.2 n, which
    `PPOConfig` checks. `coef` is the only state.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, sequences: int) -> float:
        """Adapt `coef` to the mean KL of `sequences` sequences, in nats, and return it; ignore NaN and infinity."""
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -KL_ERROR_BOUND), KL_ERROR_BOUND)
            self.coef *= 1 + error * sequences / self.horizon
        return self.coef


def shape(scored: Scored, config: PPOConfig, kl_coef: float) -> Experience:
    """Turn scored samples into experience: scores, advantages and returns.

        score = centre(clip(reward - missing_eos_penalty where the answer was cut off))
        gae    advantages of r_t = score at the last token - kl_coef KL_t, by `prudent.advantages`
        rloo   A = s - mean of the other samples of the prompt, s = score - kl_coef sum_t KL_t   (arXiv 2402.14740)
        group  A = (s - mean) / (std + 1e-4) of the prompt's samples, std with n - 1             (GRPO, as TRL has it)

    KL_t is each token's estimate by kl.estimator. It enters the reward only with kl.place reward; with rloo and group
    it is then part of s, before the baseline. With rloo and group all tokens of a response share one A, and returns are
    None, because there is no critic to fit. Means, centring and whitening run over the samples that are kept.

    A sample is dropped if its reward, or one of its log-probabilities or values, is not finite. The other samples of
    its prompt keep advantages relative to each other; a sample left alone gets 0.

    `Experience.kl` is the sum of log pi / pi_ref over a response's tokens, NaN where a log-probability is.

    Raises:
        ValueError: for estimator gae without values.
    """
    mask, update = scored.mask, config.update
    if update.estimator == "gae" and scored.value is None:
        raise ValueError("update.estimator: expected rloo or group without a critic's values, got gae")
    log_ratio = torch.where(mask, scored.logprob - scored.ref_logprob, 0.0)
    kept = torch.isfinite(scored.reward) & torch.isfinite(log_ratio).all(1)
    if scored.value is not None:
        kept &= (torch.isfinite(scored.value) | ~mask).all(1)
    group = _groups(scored.samples)
    score = _score(scored, config, kept, group)
    in_reward = config.kl.place == "reward" and kl_coef > 0
    if update.estimator == "gae":
        out = advantages(
            score,
            scored.logprob if in_reward else None,
            scored.ref_logprob if in_reward else None,
            scored.value,
            mask,
            gamma=update.gamma,
            lam=update.lam,
            kl_coef=kl_coef if in_reward else 0.0,
            kl_estimator=config.kl.estimator,
            whiten="none" if update.whiten is False else "sample",
        )
        returns: Tensor | None = out.returns
    else:
        price = kl_coef * kl_estimate(log_ratio, config.kl.estimator).sum(1) if in_reward else 0.0
        baseline = leave_one_out if update.estimator == "rloo" else group_relative
        advantage = torch.where(kept, baseline(score - price, group, kept), math.nan)
        # gamma 0 makes every token's advantage its own reward, so that the op masks, drops and whitens here too
        tokens = advantage[:, None].expand_as(mask)
        whiten = "sample" if update.whiten else "none"
        out = advantages(tokens, None, None, None, mask, gamma=0.0, kl_coef=0.0, whiten=whiten)
        returns = None
    dropped = out.dropped | ~kept
    return Experience(
        **vars(scored),
        score=torch.where(dropped, math.nan, score),
        advantage=out.advantage,
        returns=returns,
        dropped=dropped,
        kl=log_ratio.sum(1),
    )


def leave_one_out(score: Tensor, group: Tensor, kept: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): each score minus the mean of its group's others; 0 if there are none. All [N].

    The baseline of a sample does not depend on it, so the policy gradient stays unbiased.
    """
    count, total, _ = _moments(score, group, kept)
    others = (count - 1).clamp(min=1)
    own = score.double().cpu()
    advantage = torch.where(count > 1, own - (total - own) / others, 0.0)
    return advantage.to(score)


def group_relative(score: Tensor, group: Tensor, kept: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300): (score - mean) / (std + 1e-4) within the group, std with n - 1; 0 if alone."""
    count, total, square = _moments(score, group, kept)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    advantage = torch.where(count > 1, (score.double().cpu() - total / count) / (std + GROUP_STD_FLOOR), 0.0)
    return advantage.to(score)


def _groups(samples: Samples) -> Tensor:
    """[N] int64: 0 .. number of prompts - 1, on the CPU."""
    inverse: Tensor = torch.unique(torch.tensor(samples.prompt_index), return_inverse=True)[1]
    return inverse


def _score(scored: Scored, config: PPOConfig, kept: Tensor, group: Tensor) -> Tensor:
    """[N]: penalty, clip and centring; NaN where not kept."""
    reward = config.reward
    cut = ~torch.tensor(scored.samples.stopped, device=scored.mask.device)
    score = torch.where(kept, scored.reward, math.nan) - reward.missing_eos_penalty * cut
    if reward.clip is not None:
        score = score.clamp(-reward.clip, reward.clip)
    if reward.centre == "none":
        return score
    one_group = torch.zeros_like(group) if reward.centre == "batch" else group
    count, total, _ = _moments(score, one_group, kept)
    return (score.double().cpu() - total / count).to(score)


def _moments(score: Tensor, group: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squared deviations of each row's group, over kept rows: [N] fp64.

    Computed on the CPU, where index_add adds in a fixed order; to move N numbers per step costs nothing.
    """
    kept = kept.cpu()
    value = torch.where(kept, score.double().cpu(), 0.0)

    def sums(rows: Tensor) -> Tensor:
        return torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, rows)[group]

    count, total = sums(kept.double()), sums(value)
    deviation = torch.where(kept, value - total / count.clamp(min=1), 0.0)
    return count, total, sums(deviation.square())
