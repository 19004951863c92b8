"""The losses of preference training, as scalars: Bradley-Terry, BRME's eq. 8, and batch-sum regularisation.

Every loss is a mean over pairs. The paper does not say this of eq. 8; with a mean, the scale of the gradient, and so
the best learning rate, does not depend on the batch size. Notation of BRME (arXiv 2409.15360): P pairs, K heads;
scores of 2P responses are stored chosen first (rows 0..P-1), then rejected (rows P..2P-1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """BRME eq. 3: mean over pairs of -log sigma(r_chosen - r_rejected - margin). chosen, rejected, margin [P] -> [].

    A margin (HelpSteer2-Preference, arXiv 2410.01257) asks for a larger gap where the annotators were more certain.
    """
    _require(chosen.dim() == 1 and chosen.numel() > 0, "chosen", "shape [P] with P > 0", list(chosen.shape))
    _require(rejected.shape == chosen.shape, "rejected", f"shape {list(chosen.shape)}", list(rejected.shape))
    difference = chosen - rejected
    if margin is not None:
        _require(margin.shape == chosen.shape, "margin", f"shape {list(chosen.shape)}", list(margin.shape))
        difference = difference - margin
    return F.softplus(-difference).mean()


def brme(mean: Tensor, std: Tensor, p_hat: Tensor, head: Tensor, alpha: float, noise: Tensor | None = None) -> Tensor:
    """BRME eq. 8: mean over pairs of (r+ - alpha k)^2 + (r- + alpha k)^2, k = p_hat - 1/2, r = mean + std * noise.

    Each pair trains only its assigned head (appendix B.2). Without noise, the exact expectation over N(0, 1) noise:
        E l = (mean+ - alpha k)^2 + std+^2 + (mean- + alpha k)^2 + std-^2,
    which has the same gradient in expectation and no variance. In both forms the loss pulls every std towards 0,
    whatever the residual: std shows how much a region was trained on, not how well it fits, and long training lowers it
    to its floor.

    Args:
        mean, std: [2P, K].   p_hat: [P], the frozen stage-1 model's probability that chosen wins.
        head: [P] int64 in [0, K), from `partition`.   alpha: width of the targets, +-alpha / 2.
        noise: [2P, K], a ~ N(0, 1); None for the closed form. The paper prints one letter for both responses of a pair;
            independent noise has the same expected loss and gradient, because no term has both.
    """
    _require(
        mean.dim() == 2 and mean.shape[0] > 0 and mean.shape[0] % 2 == 0, "mean", "shape [2P, K]", list(mean.shape)
    )
    pairs = mean.shape[0] // 2
    for name, value, shape in (("std", std, mean.shape), ("noise", noise, mean.shape)):
        if value is not None:
            _require(value.shape == shape, name, f"shape {list(shape)}", list(value.shape))
    for name, value in (("p_hat", p_hat), ("head", head)):
        _require(tuple(value.shape) == (pairs,), name, f"shape [{pairs}]", list(value.shape))
    half = alpha * (p_hat.to(mean.dtype) - 0.5)
    target = torch.cat([half, -half])
    column = torch.cat([head, head])[:, None]
    own_mean, own_std = mean.gather(1, column)[:, 0], std.gather(1, column)[:, 0]
    if noise is None:
        loss = (own_mean - target).square() + own_std.square()
    else:
        loss = (own_mean + own_std * noise.gather(1, column)[:, 0] - target).square()
    return loss.sum() / pairs


def bsr(reward_sum: Tensor, num_pairs: int, lam: float) -> Tensor:
    """Batch-sum regularisation (arXiv 2505.07271): lam * B * m^2, m = the mean of the batch's 2B rewards.

    With the sum that the fused op returns it is lam / (4B) * reward_sum^2; `reward_sum` [] runs over the chosen and
    rejected rewards of `num_pairs` = B pairs.
    """
    _require(reward_sum.dim() == 0, "reward_sum", "a scalar", list(reward_sum.shape))
    _require(num_pairs > 0, "num_pairs", "a number above 0", num_pairs)
    return lam / (4 * num_pairs) * reward_sum.square()


def partition(num_pairs: int, num_heads: int, seed: int) -> Tensor:
    """[P] int64: the one head each pair trains (BRME appendix B.2): random, shares equal to within one pair."""
    _require(num_pairs > 0, "pairs", "at least one pair", num_pairs)
    _require(num_heads <= num_pairs, "num_heads", f"at most the number of pairs ({num_pairs})", num_heads)
    shuffled = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    heads = torch.empty(num_pairs, dtype=torch.int64)
    heads[shuffled] = torch.arange(num_pairs) % num_heads
    return heads
