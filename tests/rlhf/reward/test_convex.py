"""The exact Bradley-Terry head: it solves the stated problem, its penalty is chosen on held-out prompts alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from prudent.rlhf.reward.convex import RidgeFit, fit_ridge
from prudent.rlhf.reward.losses import bradley_terry


def _pairs(count: int, width: int, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen, rejected, prompts): a linear truth with logistic noise, features of different units and offsets."""
    g = torch.Generator().manual_seed(seed)
    sides = [torch.randn(count, width, generator=g) for _ in range(2)]
    truth = torch.randn(width, generator=torch.Generator().manual_seed(9))
    logit = (sides[0] - sides[1]) @ truth * (2 / width**0.5)
    uniform = torch.rand(count, generator=g)
    flip = (logit + noise * torch.logit(uniform) < 0)[:, None]
    scale, offset = torch.logspace(-2, 2, width), torch.linspace(-5, 5, width)
    chosen, rejected = torch.where(flip, sides[1], sides[0]), torch.where(flip, sides[0], sides[1])
    return chosen * scale + offset, rejected * scale + offset, torch.arange(count) // 4


def _gap(fit: RidgeFit, chosen: Tensor, rejected: Tensor) -> Tensor:
    with torch.no_grad():
        return fit.head(chosen.float()).reward.double() - fit.head(rejected.float()).reward.double()


def _oracle(chosen: Tensor, rejected: Tensor, margin: Tensor, total: float, scale: float) -> Tensor:
    """The logits of scipy's w on standardised features, for the sum of losses + total * scale / 2 |w|^2."""
    both = torch.cat([chosen, rejected]).double()
    x = (chosen.double() - rejected.double()) / both.std(dim=0, correction=0)

    def objective(v: Any) -> tuple[float, Any]:
        w = torch.tensor(v, requires_grad=True)
        loss = F.softplus(-(x @ w - margin.double())).sum() + total * scale / 2 * (w @ w)
        loss.backward()
        assert w.grad is not None
        return float(loss.detach()), w.grad.numpy()

    start = torch.zeros(x.shape[1], dtype=torch.float64).numpy()
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 9999, "ftol": 1e-16, "gtol": 1e-9}
    )
    return x @ torch.from_numpy(found.x)


def _mean_square(chosen: Tensor, rejected: Tensor) -> float:
    both = torch.cat([chosen, rejected]).double()
    return float(((chosen.double() - rejected.double()) / both.std(dim=0, correction=0)).square().sum(dim=1).mean())


@pytest.mark.parametrize(("pairs", "width"), [(200, 10), (40, 64)])
def test_it_solves_the_stated_problem(pairs: int, width: int) -> None:
    chosen, rejected, prompts = _pairs(pairs, width)
    margin = torch.linspace(0, 1, pairs)
    fit = fit_ridge(chosen, rejected, prompts, margin=margin, grid=[1e-3])
    wanted = _oracle(chosen, rejected, margin, pairs * 1e-3, _mean_square(chosen, rejected))
    torch.testing.assert_close(_gap(fit, chosen, rejected), wanted, rtol=1e-3, atol=1e-3)
    assert fit.log_loss == pytest.approx(float(bradley_terry(wanted, torch.zeros(pairs).double(), margin)), abs=1e-5)
    assert (fit.l2, fit.curve, fit.folds, fit.edge) == (1e-3, [], 0, None)
    rewards = fit.head(torch.cat([chosen, rejected])).reward.detach()
    assert abs(float(rewards.mean())) < 1e-3 * float(rewards.std())


def test_the_curve_is_the_log_loss_of_held_out_prompts() -> None:
    chosen, rejected, prompts = _pairs(60, 5)
    fit = fit_ridge(chosen, rejected, prompts, grid=[1e-4, 1e-2, 1e-1], folds=3, seed=1)
    losses = torch.empty(60, dtype=torch.float64)
    # the folds, found from outside: with prompts of equal size each holds a third of them
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    fold = torch.empty(15, dtype=torch.int64)
    fold[order] = torch.arange(15) % 3
    scale, both = _mean_square(chosen, rejected), torch.cat([chosen, rejected]).double()
    x = (chosen.double() - rejected.double()) / both.std(dim=0, correction=0)
    for k in range(3):
        out = fold[prompts] == k
        w = torch.zeros(5, dtype=torch.float64)
        for _ in range(30):  # plain Newton; the fold keeps the penalty of all 60 pairs
            s = torch.sigmoid(-(x[~out] @ w))
            gradient = 60 * 1e-2 * scale * w - x[~out].T @ s
            hessian = x[~out].T @ ((s * (1 - s))[:, None] * x[~out]) + 60 * 1e-2 * scale * torch.eye(5)
            w = w - torch.linalg.solve(hessian, gradient)
        losses[out] = F.softplus(-(x[out] @ w))
    point = next(p for p in fit.curve if p.l2 == 1e-2)
    assert point.log_loss == pytest.approx(float(losses.mean()), abs=1e-6)
    sums = torch.zeros(15, dtype=torch.float64).index_add_(0, prompts, losses - losses.mean())
    assert point.standard_error == pytest.approx(float(sums.square().sum() * 15 / 14) ** 0.5 / 60, abs=1e-6)
    assert fit.l2 == min(fit.curve, key=lambda p: p.log_loss).l2
    assert (fit.folds, fit.held_out) == (3, "prompt")


