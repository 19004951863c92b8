"""PET: its objective against enumeration, its gradient against that of the max, its options, resuming."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.engine import EnsembleHead, calibrate
from prudent.rlhf.reward.pet import fit as pet_fit
from prudent.rlhf.reward.pet.config import PETConfig
from prudent.rlhf.reward.pet.fit import PETFeatures, fit_pet, measure_pet
from prudent.rlhf.reward.pet.objective import best_samples, pet_gap, pet_loss, takes_rejected

PROMPTS, RESPONSES = 3, 4
# (prompt, winner, loser), with disagreeing labels, without which Bradley-Terry has no finite minimum
VOTES = [
    *[(0, 0, 1)] * 4 + [(0, 1, 0)] * 2 + [(0, 1, 2)] * 3 + [(0, 2, 1)] + [(0, 3, 0)] * 2 + [(0, 0, 3)] * 2,
    *[(1, 2, 0)] * 3 + [(1, 0, 2)] + [(1, 3, 2)] * 2 + [(1, 2, 3)] * 2 + [(1, 1, 3)] * 3 + [(1, 3, 1)],
    *[(2, 1, 0)] * 2 + [(2, 0, 1)] * 2 + [(2, 2, 3)] * 5 + [(2, 3, 2)] + [(2, 0, 3)] * 2 + [(2, 3, 0)],
]


def _cell(prompt: int, response: int) -> Tensor:
    """The one-hot feature of a cell: a linear reward on it is a table r[x, y]."""
    return torch.eye(PROMPTS * RESPONSES)[prompt * RESPONSES + response]


def _table() -> PETFeatures:
    """The votes; every response of a prompt is one of its n samples."""
    samples = torch.eye(PROMPTS * RESPONSES).view(PROMPTS, RESPONSES, -1)
    return PETFeatures(
        torch.stack([_cell(x, w) for x, w, _ in VOTES]),
        torch.stack([_cell(x, loser) for x, _, loser in VOTES]),
        torch.tensor([x for x, _, _ in VOTES]),
        samples,
    )


def _objective(table: Tensor, beta: float, policy: tuple[int, ...] | None = None) -> Tensor:
    """PET's objective of r [X, Y] in fp64, written out; with a policy (a response a prompt) in place of the max."""
    loss = table.new_zeros(())
    for x, winner, loser in VOTES:
        picked = table[x].max() if policy is None else table[x, policy[x]]
        loss = (
            loss + picked - table[x, winner] - beta * torch.nn.functional.logsigmoid(table[x, winner] - table[x, loser])
        )
    return loss / len(VOTES)


def _newton(x: int, tied: tuple[int, ...], beta: float) -> Tensor | None:
    """The row r[x] that minimises the objective with the responses `tied` at one value that is taken for the max.

    Free variables: the tied value and the others', the first of all fixed at 0 (adding a constant changes nothing).
    None where there is no finite minimum."""
    groups = [tied, *[(y,) for y in range(RESPONSES) if y not in tied]]
    spread = torch.zeros(RESPONSES, len(groups) - 1, dtype=torch.float64)
    for column, group in enumerate(groups[1:]):
        spread[list(group), column] = 1.0
    winners, losers = torch.tensor([(w, loser) for prompt, w, loser in VOTES if prompt == x]).T

    def smooth(free: Tensor) -> Tensor:
        row = spread @ free
        bt = -torch.nn.functional.logsigmoid(row[winners] - row[losers])
        return (row[tied[0]] - row[winners] + beta * bt).sum()

    free = torch.zeros(len(groups) - 1, dtype=torch.float64)
    for _ in range(60 if len(groups) > 1 else 0):
        slope = torch.autograd.functional.jacobian(smooth, free)
        if slope.abs().max() < 1e-10:
            break
        bend = torch.autograd.functional.hessian(smooth, free)
        step, value, size = torch.linalg.pinv(bend) @ slope, smooth(free), 1.0
        while smooth(free - size * step) > value and size > 1e-9:
            size /= 2
        free = free - size * step
    if len(groups) > 1 and torch.autograd.functional.jacobian(smooth, free).abs().max() > 1e-8:
        return None
    return spread @ free


