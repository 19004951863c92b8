"""PPO's config: what is allowed, what is refused, and which output folders a run claims."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.files import atomic_write_json
from prudent.rlhf.ppo.config import PPOConfig, refuse_unread, refuse_unread_by_reward
from prudent.rlhf.ppo.outcome import open_folder


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
        (
            ["policy.critic_init=reward", "reward.centre=batch"],
            "policy.critic_init: expected zero with reward.centre batch",
        ),
        (["kl.coef=0", "kl.target=6"], "kl.coef: expected above 0 with kl.target 6"),
        (
            ["kl.target=1000", "kl.horizon=1", "rollout.samples_per_prompt=10"],
            "kl.horizon: expected at least 129 with 640 samples a step, so that kl.coef stays above 0",
        ),
        (["kl.target=6", "kl.horizon=2", "rollout.prompts_per_step=10"], "kl.horizon: expected at least 3 with 10"),
        (["update.micro_tokens=0"], "update.micro_tokens: expected a whole number >= 1 or 'auto', got 0"),
        (["update.micro_tokens=-5"], "update.micro_tokens: expected a whole number >= 1 or 'auto', got -5"),
        (["update.micro_tokens=many"], "update.micro_tokens: expected a whole number >= 1 or 'auto', got \"many\""),
        (["memory_budget=much"], "memory_budget: expected a size"),
        (["reward.aggregation=best"], "reward.aggregation: kind: expected one of tradeoff"),
        (["recipe=pet", "reward.timeout=5"], "reward.timeout: has no effect with recipe pet"),
        (['stop_when=["kl > 3x"]'], "stop_when: expected a number without x in 'kl > 3x'"),
        (["rollout.min_new_tokens=65"], "rollout.min_new_tokens: expected at most max_new_tokens 64"),
        (["update.minibatches=65"], "update.minibatches: expected at most 64, the number of a step's samples"),
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
        (["update.estimator=rloo", "rollout.samples_per_prompt=2", "policy.critic_init=reward"], "policy.critic_init"),
        (["kl.coef=0", "kl.place=loss"], "kl.place"),
        (["kl.horizon=5"], "kl.horizon"),
        (["reward.kind=shared", "reward.timeout=5"], "reward.timeout"),
        (["reward.source=mine.py:f", "reward.timeout=5"], "reward.timeout"),
        (["reward.source=mine.py:f", "reward.aggregation=min"], "reward.aggregation"),
        (["reward.source=http://host/x", "reward.aggregation=min"], "reward.aggregation"),
        (["best_of_prompts=5"], "best_of_prompts"),
        (["memory_budget=80GB"], "memory_budget"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(sets: list[str], key: str) -> None:
    source = next((s.partition("=")[2] for s in sets if s.startswith("reward.source=")), "r")
    with pytest.raises(ValueError, match=f"^{key}: has no effect"):
        refuse_unread(_config(*sets, **{"reward.source": source}), "cpu")


def test_keys_that_are_read_pass() -> None:
    refuse_unread(_config(), "cpu")
    refuse_unread(_config("policy.lora_rank=8", "update.value_clip=0.1", "kl.target=6", "kl.horizon=500"), "cpu")
    refuse_unread(_config("memory_budget=80GB"), "cuda")
    refuse_unread(_config("reward.timeout=5", **{"reward.source": "http://host/x"}), "cpu")


@pytest.mark.parametrize(
    ("kind", "unread"),
    [("shared", "reward.timeout"), ("adapter", "reward.timeout"), ("model", "reward.timeout"), ("http", None)],
)
def test_a_key_that_the_kind_of_reward_does_not_read_is_refused(kind: Any, unread: str | None) -> None:
    config = _config("reward.timeout=5")
    refuse_unread(config, "cpu")  # nobody has looked what kind the folder `r` holds
    with pytest.raises(ValueError, match=f"^{unread}: has no effect") if unread else nullcontext():
        refuse_unread_by_reward(config, kind)
    critic = _config("policy.critic_init=reward")
    expected = rf"^policy\.critic_init: expected zero with reward.kind {kind}"
    with nullcontext() if kind == "shared" else pytest.raises(ValueError, match=expected):
        refuse_unread_by_reward(critic, kind)
    heads_are_read = _config("reward.aggregation=min")
    with pytest.raises(ValueError, match=r"^reward\.aggregation") if kind == "http" else nullcontext():
        refuse_unread_by_reward(heads_are_read, kind)


class TestFolder:
    """Who may write into an output folder."""

    def test_a_new_folder_is_claimed_and_the_config_written(self, tmp_path: Path) -> None:
        config = _config("steps=7", output=tmp_path / "run")
        assert open_folder(config, resume=False) is None
        assert load_config(PPOConfig, tmp_path / "run" / "config.yaml") == config

    def test_a_folder_with_other_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(ValueError, match="expected a new or empty folder or one of a run"):
            open_folder(_config(output=tmp_path), resume=True)
        with pytest.raises(ValueError, match="which is a file"):
            open_folder(_config(output=tmp_path / "thesis.tex"), resume=False)

    def test_a_run_that_measured_nothing_may_start_again(self, tmp_path: Path) -> None:
        assert open_folder(_config("seed=1", output=tmp_path), resume=False) is None
        (tmp_path / "samples.jsonl").write_text('{"step": 0}\n')
        (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
        assert open_folder(_config("seed=2", output=tmp_path), resume=True) is None
        # of the other seed: its texts would stand for this run's, and its adapters would be gone on with
        assert not (tmp_path / "samples.jsonl").exists()
        assert not (tmp_path / "checkpoints" / "step-000000").exists()

    def test_a_started_run_needs_resume_and_the_same_config(self, tmp_path: Path) -> None:
        open_folder(_config(output=tmp_path), resume=False)
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
        with pytest.raises(ValueError, match="--resume"):
            open_folder(_config(output=tmp_path), resume=False)
        with pytest.raises(ValueError, match="another seed"):
            open_folder(_config("seed=5", output=tmp_path), resume=True)
        assert open_folder(_config("save_every=3", output=tmp_path), resume=True) is None
        # what only watches may be another
        watched = _config("gold=vader", output=tmp_path, stop_when=["length > 90"])
        assert open_folder(watched, resume=True) is None

    def test_a_finished_run_is_finished_unless_more_steps_are_asked_for(self, tmp_path: Path) -> None:
        open_folder(_config("steps=5", output=tmp_path), resume=False)
        (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
        nothing = {"rolled_back_to": None, "first": {}, "last": {}, "faults": "", "report": False}
        atomic_write_json(tmp_path / "ppo.json", {"steps": 5, "stopped": None, **nothing})
        (tmp_path / "policy").mkdir()
        (tmp_path / "policy" / "model.safetensors").write_bytes(b"...")
        finished = open_folder(_config("steps=5", output=tmp_path), resume=True)
        assert finished == {"steps": 5, "stopped": None, **nothing}
        assert open_folder(_config("steps=9", output=tmp_path), resume=True) is None
        atomic_write_json(tmp_path / "ppo.json", {"steps": 5, "stopped": "'kl > 3' held", **nothing})
        assert open_folder(_config("steps=12", output=tmp_path), resume=True) is not None