def test_a_prompt_is_never_on_both_sides() -> None:
    """Pairs of a prompt are copies of one another, and their labels are noise: a leak would favour no penalty."""
    chosen, rejected, _ = _pairs(60, 30, noise=1e9)
    copies = fit_ridge(chosen.repeat(5, 1), rejected.repeat(5, 1), torch.arange(60).repeat(5))
    leaked = fit_ridge(chosen.repeat(5, 1), rejected.repeat(5, 1), torch.arange(300))
    assert copies.l2 > 0.01 > leaked.l2
    assert copies.curve[0].log_loss > math.log(2) > leaked.curve[0].log_loss


def test_units_offsets_and_copies_of_features_change_nothing() -> None:
    chosen, rejected, prompts = _pairs(120, 6)
    fit = fit_ridge(chosen, rejected, prompts)
    copied = [torch.cat([s, s * 1e3, s - 7], dim=1) * 1e-3 for s in (chosen, rejected)]
    other = fit_ridge(copied[0], copied[1], prompts)
    assert other.l2 == fit.l2
    torch.testing.assert_close(
        torch.tensor([p.log_loss for p in other.curve]), torch.tensor([p.log_loss for p in fit.curve])
    )
    torch.testing.assert_close(_gap(other, *copied), _gap(fit, chosen, rejected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("copies", [1, 25])
def test_a_truth_is_learned_and_noise_is_not(copies: int) -> None:
    """40 features, or 1000 noisy copies of them: held-out log-loss below log 2, unless the labels are coin flips."""
    chosen, rejected, prompts = _pairs(300, 40)
    spread = torch.cat([chosen, rejected]).std(dim=0).repeat(copies)
    g = torch.Generator().manual_seed(5)
    sides = [
        s.repeat(1, copies) + 0.1 * spread * torch.randn(300, len(spread), generator=g) for s in (chosen, rejected)
    ]
    fit = fit_ridge(sides[0], sides[1], prompts)
    assert min(p.log_loss for p in fit.curve) < math.log(2) - 0.1
    swap = torch.rand(300, 1, generator=g) < 0.5
    random = fit_ridge(torch.where(swap, *sides), torch.where(swap, *sides[::-1]), prompts)
    assert random.l2 > 10 * fit.l2
    assert min(p.log_loss for p in random.curve) > math.log(2) - 0.02


def test_separable_pairs_extend_the_grid_downwards_and_end_there() -> None:
    chosen, rejected, prompts = _pairs(100, 3, noise=0.0)
    fit = fit_ridge(chosen, rejected, prompts, grid=[1e-3, 1e-2, 1e-1])
    assert [p.l2 for p in fit.curve][-6:] == [3e-05, 1e-04, 3e-04, 1e-3, 1e-2, 1e-1]
    assert [p.l2 for p in fit.curve] == sorted(p.l2 for p in fit.curve)
    easy = fit_ridge(chosen + 9, chosen - 9, prompts)
    assert easy.edge == "low"
    assert easy.curve[0].log_loss < 1e-6
    assert math.isfinite(easy.log_loss)


def test_a_constant_feature_has_no_weight() -> None:
    chosen, rejected, prompts = _pairs(50, 6)
    chosen[:, 2] = rejected[:, 2] = 1e4
    fit = fit_ridge(chosen, rejected, prompts)
    assert (fit.head.weight[0] == 0).tolist() == [False, False, True, False, False, False]


def test_a_weight_counts_as_copies_of_the_pair() -> None:
    chosen, rejected, prompts = _pairs(40, 5)
    weight = torch.ones(40)
    weight[:20] = 3
    index = torch.cat([torch.arange(40), torch.arange(20), torch.arange(20)])
    ours = fit_ridge(chosen, rejected, prompts, weight=weight, grid=[1e-2])
    copied = fit_ridge(chosen[index], rejected[index], prompts[index], grid=[1e-2])
    # the copies weigh in the features' std, and so in the penalty of each direction, a little
    torch.testing.assert_close(_gap(ours, chosen, rejected), _gap(copied, chosen, rejected), rtol=0.1, atol=0.05)
    assert ours.log_loss == pytest.approx(copied.log_loss, abs=2e-3)


@pytest.mark.parametrize(("pairs", "width"), [(80, 6), (20, 50)])
def test_the_posterior_is_the_inverse_hessian(pairs: int, width: int) -> None:
    chosen, rejected, prompts = _pairs(pairs, width)
    fit = fit_ridge(chosen, rejected, prompts, grid=[1e-2], posterior=True)
    both = torch.cat([chosen, rejected]).double()
    mean, std = both.mean(dim=0), both.std(dim=0, correction=0)
    x = (chosen.double() - rejected.double()) / std
    s = torch.sigmoid(_gap(fit, chosen, rejected))
    hessian = x.T @ ((s * (1 - s))[:, None] * x)
    hessian += torch.eye(width) * pairs * 1e-2 * _mean_square(chosen, rejected)
    new, _, _ = _pairs(9, width, seed=4)
    f = (new.double() - mean) / std
    wanted = (f * torch.linalg.solve(hessian, f.T).T).sum(dim=1).sqrt()
    assert fit.posterior is not None
    torch.testing.assert_close(fit.posterior.std(new), wanted, rtol=1e-4, atol=0)
    d = f - f[:1]
    against = (d * torch.linalg.solve(hessian, d.T).T).sum(dim=1).sqrt()
    torch.testing.assert_close(fit.posterior.std(new, new[0]), against, rtol=1e-4, atol=1e-6)


def test_few_prompts_give_fewer_folds_and_one_prompt_holds_out_pairs() -> None:
    chosen, rejected, _ = _pairs(30, 4)
    two = fit_ridge(chosen, rejected, torch.arange(30) % 2)
    one = fit_ridge(chosen, rejected, torch.zeros(30, dtype=torch.int64))
    assert (two.folds, two.held_out) == (2, "prompt")
    assert (one.folds, one.held_out) == (5, "pair")
    alone = fit_ridge(chosen[:1], rejected[:1], torch.zeros(1, dtype=torch.int64))
    assert (alone.folds, alone.curve, alone.l2) == (0, [], pytest.approx(1e-3))
    assert float(_gap(alone, chosen[:1], rejected[:1])) > 0


def test_half_precision_features_and_equal_bits() -> None:
    chosen, rejected, prompts = _pairs(60, 8)
    half = chosen.bfloat16(), rejected.bfloat16()
    first, again = fit_ridge(*half, prompts), fit_ridge(*half, prompts)
    wide = fit_ridge(half[0].float(), half[1].float(), prompts)
    assert torch.equal(first.head.weight, again.head.weight)
    assert torch.equal(first.head.weight, wide.head.weight)
    assert (first.head.num_heads, str(first.head.aggregation)) == (1, "mean")


def test_the_summary_is_json() -> None:
    chosen, rejected, prompts = _pairs(40, 3)
    found = fit_ridge(chosen, rejected, prompts, grid=[1e-3, 1e-2, 1e-1]).summary()
    assert found["curve"][0].keys() == {"l2", "log_loss", "standard_error"}
    assert found["l2"] in [point["l2"] for point in found["curve"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": torch.zeros(9)}, r"prompts: expected shape \[10\], got \[9\]"),
        ({"prompts": torch.zeros(10)}, "prompts: expected integer labels, got torch.float32"),
        ({"margin": torch.full((10,), math.nan)}, "margin: expected finite values"),
        ({"weight": torch.full((10,), -1.0)}, "weight: expected finite values >= 0"),
        ({"weight": torch.zeros(10)}, "weight: expected finite values >= 0, not all 0"),
        ({"grid": []}, r"grid: expected finite penalties above 0, got \[\]"),
        ({"grid": [0.0, 1.0]}, "grid: expected finite penalties above 0"),
        ({"folds": 1}, "folds: expected a whole number above 1, got 1"),
        ({"chosen": torch.full((10, 3), math.inf)}, "chosen: expected finite features, got NaN or infinity in row 0"),
        ({"rejected": torch.zeros(10, 4)}, r"rejected: expected chosen's shape \[10, 3\], got \[10, 4\]"),
        ({"chosen": torch.zeros(0, 3), "rejected": torch.zeros(0, 3)}, "pairs: expected at least one pair, got 0"),
        ({"rejected": None}, "pairs: expected a pair whose two sides have different features, got none"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], message: str) -> None:
    chosen, rejected, prompts = _pairs(10, 3)
    given: dict[str, Any] = {"chosen": chosen, "rejected": rejected, "prompts": prompts, **change}
    if given["rejected"] is None:
        given["rejected"] = given["chosen"]
    with pytest.raises(ValueError, match=message):
        fit_ridge(**given)
