"""`prudent ppo` on a reward of several heads: on the policy's trunk, on one of their own, sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.loop import run_ppo
from prudent.rlhf.ppo.watch import report


def _config(tiny: Path, tmp_path: Path, *sets: str, **given: Any) -> PPOConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the food\na hotel\nmy day\nthe train\nyour film\nthe soup\nthe room\nvery good people\n")
    small = ["steps=3", "rollout.prompts_per_step=4", "rollout.max_new_tokens=8"]
    return load_config(PPOConfig, None, [*small, *sets], model=str(tiny), prompts=str(prompts), **given)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and seconds of pictures."""
    monkeypatch.setattr(report, "render", lambda *args: "<!doctype html>")


def test_heads_on_the_trunk_and_the_same_model_apart_give_the_same_rewards(
    tiny_chat_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "reward")
    rows = {}
    for kind in ("shared", "model"):
        given = {"reward.source": str(tmp_path / "reward"), "output": str(tmp_path / kind)}
        config = _config(
            tiny_chat_folder, tmp_path, f"reward.kind={kind}", "steps=1", "rollout.prompts_per_step=8", **given
        )
        run_ppo(config, progress=False)
        (rows[kind],) = read_metrics(config.output)
    assert 0 < rows["model"]["text/truncated"] < 1
    # tradeoff:0.4 samples the heads, and both ways draw the same noise
    for name in ("mean", "nominal", "worst", "head_std", "disagreement"):
        assert rows["shared"][f"reward/{name}"] == pytest.approx(rows["model"][f"reward/{name}"], rel=1e-4), name


def test_sampled_rewards_are_those_of_seed_and_step_and_the_same_after_a_resume(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward"
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3).save_pretrained(reward)
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(reward)
    rows = {}
    for name, aggregation, steps in (
        ("sampled", "min", [2]),
        ("resumed", "min", [1, 2]),
        ("means", "min,source=mean", [2]),
    ):
        given = {"reward.source": str(reward), "output": str(tmp_path / name), "reward.aggregation": aggregation}
        for number in steps:
            config = _config(tiny_chat_folder, tmp_path, "save_every=1", f"steps={number}", **given)
            run_ppo(config, resume=True, progress=name != "resumed")
        said = capsys.readouterr().err
        rows[name] = [row["reward/mean"] for row in read_metrics(config.output)]
        if name != "resumed":
            assert ("min of sampled heads, with noise by seed and step" in said) == (name == "sampled")
            assert ("min,source=mean of the heads' means" in said) == (name == "means")
    assert rows["sampled"] == rows["resumed"]
    assert rows["sampled"][0] != rows["means"][0]
