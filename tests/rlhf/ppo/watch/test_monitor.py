"""The monitor: every number by hand, written once a step, and the texts behind them."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prudent.rlhf.job.log import RunLog, read_metrics
from prudent.rlhf.ppo.batch import Experience, Samples
from prudent.rlhf.ppo.config import PPOConfig, RewardConfig
from prudent.rlhf.ppo.rewards.sources import Rewards
from prudent.rlhf.ppo.stop import METRICS
from prudent.rlhf.ppo.watch import monitor
from prudent.rlhf.ppo.watch.monitor import Monitor, TextLog, experience_metrics, explained_variance, read_texts

CPU = torch.device("cpu")


def _config(tmp_path: Path, **given: Any) -> PPOConfig:
    return PPOConfig(model="m", prompts="p", output=tmp_path, reward=RewardConfig(source="r"), **given)


def _experience(**changes: Any) -> Experience:
    """Three samples of 2, 1 and 2 tokens; the last one's reward is NaN."""
    samples = Samples([[1], [1], [2]], [[5, 3], [3], [6, 7]], [True, True, False], [0, 0, 1])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    nan = math.nan
    experience = Experience(
        samples=samples,
        mask=mask,
        logprob=torch.tensor([[-1.0, -2.0], [-1.0, 9.0], [-1.0, -1.0]]),
        ref_logprob=torch.tensor([[-1.5, -2.0], [-2.0, 0.0], [-9.0, -9.0]]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, 9.0], [7.0, 7.0]]),
        value=torch.tensor([[0.0, 1.0], [2.0, 9.0], [5.0, 5.0]]),
        reward=torch.tensor([1.0, 2.0, nan]),
        nominal=torch.tensor([2.0, 3.0, nan]),
        worst=torch.tensor([0.0, 2.0, nan]),
        head_mean=torch.tensor([[0.0, 2.0], [2.0, 2.0], [nan, nan]]),
        head_std=torch.tensor([[1.0, 2.0], [3.0, 4.0], [nan, nan]]),
        score=torch.tensor([1.0, 2.0, nan]),
        advantage=torch.zeros(3, 2),
        returns=torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, 0.0]]),
        dropped=torch.tensor([False, False, True]),
        kl=torch.tensor([0.5, 1.0, 16.0]),
    )
    return dataclasses.replace(experience, **changes)


def test_every_number_by_hand_with_the_dropped_sample_left_out() -> None:
    metrics = experience_metrics(_experience())
    ratios = torch.tensor([0.5, 1.0]).double()
    chi2 = (2 * torch.cosh(ratios) - 2).mean().sqrt()
    expected = {
        "reward/mean": 1.5,
        "reward/nominal": 2.5,
        "reward/worst": 1.0,
        "reward/gap": 1.5,
        "reward/head_std": 2.5,
        "reward/disagreement": 0.5,  # population std of (0, 2) is 1, of (2, 2) is 0
        "kl/sequence": 0.75,
        "kl/token": 0.5,
        "kl/chi2": float(chi2),
        "policy/entropy": 2.0,
        "text/length": 5 / 3,
        "text/truncated": 1 / 3,
        "samples/dropped": 1.0,
        "value/explained_variance": 1 - 2 / (14 / 3),  # residuals 0, 0, 3 have variance 2; returns 0, 1, 5 have 14/3
    }
    assert metrics == pytest.approx(expected)


def test_no_heads_and_no_critic_no_such_names() -> None:
    absent = dict.fromkeys(("nominal", "worst", "head_mean", "head_std", "value", "returns"))
    names = set(experience_metrics(_experience(**absent)))
    assert not {name for name in names if "head" in name or "gap" in name or "disagreement" in name or "value" in name}


def test_one_head_has_its_std_and_nobody_to_disagree_with() -> None:
    several = _experience()
    assert several.head_mean is not None
    assert several.head_std is not None
    metrics = experience_metrics(_experience(head_mean=several.head_mean[:, :1], head_std=several.head_std[:, :1]))
    assert "reward/head_std" in metrics
    assert "reward/disagreement" not in metrics


