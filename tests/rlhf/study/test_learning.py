"""`prudent study learning`: rewards from the model's own samples, runs that are not repeated, the table of results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prudent.rlhf.job.config import load_config
from prudent.rlhf.study.learning import LearningConfig, arms, ppo_config, run_learning, summary
from prudent.rlhf.study.learning_report import table

_QUICK = (
    "rewards.samples_per_prompt=6",
    "rewards.pairs_per_prompt=10",
    "rewards.held_out_prompts=2",
    "rewards.max_new_tokens=6",
    "rewards.pet.samples=4",
    "rewards.pet.epochs=1",
    "rewards.bt.solver=adamw",
    "rewards.bt.epochs=1",
    "rewards.brme.epochs=1",
    "ppo.steps=3",
    "ppo.prompts_per_step=2",
    "ppo.samples_per_prompt=2",
    "lambdas=[0.4]",
    "kl=[0.0]",
    "seeds=1",
    "processes=1",
    "window=2",
)


def _config(model: Path, output: Path, *sets: str) -> LearningConfig:
    words = output.parent / "prompts.txt"
    words.write_text("".join(f"the {thing} was\n" for thing in ("day", "food", "hotel", "train", "film", "soup")))
    given = [*_QUICK, f"rewards.prompts={words}", *sets]
    return load_config(LearningConfig, None, given, model=str(model), output=output)


def test_the_arms_are_the_single_head_every_combination_of_heads_and_pet_on_both() -> None:
    config = LearningConfig(model="m")
    assert [arm.name for arm in arms(config)] == [
        "single head",
        *(f"lambda {lam:g}" for lam in (0, 0.2, 0.4, 0.6, 0.8, 1)),
        "mean of heads",
        "max of heads",
        "worst head of the step",
        "PET, single head",
        "PET, ensemble, lambda 0.4",
    ]
    assert "batch_worst,source=mean" in {arm.aggregation for arm in arms(config)}
    outputs = {ppo_config(config, kl, seed, arm).output for kl in (0, 0.05) for seed in (0, 1) for arm in arms(config)}
    assert len(outputs) == 48


def test_a_run_is_summed_up_by_its_end_and_its_best_stretch() -> None:
    gold: list[float | None] = [0.0, 0.2, 0.9, 0.9, None, 0.1, 0.1]
    names = ("gold/mean", "reward/mean", "kl/sequence", "text/length")
    found = summary(dict.fromkeys(names, gold), 2)
    assert found["final"]["gold/mean"] == pytest.approx(0.1)
    assert found["peak_gold"] == pytest.approx(0.9)
    assert found["curves"]["gold/mean"] == [pytest.approx(0.5), pytest.approx(0.1)]


def test_what_pet_would_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards: pet\.temperature: expected no value"):
        load_config(LearningConfig, None, ["rewards.pet.temperature=0.5"], model="m")


def test_what_holds_in_every_seed_is_said() -> None:
    finals = {
        "single head": [0.5, 0.5, 0.5],
        "lambda 0": [0.6, 0.7, 0.8],
        "lambda 1": [0.6, 0.7, 0.4],
        "PET, single head": [0.1, 0.1, 0.1],
    }
    rest = {"reward/mean": 1.0, "kl/sequence": 2.0, "text/length": 9.0, "text/truncated": 0.5}
    runs = [
        {"kl": 0.0, "seed": seed, "arm": arm, "final": {"gold/mean": value, **rest}, "peak_gold": value + 0.1}
        for arm, values in finals.items()
        for seed, value in enumerate(values)
    ]
    rewards = {str(seed): {"gold_reference": 0.2} for seed in range(3)}
    rows = table({"rewards": rewards, "runs": runs}, 0.0)
    assert {row[0]: row[-1] for row in rows[1:]} == {
        "single head": "above untrained",
        "lambda 0": "above untrained, above single head",
        "lambda 1": "above untrained",
        "PET, single head": "below untrained, below single head",
    }


def test_a_folder_without_a_model_is_named_after_its_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"^model: expected a causal language model's folder or hub name, got the folder"
    ):
        run_learning(_config(tmp_path / "empty", tmp_path / "study"), progress=False)


@pytest.mark.slow
def test_a_study_from_end_to_end_is_resumed_not_repeated(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vaderSentiment")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = _config(tiny_chat_folder, tmp_path / "study")
    result = run_learning(config, progress=False)
    runs = sorted((tmp_path / "study" / "runs").iterdir())
    assert len(runs) == 7
    before = {run: os.stat(run / "ppo.json").st_mtime_ns for run in runs}
    again = run_learning(config, progress=False)
    assert {run: os.stat(run / "ppo.json").st_mtime_ns for run in runs} == before
    assert again.metrics == result.metrics
    saved = json.loads((tmp_path / "study" / "learning.json").read_text())
    assert {run["arm"] for run in saved["runs"]} == {arm.name for arm in arms(config)}
    assert "## No KL" in str(result)
    assert (tmp_path / "study" / "learning.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"holds a run with another ppo\.steps \(3 there, 4 here\)"):
        run_learning(_config(tiny_chat_folder, tmp_path / "study", "ppo.steps=4"), progress=False)
