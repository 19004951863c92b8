"""Heads on cached features: what is learnt, what is folded, what is resumed, what is refused."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.kernels import Aggregation, StepOutput, nominal_reward, preference_step
from prudent.rlhf.job.log import RunLog, read_metrics
from prudent.rlhf.reward.fit import (
    BradleyTerryConfig,
    BRMEConfig,
    Fit,
    FitConfig,
    PairFeatures,
    fit_heads,
    schedule,
    standardise,
    step_noise,
)

D = 12
FAST = 0.03  # so narrow a head moves too little at the default rate, which is for widths of 64 and more


def _pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of wildly different scale and offset, the chosen one higher along a hidden direction."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.randn(D, generator=torch.Generator().manual_seed(99))
    x, y = torch.randn(count, D, generator=g), torch.randn(count, D, generator=g)
    swap = (x @ direction < y @ direction)[:, None]
    scale, offset = torch.logspace(-2, 2, D), torch.logspace(1, -3, D)
    return tuple(torch.where(swap, b, a) * scale + offset for a, b in ((x, y), (y, x)))  # type: ignore[return-value]


def _p_hat(count: int) -> Tensor:
    return torch.full((count,), 0.8)


def _accuracy(reward: Tensor) -> float:
    half = len(reward) // 2
    return float((reward[:half] > reward[half:]).double().mean())


def test_stage_1_learns_a_linear_preference_on_badly_scaled_features() -> None:
    chosen, rejected = _pairs(1000)
    held = _pairs(400, seed=1)
    fit = fit_heads(chosen, rejected, BradleyTerryConfig(lr=FAST), evaluation=held, progress=False)
    assert fit.history[-1]["eval_accuracy_mean"] > 0.93
    assert fit.history[-1]["loss"] < fit.history[0]["loss"]
    assert _accuracy(fit.head(torch.cat(held)).reward) == pytest.approx(fit.history[-1]["eval_accuracy_mean"], abs=0.01)


@pytest.mark.parametrize("noise", ["closed", "sampled"])
def test_stage_2_learns_it_in_every_head_and_std_stays_off_its_floor(noise: str) -> None:
    chosen, rejected = _pairs(1500)
    held = PairFeatures(*_pairs(400, seed=1), _p_hat(400))
    config = BRMEConfig(num_heads=3, noise=noise, lr=FAST)
    fit = fit_heads(chosen, rejected, config, p_hat=_p_hat(1500), evaluation=held, progress=False)
    with torch.no_grad():
        out = fit.head(torch.cat(held[:2]))
    for k in range(3):
        assert _accuracy(out.mean[:, k]) > 0.9
    assert _accuracy(nominal_reward(out.mean, out.std, Aggregation("nominal"))) > 0.85
    assert len({tuple(row) for row in fit.head.weight[:3].tolist()}) == 3
    assert out.std.mean() > 5 * config.std_floor
    assert fit.history[-1]["eval_loss"] < fit.history[0]["eval_loss"]
    # alpha (p_hat - 1/2) = 1.2 is what the chosen mean aims at; a linear head falls short of it
    assert 0.3 < out.mean[:400].mean() < 1.2
    assert -1.2 < out.mean[400:].mean() < -0.3


def test_the_folded_head_on_raw_features_equals_the_trained_one_on_scaled() -> None:
    chosen, rejected = _pairs(200)
    scaling = standardise(chosen, rejected)
    fit = fit_heads(chosen, rejected, BRMEConfig(epochs=1), p_hat=_p_hat(200), progress=False)
    inside = fit.head.weight.double() / scaling.inverse
    z = scaling(chosen).double() @ inside.T + (
        fit.head.bias.double() + fit.head.weight.double() @ scaling.shift.double()
    )
    torch.testing.assert_close(fit.head(chosen).mean.double(), z[:, :5], rtol=1e-4, atol=1e-4)


def test_standardised_features_have_mean_0_and_std_1_and_a_constant_one_is_switched_off() -> None:
    chosen, rejected = _pairs(300)
    chosen[:, 3] = rejected[:, 3] = 1234.5
    x = standardise(chosen, rejected)(torch.cat([chosen, rejected])).double()
    varying = torch.arange(D) != 3
    assert (x[:, 3] == 0).all()
    torch.testing.assert_close(x.mean(dim=0)[varying], torch.zeros(D - 1).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(x.std(dim=0, correction=0)[varying], torch.ones(D - 1).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_does_not_change_the_features(dtype: torch.dtype) -> None:
    sides = [side.to(dtype) for side in _pairs(50)]
    before = [side.clone() for side in sides]
    fit_heads(*sides, BradleyTerryConfig(epochs=1), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(sides, before, strict=True))


def test_same_inputs_give_the_same_bits_and_another_seed_does_not() -> None:
    chosen, rejected = _pairs(100)
    config = BRMEConfig(epochs=2, noise="sampled")
    a, b, c = (
        fit_heads(chosen, rejected, x, p_hat=_p_hat(100), progress=False).head.weight
        for x in (config, config, config.model_copy(update={"seed": 1}))
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_data_too_large_to_be_kept_standardised_trains_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, rejected = (side.bfloat16() for side in _pairs(100))
    config = BRMEConfig(epochs=2, noise="sampled", bsr=0.01)
    whole = fit_heads(chosen, rejected, config, p_hat=_p_hat(100), progress=False)
    monkeypatch.setattr("prudent.rlhf.reward.fit._CACHED_BYTES", 0)
    by_batch = fit_heads(chosen, rejected, config, p_hat=_p_hat(100), progress=False)
    assert torch.equal(whole.head.weight, by_batch.head.weight)
    assert whole.history == by_batch.history


def test_margins_push_the_rewards_apart() -> None:
    chosen, rejected = _pairs(300)
    gaps = []
    for margin in (None, torch.full((300,), 3.0)):
        head = fit_heads(chosen, rejected, BradleyTerryConfig(epochs=20, lr=FAST), margin=margin, progress=False).head
        gaps.append((head(chosen).reward - head(rejected).reward).mean().item())
    assert gaps[1] > gaps[0] + 0.5


@pytest.mark.parametrize("config", [BradleyTerryConfig(max_steps=1), BRMEConfig(max_steps=1)])
def test_bsr_enters_the_loss_of_either_stage_in_proportion(config: FitConfig) -> None:
    chosen, rejected = _pairs(128)  # two batches: over all pairs the standardised features' mean, and so BSR, is 0
    p_hat = None if config.stage == "bt" else _p_hat(128)
    configs = [config.model_copy(update={"bsr": lam}) for lam in (0.0, 50.0, 100.0)]
    losses = [fit_heads(chosen, rejected, c, p_hat=p_hat, progress=False).history[0]["loss"] for c in configs]
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


def test_bsr_brings_the_mean_bradley_terry_reward_to_zero() -> None:
    chosen, rejected = _pairs(300)
    means = []
    for lam in (0.0, 10.0):
        fit = fit_heads(chosen, rejected, BradleyTerryConfig(lr=FAST, bsr=lam), progress=False)
        rewards = fit.head(torch.cat([chosen, rejected])).reward
        means.append(torch.stack([rewards[torch.cat([i, i + 300])].mean() for i in torch.arange(300).split(64)]))
    assert means[1].square().mean() < 0.5 * means[0].square().mean()


def test_max_steps_ends_training_inside_an_epoch_with_the_rate_near_zero() -> None:
    chosen, rejected = _pairs(640)
    fit = fit_heads(chosen, rejected, BradleyTerryConfig(epochs=10, max_steps=25), progress=False)
    assert len(fit.history) == 3
    assert fit.history[-1]["lr"] < 0.05 * BradleyTerryConfig().lr


def test_the_schedule_rises_to_one_and_falls_to_zero() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[9:11] == [1.0, 1.0]
    assert 0 < rates[-1] < 0.02
    assert [schedule(0, 1, w) for w in (0.0, 0.05, 1.0)] == [1.0, 1.0, 1.0]


def test_noise_is_keyed_by_seed_and_step() -> None:
    draws = [step_noise(s, t, 4, 2, device=torch.device("cpu")) for s, t in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_epoch_is_logged_under_the_stage(tmp_path: Path) -> None:
    chosen, rejected = _pairs(100)
    with RunLog(tmp_path) as log:
        fit_heads(
            chosen, rejected, BradleyTerryConfig(epochs=2), evaluation=(chosen, rejected), log=log, progress=False
        )
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    assert {"bt/loss", "bt/lr", "bt/eval_accuracy_mean", "bt/eval_loss"} <= set(rows[0])


_LONG = BRMEConfig(epochs=100, max_steps=None, noise="sampled", batch_size=16)
_KILLED = """
import sys, torch
from prudent.rlhf.reward.config import BRMEConfig
from prudent.rlhf.reward.fit import fit_heads
saved = torch.load(sys.argv[1])
config = BRMEConfig.model_validate_json(sys.argv[3])
fit_heads(saved["x"], saved["y"], config, p_hat=saved["p"], progress=False, checkpoint=sys.argv[2])
"""


def test_a_run_killed_by_sigkill_resumes_to_the_same_bits(tmp_path: Path) -> None:
    chosen, rejected = _pairs(400)
    torch.save({"x": chosen, "y": rejected, "p": _p_hat(400)}, tmp_path / "data.pt")
    checkpoint = tmp_path / "killed.pt"
    arguments = [str(tmp_path / "data.pt"), str(checkpoint), _LONG.model_dump_json()]
    killed = subprocess.Popen([sys.executable, "-c", _KILLED, *arguments])
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert 0 < epoch < 100

    def run(file: Path | None) -> Fit:
        return fit_heads(chosen, rejected, _LONG, p_hat=_p_hat(400), progress=False, checkpoint=file)

    resumed, whole = run(checkpoint), run(None)
    assert torch.equal(resumed.head.weight, whole.head.weight)
    assert torch.equal(resumed.head.bias, whole.head.bias)
    assert resumed.history == whole.history


def test_a_finished_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    chosen, rejected = _pairs(50)
    first = fit_heads(chosen, rejected, BradleyTerryConfig(epochs=2), checkpoint=tmp_path / "c.pt", progress=False)
    stamp = (tmp_path / "c.pt").stat().st_mtime_ns
    again = fit_heads(chosen, rejected, BradleyTerryConfig(epochs=2), checkpoint=tmp_path / "c.pt", progress=False)
    assert torch.equal(first.head.weight, again.head.weight)
    assert first.history == again.history
    assert (tmp_path / "c.pt").stat().st_mtime_ns == stamp


def test_a_checkpoint_of_other_data_or_config_is_refused(tmp_path: Path) -> None:
    chosen, rejected = _pairs(50)
    fit_heads(chosen, rejected, BradleyTerryConfig(epochs=1), checkpoint=tmp_path / "c.pt", progress=False)
    for features, config, other in (((rejected, chosen), {}, "data"), ((chosen, rejected), {"lr": 1e-4}, "config")):
        with pytest.raises(ValueError, match=rf"c\.pt: expected one of this run, got one with another {other}$"):
            fit_heads(*features, BradleyTerryConfig(epochs=1, **config), checkpoint=tmp_path / "c.pt", progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    chosen, rejected = _pairs(64)
    config = BradleyTerryConfig(lr=3e37, batch_size=16)  # after a step or two the rewards overflow
    with pytest.raises(
        ValueError, match=r"bt: training stopped: the loss is not finite at step [1-3] \(epoch 1\).*lower lr"
    ):
        fit_heads(chosen, rejected, config, checkpoint=tmp_path / "c.pt", progress=False)
    assert not (tmp_path / "c.pt").exists()


def test_a_loss_that_turns_infinite_later_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def explode(*args: Tensor, **options: Any) -> StepOutput:
        calls.append(1)
        out = preference_step(*args, **options)
        return out._replace(loss=out.loss * float("nan")) if len(calls) == 6 else out

    monkeypatch.setattr("prudent.rlhf.reward.fit.preference_step", explode)
    chosen, rejected = _pairs(64)
    config = BradleyTerryConfig(epochs=4, batch_size=16)
    with pytest.raises(ValueError, match=r"at step 5 \(epoch 2\).*the state after epoch 1 is kept in .*c\.pt"):
        fit_heads(chosen, rejected, config, checkpoint=tmp_path / "c.pt", progress=False)
    kept = torch.load(tmp_path / "c.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["head"].values())


def _call(**changed: object) -> None:
    chosen, rejected = _pairs(8)
    given = {"chosen": chosen, "rejected": rejected, "config": BRMEConfig(epochs=1), "p_hat": _p_hat(8), **changed}
    fit_heads(**given, progress=False)  # type: ignore[arg-type]


def _nan() -> Tensor:
    x = _pairs(8)[0]
    x[3, 1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chosen": torch.zeros(0, D), "rejected": torch.zeros(0, D)}, "pairs: expected at least one pair, got 0"),
        ({"chosen": torch.zeros(8)}, r"chosen: expected shape \[P, D\], got \[8\]"),
        ({"rejected": torch.zeros(7, D)}, r"rejected: expected chosen's shape \[8, 12\], got \[7, 12\]"),
        ({"chosen": _nan()}, "chosen: expected finite features, got NaN or infinity in row 3"),
        ({"config": BRMEConfig(num_heads=9)}, r"num_heads: expected at most the number of pairs \(8\), got 9"),
        ({"p_hat": None}, "p_hat: expected for stage 'brme' only"),
        ({"config": BradleyTerryConfig()}, "p_hat: expected for stage 'brme' only"),
        ({"p_hat": torch.ones(8)}, r"p_hat: expected values in \(0, 1\), got 1\.0 to 1\.0"),
        ({"p_hat": torch.full((8,), 1 - 1e-9, dtype=torch.float64)}, r"p_hat: expected values in \(0, 1\), got 0\.99"),
        ({"p_hat": torch.full((8,), float("nan"))}, r"p_hat: expected values in \(0, 1\), got nan"),
        ({"p_hat": torch.full((7,), 0.5)}, r"p_hat: expected shape \[8\], got \[7\]"),
        ({"margin": torch.zeros(8)}, "margin: expected finite values, for stage 'bt' only"),
        ({"evaluation": (torch.zeros(2, 3), torch.zeros(2, 3))}, r"evaluation chosen: expected shape \[P, 12\]"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changed)
