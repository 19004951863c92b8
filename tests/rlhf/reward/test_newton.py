"""Many penalised Bradley-Terry problems solved at once: each is at its minimum, as scipy finds it."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from prudent.rlhf.reward.newton import solve


def _problems(pairs: int = 80, width: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, margin, weight, penalty of four problems: two penalties, each with all pairs and with a fold of them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(pairs, width, generator=g, dtype=torch.float64) * torch.logspace(0, -2, width) + 0.2
    margin = torch.rand(pairs, generator=g, dtype=torch.float64) - 0.5
    weight = torch.rand(pairs, 4, generator=g, dtype=torch.float64)
    weight[::3, 1::2] = 0
    return x, margin, weight, torch.tensor([1e-3, 1e-3, 2.0, 2.0], dtype=torch.float64)


def _loss(w: Tensor, x: Tensor, margin: Tensor, weight: Tensor, penalty: Tensor) -> Tensor:
    z = x @ w - margin
    return (weight * torch.nn.functional.softplus(-z)).sum() + penalty / 2 * (w @ w)


@pytest.mark.parametrize("curvature", ["matrix", "diagonal"])
def test_every_problem_is_at_its_minimum(curvature: str) -> None:
    x, margin, weight, penalty = _problems()
    matrix = x.T @ x
    found = solve(x, margin, weight, penalty, matrix if curvature == "matrix" else matrix.diagonal(), tolerance=1e-18)
    torch.testing.assert_close(found.logit, x @ found.weight - margin[:, None])
    for c in range(4):
        w = found.weight[:, c].clone().requires_grad_()
        loss = _loss(w, x, margin, weight[:, c], penalty[c])
        loss.backward()
        assert w.grad is not None
        assert float(w.grad.abs().max()) < 1e-7
        theirs = minimize(
            lambda v, c=c: float(_loss(torch.from_numpy(v), x, margin, weight[:, c], penalty[c])),
            torch.zeros(7).double().numpy(),
            method="BFGS",
        )
        assert float(loss.detach()) <= theirs.fun + 1e-12


def test_it_converges_where_a_full_step_overshoots() -> None:
    x, _, _, _ = _problems()
    x = x * x[:, :1].sign() * 100  # separable, and far from where the loss is like a parabola
    one = torch.ones(80, 1, dtype=torch.float64)
    start = torch.full((7, 1), -50.0, dtype=torch.float64)
    for begin in (None, start):
        found = solve(
            x, torch.zeros(80).double(), one, torch.tensor([1e-6]).double(), x.T @ x, start=begin, tolerance=1e-15
        )
        assert float(found.gap) <= 1e-15
        gradient = 1e-6 * found.weight[:, 0] - x.T @ torch.sigmoid(-found.logit[:, 0])
        assert float(gradient.abs().max()) < 1e-6


def test_a_solved_problem_is_left_as_it_is() -> None:
    x, margin, weight, penalty = _problems()
    first = solve(x, margin, weight, penalty, x.T @ x, tolerance=1e-16)
    again = solve(x, margin, weight, penalty, x.T @ x, start=first.weight, tolerance=1e-15)
    assert first.steps > 1
    assert again.steps == 0
    assert torch.equal(again.weight, first.weight)