def _solved(beta: float) -> Tensor:
    """The minimax by enumeration: at the optimum some set of a prompt's responses ties for the max, and with that set
    held equal the problem is smooth and convex. So every set is solved, and the true objective takes the least."""
    rows = []
    for x in range(PROMPTS):
        sets = [s for k in range(1, RESPONSES + 1) for s in itertools.combinations(range(RESPONSES), k)]
        found = [row for row in (_newton(x, s, beta) for s in sets) if row is not None]
        padded = [torch.zeros(PROMPTS, RESPONSES, dtype=torch.float64).index_put((torch.tensor(x),), r) for r in found]
        rows.append(min(zip(found, padded, strict=True), key=lambda pair: float(_objective(pair[1], beta)))[0])
    return torch.stack(rows)


def _centred(table: Tensor) -> Tensor:
    return table - table.mean(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def start() -> EnsembleHead:
    head = EnsembleHead(PROMPTS * RESPONSES, 1, aggregation="mean")
    head.reset_parameters(torch.Generator().manual_seed(3))
    return head.requires_grad_(False)


def _learned(head: EnsembleHead) -> Tensor:
    return (head.weight[0].double() + head.bias[0].double()).view(PROMPTS, RESPONSES)


@pytest.mark.parametrize("beta", [0.5, 3.0, 10.0])
def test_the_tabular_minimax_is_reached(start: EnsembleHead, beta: float) -> None:
    want = _solved(beta)
    config = PETConfig(samples=RESPONSES, beta=beta, batch_size=len(VOTES), epochs=1000, lr=0.01)
    fit = fit_pet(start, _table(), config, progress=False)
    got = _learned(fit.head)
    best, reached = float(_objective(want, beta)), float(_objective(got, beta))
    assert best - 1e-9 <= reached <= best + 5e-4
    torch.testing.assert_close(_centred(got), _centred(want), atol=5e-3, rtol=0)
    # the inner problem: no deterministic policy gains more on the reward that was learnt than best-of-n does
    policies = itertools.product(range(RESPONSES), repeat=PROMPTS)
    assert max(float(_objective(got, beta, policy)) for policy in policies) == pytest.approx(reached, abs=1e-9)
    assert fit.after["loss"] == pytest.approx(reached, abs=1e-5)
    assert fit.after["gap"] < fit.before["gap"]


def test_the_enumeration_finds_ties_and_no_direction_goes_down_from_it() -> None:
    """The oracle's own check: at a beta that leaves responses tied at the top, small steps anywhere only raise it."""
    want = _solved(0.5)
    top = want.max(dim=1, keepdim=True).values
    assert int(((want - top).abs() < 1e-9).sum()) > PROMPTS
    generator = torch.Generator().manual_seed(0)
    value = float(_objective(want, 0.5))
    for _ in range(300):
        step = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        assert float(_objective(want + 1e-3 * step, 0.5)) >= value


def test_a_prompts_constant_changes_nothing(start: EnsembleHead) -> None:
    """Reference and samples share the prompt, so r(x, y) + c(x) has the same loss."""
    data, config = _table(), PETConfig(samples=RESPONSES)
    shifted = EnsembleHead(start.hidden_size, 1, aggregation="mean")
    shifted.load_state_dict(start.state_dict())
    with torch.no_grad():
        shifted.weight[0] += torch.tensor([5.0, -3.0, 100.0]).repeat_interleave(RESPONSES)
    before, after = (measure_pet(lambda f, h=h: h(f).reward, data, config) for h in (start, shifted))
    assert after == pytest.approx(before, abs=1e-4)


# the gradient


def _random(pairs: int = 12, prompts: int = 5, samples: int = 6, dim: int = 7, seed: int = 0) -> PETFeatures:
    generator = torch.Generator().manual_seed(seed)
    return PETFeatures(
        torch.randn(pairs, dim, generator=generator),
        torch.randn(pairs, dim, generator=generator),
        torch.arange(pairs) % (prompts + 1) - 1,  # some prompts were not sampled for
        torch.randn(prompts, samples, dim, generator=generator),
        torch.randn(prompts, dim, generator=generator),
    )


def _head(heads: int, spec: str, dim: int = 7) -> EnsembleHead:
    head = EnsembleHead(dim, heads, aggregation=spec)
    head.reset_parameters(torch.Generator().manual_seed(heads))
    return head


@pytest.mark.parametrize(
    ("heads", "spec"), [(1, "mean"), (3, "tradeoff:0.4"), (3, "min"), (3, "uwo:0.5"), (4, "median")]
)
@pytest.mark.parametrize("reference", ["chosen", "sample"])
def test_the_gradient_is_that_of_the_max_over_all_samples(heads: int, spec: str, reference: Any) -> None:
    data, config = _random(), PETConfig(samples=6, reference=reference)
    state = pet_fit._State(_head(heads, spec), data, config, None, None)
    index = torch.arange(12)
    state.loss(index, 0).loss.backward()
    envelope = {name: p.grad.clone() for name, p in state.head.named_parameters() if p.grad is not None}
    state.head.zero_grad()
    sampled = data.prompt >= 0
    every = state.reward(data.samples.flatten(0, 1)).view(5, 6)[data.prompt[sampled]]
    chosen, rejected = state.reward(data.chosen), state.reward(data.rejected)
    other = chosen[sampled] if reference == "chosen" else state.reward(data.reference)[data.prompt[sampled]]
    loss = (every.max(dim=1).values - other).mean() - 10 * torch.nn.functional.logsigmoid(chosen - rejected).mean()
    loss.backward()
    assert envelope
    for name, grad in envelope.items():
        torch.testing.assert_close(grad, getattr(state.head, name).grad, atol=2e-6, rtol=1e-5)


def test_the_samples_are_ranked_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    winners: list[list[int]] = []

    def spy(rewards: Tensor) -> Tensor:
        assert not rewards.requires_grad
        winners.append(best_samples(rewards).tolist())
        return best_samples(rewards)

    monkeypatch.setattr(pet_fit, "best_samples", spy)
    config = PETConfig(samples=6, beta=0.1, batch_size=12, epochs=40, lr=0.1)
    fit_pet(_head(1, "mean"), _random(), config, progress=False)
    assert len(winners) == 40
    assert winners[0] != winners[-1]


def test_the_hinge_and_the_reference_as_a_constant() -> None:
    best = torch.tensor([3.0, 1.0, 0.0, 2.0], requires_grad=True)
    reference = torch.tensor([1.0, 2.0, 0.0, 0.0], requires_grad=True)
    assert pet_gap(best, reference, PETConfig()).item() == (2 - 1 + 0 + 2) / 4
    hinged = PETConfig(hinge="all")
    assert pet_gap(best, reference, hinged).item() == (2 + 2) / 4
    # the same as a max in which the reference takes part
    assert pet_gap(best, reference, hinged).item() == (torch.maximum(best, reference) - reference).mean().item()
    active = pet_gap(best, reference, PETConfig(hinge="active", detach_reference=True))
    assert active.item() == (2 + 2) / 2
    active.backward()
    assert best.grad is not None
    assert best.grad.tolist() == [0.5, 0.0, 0.0, 0.5]
    assert reference.grad is None
    pet_gap(best, reference, PETConfig()).backward()
    assert reference.grad.tolist() == [-0.25] * 4
    assert pet_gap(best[:0], reference[:0], PETConfig()).item() == 0.0


def test_the_loss_is_gap_plus_beta_times_bradley_terry() -> None:
    best, chosen, rejected = (torch.tensor(v) for v in ([2.0], [1.0, 0.0], [0.0, 0.0]))
    out = pet_loss(best, chosen[:1], chosen, rejected, PETConfig(beta=3.0))
    bt = (torch.nn.functional.softplus(torch.tensor(-1.0)) + torch.log(torch.tensor(2.0))) / 2
    assert float(out.loss) == pytest.approx(1.0 + 3 * float(bt))
    with pytest.raises(ValueError, match=r"pet_gap: expected best and reference \[B\], got \[1\], \[2\]"):
        pet_loss(best, chosen, chosen, rejected, PETConfig())


def test_the_dataset_reference_is_either_side_half_the_time() -> None:
    drawn = torch.cat([takes_rejected(step, 100, PETConfig(reference="dataset")) for step in range(50)])
    assert 0.47 < float(drawn.double().mean()) < 0.53
    assert not takes_rejected(0, 100, PETConfig()).any()


# the heads it starts from


def test_an_ensembles_aggregate_is_what_becomes_pessimistic_and_its_calibration_stays() -> None:
    data, head = _random(), _head(3, "min")
    calibrate(head, torch.cat([data.chosen, data.rejected]))
    fit = fit_pet(head, data, PETConfig(samples=6, epochs=30, batch_size=12, lr=0.03), progress=False)
    assert torch.equal(fit.head.scale, head.scale)
    assert torch.equal(fit.head.shift, head.shift)
    assert str(fit.head.aggregation) == "min"
    for trained, numbers in ((head, fit.before), (fit.head, fit.after)):
        again = measure_pet(lambda f, h=trained: h(f).reward, data, PETConfig(samples=6))
        assert again == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    assert fit.after["loss"] < fit.before["loss"]


def test_a_single_head_trains_on_its_own_outputs_and_keeps_its_unit() -> None:
    """Bradley-Terry's logits are the uncalibrated outputs: a calibrated start trains to the same weights."""
    data, config = _random(), PETConfig(samples=6, epochs=5, batch_size=12)
    plain, calibrated = _head(1, "mean"), _head(1, "mean")
    calibrate(calibrated, torch.cat([data.chosen, data.rejected]))
    first, second = (fit_pet(head, data, config, progress=False).head for head in (plain, calibrated))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(second.scale, calibrated.scale)


def test_a_dimension_that_never_varies_keeps_its_weight() -> None:
    data = _random()
    for rows in (data.chosen, data.rejected, data.samples, data.reference):
        rows[..., 2] = 4.0
    head = _head(1, "mean")
    fit = fit_pet(head, data, PETConfig(samples=6, epochs=1), progress=False)
    assert fit.head.weight[0, 2] == head.weight[0, 2]
    again = measure_pet(lambda f: fit.head(f).reward, data, PETConfig(samples=6))
    assert again == pytest.approx(fit.after, abs=1e-4)


# the run


def test_killed_after_any_epoch_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = _random(40), PETConfig(samples=6, epochs=6, batch_size=8, reference="dataset")
    whole = fit_pet(_head(3, "min"), data, config, evaluation=_random(seed=1), progress=False)
    train_epoch = pet_fit._State.train_epoch

    def die(state: Any, epoch: int) -> dict[str, float]:
        if epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(state, epoch)

    checkpoint = tmp_path / "pet.pt"
    options: dict[str, Any] = {"evaluation": _random(seed=1), "progress": False, "checkpoint": checkpoint}
    with monkeypatch.context() as patch:
        patch.setattr(pet_fit._State, "train_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            fit_pet(_head(3, "min"), data, config, **options)
    resumed = fit_pet(_head(3, "min"), data, config, **options)
    assert resumed[1:] == whole[1:]
    assert all(torch.equal(a, b) for a, b in zip(whole.head.parameters(), resumed.head.parameters(), strict=True))
    with pytest.raises(ValueError, match="expected one of this run, got one with another start"):
        fit_pet(_head(2, "min"), data, config, **options)


def test_what_does_not_fit_is_refused() -> None:
    data, config = _random(), PETConfig(samples=6)
    for change, message in (
        ({"samples": data.samples[:, :5]}, r"samples: expected shape \[5, 6, 7\], got \[5, 5, 7\]"),
        ({"prompt": data.prompt + 1}, "prompt: expected rows from -1 to 4, got 0 to 5"),
        ({"chosen": data.chosen * torch.nan}, "chosen: expected finite values, got NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_pet(_head(1, "mean"), data._replace(**change), config, progress=False)
    wanted = PETConfig(samples=6, reference="sample")
    with pytest.raises(ValueError, match=r"reference: expected features \[5, 7\] with reference sample, got none"):
        fit_pet(_head(1, "mean"), data._replace(reference=None), wanted, progress=False)
    none = data._replace(chosen=data.chosen[:0], rejected=data.rejected[:0], prompt=data.prompt[:0])
    with pytest.raises(ValueError, match="pairs: expected at least one pair, got 0"):
        fit_pet(_head(1, "mean"), none, config, progress=False)


def test_a_loss_that_is_not_finite_stops_with_a_sentence() -> None:
    data = _random()
    huge = data._replace(chosen=data.chosen * 1e30)
    head = _head(1, "mean")
    with torch.no_grad():
        head.weight *= 1e12
    with pytest.raises(ValueError, match="pet: training stopped: the loss is not finite at step 0"):
        fit_pet(head, huge, PETConfig(samples=6), progress=False)