def test_the_distance_of_kept_samples_and_the_share_of_them_beyond_the_edge() -> None:
    metrics = experience_metrics(_experience(distance=torch.tensor([0.5, 1.5, 9.0])))
    assert (metrics["reward/distance"], metrics["text/foreign"]) == (1.0, 0.5)
    assert not {"reward/distance", "text/foreign"} & set(experience_metrics(_experience()))


def test_nothing_finite_is_nan_and_no_error() -> None:
    metrics = experience_metrics(_experience(reward=torch.full((3,), math.nan)))
    assert math.isnan(metrics["reward/mean"])
    assert math.isnan(metrics["kl/sequence"])
    assert metrics["samples/dropped"] == 3


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 7.0), returns) == pytest.approx(0)
    assert math.isnan(explained_variance(returns, torch.ones(3)))
    assert math.isnan(explained_variance(returns[:0], returns[:0]))


def _gold(samples: Samples) -> Rewards:
    return Rewards(torch.tensor([0.25, 0.75, math.nan][: len(samples.responses)]))


def _decode(ids: Any) -> str:
    return " ".join(map(str, ids))


class TestMonitor:
    """What `Monitor` writes down."""

    def _observe(self, tmp_path: Path, steps: int = 2) -> list[dict[str, Any]]:
        with RunLog(tmp_path) as log, Monitor(_config(tmp_path), log, CPU, _gold, _decode) as watch:
            for step in range(steps):
                for phase in ("rollout", "score", "update"):
                    with watch.clock(phase):
                        pass
                experience = _experience()
                assert experience.head_std is not None
                experience.head_std.mul_(step + 1)
                watch.observe(step, experience, {"policy/loss": 0.5, "update/skipped": 0}, 0.05)
        return read_metrics(tmp_path)

    def test_a_line_a_step_with_names_that_stop_rules_know(self, tmp_path: Path) -> None:
        rows = self._observe(tmp_path)
        assert [row["step"] for row in rows] == [0, 1]
        names = set(rows[0]) - {"step", "time"}
        assert names <= set(METRICS)
        assert {"gold/mean", "kl/coef", "time/rollout", "time/tokens_per_second", "memory/peak_gib"} <= names
        assert rows[0]["gold/mean"] == 0.5  # what the judge could not judge is left out
        assert rows[0]["memory/peak_gib"] > 0.05  # a process with torch in it

    def test_doubt_is_measured_against_the_first_step(self, tmp_path: Path) -> None:
        rows = self._observe(tmp_path)
        assert [row["reward/head_std_ratio"] for row in rows] == [1, 2]
        assert [row["reward/disagreement_ratio"] for row in rows] == [1, 1]

    def test_doubt_is_measured_against_preference_data_if_given(self, tmp_path: Path) -> None:
        with RunLog(tmp_path) as log, Monitor(_config(tmp_path), log, CPU, None, _decode) as watch:
            known = _experience()
            assert known.head_std is not None
            known.head_std.div_(5)
            watch.compare_with(known)
            metrics = watch.observe(0, _experience(), {}, 0.0)
            again = Monitor(_config(tmp_path), log, CPU, None, _decode)
            again.load_state(json.loads(json.dumps(watch.state())))
            assert again.baseline == watch.baseline
            again.close()
        assert metrics["reward/head_std_ratio"] == pytest.approx(5)

    def test_the_distance_stands_beside_that_of_the_start_or_of_preference_data(self, tmp_path: Path) -> None:
        for known in (None, _experience(distance=torch.full((3,), 0.25))):
            with RunLog(tmp_path) as log, Monitor(_config(tmp_path), log, CPU, None, _decode) as watch:
                if known is not None:
                    watch.compare_with(known)
                rows = [
                    watch.observe(step, _experience(distance=torch.full((3,), 0.5 + step)), {}, 0.0) for step in (0, 1)
                ]
                watch.texts(0, _experience(distance=torch.tensor([0.5, 1.5, math.nan])))
            assert [row["reward/distance"] for row in rows] == [0.5, 1.5]
            assert [row["text/foreign"] for row in rows] == [0, 1]
            assert {row["reward/distance_reference"] for row in rows} == {0.5 if known is None else 0.25}
            assert set(rows[0]) <= set(METRICS)
        assert [row["distance"] for row in read_texts(tmp_path)] == [0.5, 1.5, None]

    def test_a_judge_without_a_number_is_told_of_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def judge(samples: Samples) -> Rewards:
            return Rewards(torch.full((len(samples.responses),), math.nan))

        config = _config(tmp_path, gold="mine.py:judge")
        with RunLog(tmp_path) as log, Monitor(config, log, CPU, judge, _decode) as watch:
            for step in range(2):
                assert math.isnan(watch.observe(step, _experience(), {}, 0.0)["gold/mean"])
        assert caplog.messages == ["gold: mine.py:judge gave no finite number for any of the 3 responses of step 0"]

    def test_each_text_is_written_once_with_its_numbers(self, tmp_path: Path) -> None:
        for _ in range(2):  # as a resumed run does
            with RunLog(tmp_path) as log, Monitor(_config(tmp_path), log, CPU, _gold, _decode) as watch:
                watch.texts(0, _experience())
        rows = read_texts(tmp_path)
        assert len(rows) == 3
        assert rows[0] == {
            "step": 0,
            "prompt": "1",
            "response": "5",
            "reward": 1.0,
            "nominal": 2.0,
            "worst": 0.0,
            "head_std": 1.5,
            "distance": None,
            "gold": 0.25,
            "length": 2,
            "stopped": True,
        }
        assert (rows[2]["response"], rows[2]["reward"], rows[2]["gold"]) == ("6 7", None, None)

    def test_a_text_cut_short_by_a_kill_is_written_again(self, tmp_path: Path) -> None:
        path = tmp_path / "samples.jsonl"
        path.write_text('{"step": 0, "response": "whole"}\n{"step": 0, "resp')
        log = TextLog(path)
        for number, text in enumerate(("whole", "second")):
            log.add(0, number, {"response": text})
        log.close()
        assert [row["response"] for row in read_texts(tmp_path)] == ["whole", "second"]


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    class Full(StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = TextLog(tmp_path / "samples.jsonl")
    log.close()
    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\).*samples\.jsonl"):
        log.add(0, 0, {"response": "whole"})


