"""The terms of a PPO step's loss, per token or per sequence; `update` sums and normalises them.

Notation: R response tokens, B sequences; pi the policy that is trained, pi_old the one that sampled, pi_ref the
reference; l = log pi - log pi_ref. Every function returns one number per token (or sequence), so that micro-batches of
any size add up to the same mean over a minibatch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "abs"]

LOG_RATIO_BOUND = 20.0  # of log pi / pi_old, as in verl: a larger exponential may overflow; 0 * inf is a NaN gradient
CHI2_KNEE = 10.0  # beyond it e^l is continued as a straight line, as in the code of arXiv 2403.03185
CHI2_FLOOR = 1e-4  # least value under the square root, whose slope is infinite at 0 (same code)


def policy_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), negated: -min(w A, clamp(w, 1 - clip, 1 + clip) A).

    w = pi / pi_old. At w = 1 its gradient is the policy gradient, -A grad log pi. Beyond |log w| = 20, w is constant.

    Args:
        logprob, old_logprob, advantage: [R]; only `logprob` carries a gradient.

    Returns:
        loss [R], and clipped [R] bool: where the clamp removed the gradient.
    """
    ratio = (logprob - old_logprob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    plain, clamped = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clamped), clamped > plain


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error of the critic, clipped around its own old value: [R].

    max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2) / 2, which removes the gradient where V has moved by
    more than `clip` towards its target (OpenAI baselines' ppo2; not in the paper). Without `clip`, (V - R)^2 / 2.
    """
    error = (value - returns).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def kl_estimate(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(pi || pi_ref) for each l = log pi - log pi_ref of a token drawn from pi; any shape.

    k1 = l   k2 = l^2 / 2   k3 = e^-l - 1 + l (J. Schulman, "Approximating KL divergence", 2020)   abs = |l|
    E k1 = E k3 = KL; E k2 = KL to second order in l; k2 and k3 are never negative; abs is a penalty, not an estimate.

    As losses, the four have different gradients. On samples of pi itself,

        k1   E grad log pi             = 0: pure noise, no pull towards the reference
        k2   E l grad log pi           = grad KL(pi || pi_ref): the one to use in the loss
        k3   E (1 - e^-l) grad log pi  = grad KL(pi_ref || pi): the other direction of KL
        abs  E sign(l) grad log pi     = grad sum |pi - pi_ref|, twice the total variation

    at each token, given the text before it: a token's effect on the KL of later tokens is part of KL as a reward,
    and not of a loss per token. After the first optimizer step the samples are those of pi_old, and all
    four are approximate, as the loss is not weighted by pi / pi_old.
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    if estimator == "abs":
        return log_ratio.abs()
    raise ValueError(f"kl.estimator: expected k1, k2, k3 or abs, got {estimator}")


def _expm1(log_ratio: Tensor) -> Tensor:
    """e^l - 1, and its tangent from l = 10 on: a sequence far from the reference has a large gradient, not infinity."""
    bound = math.exp(CHI2_KNEE)
    beyond = bound * (1 + log_ratio - CHI2_KNEE) - 1
    return torch.where(log_ratio < CHI2_KNEE, torch.expm1(log_ratio.clamp(max=CHI2_KNEE)), beyond)


def chi2_estimate(log_ratio: Tensor) -> Tensor:
    """[B] terms whose mean estimates chi^2(pi || pi_ref) = E_pi[pi / pi_ref - 1] (arXiv 2403.03185, and its code).

    l [B] is a whole sequence's log ratio. The term is (e^l - 1) + (e^-l - 1): the second part has mean 0 under pi and
    makes each term 2 cosh(l) - 2 >= 0. Both exponentials continue as straight lines beyond |l| = 10.

    Its gradient through log pi, on samples of pi, is E (e^l - e^-l) grad log pi = grad chi^2(pi || pi_ref) / 2 +
    grad KL(pi_ref || pi): both pull towards the reference, but it is not the gradient of chi^2 alone, which would be
    E 2 e^l grad log pi. The paper's code has the same gradient; we keep it so that its coefficients mean the same.
    """
    return _expm1(log_ratio) + _expm1(-log_ratio)


def chi2_price(mean: float) -> tuple[float, float]:
    """sqrt(max(chi^2, 1e-4)) and its derivative by chi^2, at the estimate `mean` over a minibatch.

    The square root of a mean is not a sum over micro-batches. Its gradient is: derivative * grad mean, with the
    derivative a number once the whole minibatch's mean is known.
    """
    root = math.sqrt(max(mean, CHI2_FLOOR))
    return root, (0.5 / root if mean > CHI2_FLOOR else 0.0)


def sequence_sum(tokens: Tensor, sequence: Tensor, offset: Tensor, count: int, longest: int) -> Tensor:
    """[count] sums of `tokens` [R] over each sequence; `sequence` and `offset` as in `token_batch`.

    Summed through a [count, longest] table, because a scatter adds in no fixed order on a GPU.
    """
    return tokens.new_zeros(count, longest).index_put((sequence, offset), tokens).sum(1)
