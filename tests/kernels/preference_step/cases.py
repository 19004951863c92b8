"""Inputs for the tests of `preference_step`, and the composed form that every execution is compared with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prudent.kernels.ensemble_reward import EnsembleOutput, ensemble_reward, philox_normal
from prudent.kernels.preference_step.contract import Inputs
from prudent.rlhf.reward.losses import bradley_terry, brme, bsr

# every loss with every option, apart and together
LOSSES: dict[str, dict[str, Any]] = {
    "bt": {"loss": "bt"},
    "bt-margin": {"loss": "bt", "margin": True},
    "bt-bsr": {"loss": "bt", "bsr": 0.3},
    "bt-centre": {"loss": "bt", "centre": 0.7},
    "bt-all": {"loss": "bt", "margin": True, "bsr": 0.3, "centre": 0.7},
    "closed": {"loss": "brme"},
    "closed-bsr": {"loss": "brme", "bsr": 0.3},
    "closed-centre": {"loss": "brme", "centre": 0.7},
    "closed-all": {"loss": "brme", "bsr": 0.3, "centre": 0.7},
    "sampled": {"loss": "brme", "seed": True},
    "sampled-all": {"loss": "brme", "seed": True, "bsr": 0.3, "centre": 0.7},
}


def make(
    options: dict[str, Any], pairs: int = 13, d: int = 33, k: int = 5, dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu", gathered: bool = False,
) -> Inputs:  # fmt: skip
    """A batch of `pairs`; `gathered`: its rows are drawn with repeats from a larger set of features."""
    g = torch.Generator().manual_seed(1000 * pairs + 10 * d + k)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    brme_ = options["loss"] == "brme"
    stored = 3 * pairs if gathered else 2 * pairs

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = Inputs(
        features=normal(stored, d).to(dtype),
        weight=(normal(2 * k, d) / d**0.5).to(small),
        bias=normal(2 * k).to(small),
        rows=torch.randint(0, stored, (2 * pairs,), generator=g) if gathered else None,
        head_id=torch.randint(0, k, (pairs,), generator=g) if brme_ else None,
        p_hat=torch.rand(pairs, generator=g, dtype=torch.float64).clamp(0.01, 0.99).to(small) if brme_ else None,
        margin=normal(pairs).abs().to(small) if options.get("margin") else None,
        seed=torch.tensor([2**62 + 12345]) if options.get("seed") else None,
        loss=options["loss"],
        alpha=4.0,
        bsr=options.get("bsr", 0.0),
        centre=options.get("centre", 0.0),
        std_floor=1e-3,
    )
    return Inputs(*(v.to(device) if isinstance(v, Tensor) else v for v in inputs))


def in_fp64(inputs: Inputs) -> Inputs:
    return Inputs(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs))


def losses_of(out: EnsembleOutput, inputs: Inputs) -> Tensor:
    """The loss by rlhf/reward/losses.py from given heads, plus the centring penalty."""
    pairs, reward = inputs.num_pairs, out.mean.mean(dim=1)
    if inputs.loss == "bt":
        loss = bradley_terry(reward[:pairs], reward[pairs:], inputs.margin)
    else:
        assert inputs.p_hat is not None
        assert inputs.head_id is not None
        noise = None
        if inputs.seed is not None:
            noise = philox_normal(inputs.seed, *out.mean.shape, dtype=out.mean.dtype)
        loss = brme(out.mean, out.std, inputs.p_hat, inputs.head_id, inputs.alpha, noise)
    if inputs.bsr:
        loss = loss + bsr(out.reward_sum, pairs, inputs.bsr)
    if inputs.centre:
        loss = loss + inputs.centre * (reward[:pairs] + reward[pairs:]).square().mean()
    return loss


def composed(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """loss, dweight, dbias by `ensemble_reward`, rlhf/reward/losses.py and autograd."""
    weight, bias = inputs.weight.detach().clone().requires_grad_(), inputs.bias.detach().clone().requires_grad_()
    out = ensemble_reward(
        inputs.features, weight, bias, rows=inputs.rows, aggregation="mean", std_floor=inputs.std_floor
    )
    loss = losses_of(out, inputs)
    return loss.detach(), *torch.autograd.grad(loss, [weight, bias])


def lowly(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The usual composition: the linear layer in the features' precision, then fp32 heads, losses and autograd."""
    k = inputs.num_heads
    weight, bias = inputs.weight.detach().clone().requires_grad_(), inputs.bias.detach().clone().requires_grad_()
    x = inputs.features if inputs.rows is None else inputs.features[inputs.rows]
    z = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float()
    mean, std = z[:, :k], F.softplus(z[:, k:]) + inputs.std_floor
    reward = mean.mean(dim=1)
    loss = losses_of(EnsembleOutput(reward, mean, std, reward.sum()), inputs)
    return loss.detach(), *torch.autograd.grad(loss, [weight, bias])


def equal(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def as_exact_as_plain_torch(got: Any, inputs: Inputs) -> None:
    """Our error against fp64 is at most that of the plain computation, plus fp32's rounding of the sums."""
    exact, plain = composed(in_fp64(inputs)), lowly(inputs)
    for name, a, b, c in zip(("loss", "dweight", "dbias"), got, exact, plain, strict=False):
        grain = max(torch.finfo(a.dtype).eps, 4e-6) * float(b.abs().max())
        assert error(a, b) <= error(c, b) + grain, name