def test_a_line_that_is_no_sample_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 0}\nwhat is this\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: expected a JSON object"):
        read_texts(tmp_path)


class TestTrackers:
    """wandb and trackio come through accelerate."""

    def test_one_that_is_missing_is_named_with_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import accelerate.tracking

        monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard"])
        with pytest.raises(ImportError, match="pip install trackio"):
            monitor.open_trackers(_config(tmp_path, trackers=("trackio",)))

    def test_one_that_is_there_gets_config_and_every_step(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import accelerate.tracking

        calls: list[Any] = []

        class _Run:
            def log(self, values: dict[str, float], step: int | None = None) -> None:
                calls.append((step, values))

            def finish(self) -> None:
                calls.append("finished")

        fake = ModuleType("wandb")
        fake.init = lambda **kwargs: calls.append(kwargs["project"]) or _Run()  # type: ignore[attr-defined]
        fake.config = type("Config", (), {"update": lambda self, values, **k: calls.append(values["model"])})()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["wandb"])
        config = _config(tmp_path, trackers=("wandb",))
        with RunLog(tmp_path) as log, Monitor(config, log, CPU, None, _decode) as watch:
            watch.observe(0, _experience(), {"policy/loss": math.nan}, 0.1)
        project, model, (step, values), finished = calls
        assert (project, model, step, finished) == ("prudent", "m", 0, "finished")
        assert values["reward/mean"] == 1.5
        assert "policy/loss" not in values
