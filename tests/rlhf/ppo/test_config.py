"""What a PPO run can be told, what it refuses, and whose folder it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.config import load_config
from prudent.rlhf.files import atomic_write_json
from prudent.rlhf.ppo.config import PPOConfig, open_folder, refuse_unread


def _config(*sets: str, output: Path | str = "run", **given: Any) -> PPOConfig:
    given = {"model": "m", "prompts": "p.txt", "reward.source": "r", "output": str(output), **given}
    return load_config(PPOConfig, None, sets, **given)


def test_a_flag_may_set_a_key_in_a_group_and_rules_may_be_several() -> None:
    config = _config(stop_when=["kl > 3", "gap > 2 for 5"], **{"reward.source": "folder"})
    assert config.reward.source == "folder"
    assert config.stop_when == ("kl > 3", "gap > 2 for 5")
    assert load_config(PPOConfig, None, (), **config.model_dump(mode="json")) == config


def test_the_critic_follows_from_the_estimator() -> None:
    assert _config().critic == "shared"
    assert _config("update.estimator=rloo", "rollout.samples_per_prompt=2").critic == "none"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["update.estimator=rloo"], "rollout.samples_per_prompt: expected at least 2"),
        (["policy.critic=none"], "policy.critic: expected shared or adapter with estimator gae"),
        (["reward.source="], "reward.source: a value is needed"),
        (["kl.coef=0", "kl.target=6"], "kl.coef: expected above 0 with kl.target 6"),
        (["rollout.min_new_tokens=65"], "rollout.min_new_tokens: expected at most max_new_tokens 64"),
        (["update.minibatches=65"], "update.minibatches: expected at most the 64 samples of a step"),
        (["trackers=[wanda]"], "trackers: expected any of wandb, trackio, got 'wanda'"),
        (['stop_when=["kl > many"]'], "stop_when: expected NAME > VALUE"),
        (["update.epoch=3"], "did you mean 'update.epochs'"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(sets: list[str], said: str) -> None:
    given = {"reward.source": ""} if "reward.source=" in sets else {}
    with pytest.raises(ValueError, match=re.escape(said)):
        _config(*[entry for entry in sets if entry != "reward.source="], **given)


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["policy.mode=full", "policy.lora_rank=8"], "policy.lora_rank"),
        (["update.estimator=rloo", "rollout.samples_per_prompt=2", "update.value_clip=0.1"], "update.value_clip"),
        (["update.estimator=rloo", "rollout.samples_per_prompt=2", "update.lam=0.9"], "update.lam"),
        (["update.estimator=rloo", "rollout.samples_per_prompt=2", "policy.critic=shared"], "policy.critic"),
        (["kl.coef=0", "kl.place=loss"], "kl.place"),
        (["kl.horizon=5"], "kl.horizon"),
        (["reward.kind=shared", "reward.timeout=5"], "reward.timeout"),
        (["memory_budget=80GB"], "memory_budget"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(sets: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: has no effect"):
        refuse_unread(_config(*sets), "cpu")


def test_what_is_read_passes() -> None:
    refuse_unread(_config(), "cpu")
    refuse_unread(_config("policy.lora_rank=8", "update.value_clip=0.1", "kl.target=6", "kl.horizon=500"), "cpu")
    refuse_unread(_config("memory_budget=80GB"), "cuda")


class TestFolder:
    """Who may write into an output folder."""

    def test_a_new_one_is_taken_and_the_config_written_out(self, tmp_path: Path) -> None:
        config = _config("steps=7", output=tmp_path / "run")
        assert open_folder(config, resume=False) is None
        assert load_config(PPOConfig, tmp_path / "run" / "config.yaml") == config

    def test_one_with_other_files_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(ValueError, match="expected a new or empty folder or one of a run"):
            open_folder(_config(output=tmp_path), resume=True)
        with pytest.raises(ValueError, match="which is a file"):
            open_folder(_config(output=tmp_path / "thesis.tex"), resume=False)

    def test_a_run_that_measured_nothing_may_be_begun_anew(self, tmp_path: Path) -> None:
        assert open_folder(_config("seed=1", output=tmp_path), resume=False) is None
        (tmp_path / "samples.jsonl").write_text('{"step": 0}\n')
        (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
        assert open_folder(_config("seed=2", output=tmp_path), resume=True) is None
        # of the other seed: its texts would stand for this run's, and its adapters would be gone on with
        assert not (tmp_path / "samples.jsonl").exists()
        assert not (tmp_path / "checkpoints" / "step-000000").exists()

    def test_a_begun_run_needs_resume_and_the_same_config(self, tmp_path: Path) -> None:
        open_folder(_config(output=tmp_path), resume=False)
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
        with pytest.raises(ValueError, match="--resume"):
            open_folder(_config(output=tmp_path), resume=False)
        with pytest.raises(ValueError, match="another seed"):
            open_folder(_config("seed=5", output=tmp_path), resume=True)
        assert open_folder(_config("save_every=3", output=tmp_path), resume=True) is None

    def test_a_finished_run_is_finished_unless_more_steps_are_asked_for(self, tmp_path: Path) -> None:
        open_folder(_config("steps=5", output=tmp_path), resume=False)
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
        atomic_write_json(tmp_path / "ppo.json", {"steps": 5, "stopped": None})
        assert open_folder(_config("steps=5", output=tmp_path), resume=True) == {"steps": 5, "stopped": None}
        assert open_folder(_config("steps=9", output=tmp_path), resume=True) is None
        atomic_write_json(tmp_path / "ppo.json", {"steps": 5, "stopped": "'kl > 3' held"})
        assert open_folder(_config("steps=12", output=tmp_path), resume=True) is not None
