"""`prudent ppo --recipe pet`: PET's three steps in one folder, and what it refuses before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel
from prudent.rlhf.job.config import load_config
from prudent.rlhf.ppo import loop, pet_recipe
from prudent.rlhf.ppo.config import PPOConfig, UpdateConfig
from prudent.rlhf.ppo.pet_best_of_n import _metrics
from prudent.rlhf.ppo.pet_recipe import ppo_config, refuse_early, resolved, reward_config, run_recipe
from prudent.rlhf.reward.train import TrainConfig
from prudent.rlhf.sampling.stored import Rollout

THINGS = ("day", "food", "hotel", "train", "film", "room")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs and prompts."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"was the {thing} very", "chosen": f"the {thing} was {good}", "rejected": f"the {thing} was {bad}"}
        for thing in THINGS
        for good, bad in (("good", "bad"), ("great", "awful"), ("happy", "sad"))
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"is the {thing} fine\n" for thing in THINGS))
    return folder / "pairs.jsonl", folder / "prompts.txt"


def _config(model: Path | str, files: tuple[Path, Path], output: Path, *sets: str) -> PPOConfig:
    base = ["recipe=pet", "steps=2", "pet.samples=4", "pet.epochs=2", "rollout.max_new_tokens=4", "gold=vader"]
    base += ["rollout.prompts_per_step=3", "best_of_prompts=5", "policy.lora_rank=2", "update.minibatches=1"]
    given: dict[str, Any] = {"model": str(model), "data": str(files[0]), "prompts": str(files[1]), "output": output}
    return load_config(PPOConfig, None, [*base, *sets], **given)


@pytest.mark.slow
def test_the_three_steps_make_one_folder_and_go_on_after_a_kill(
    tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_chat_folder, files, tmp_path / "run")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_ppo", die)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(config, progress=False)
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        run_recipe(config, progress=False)
    with pytest.raises(ValueError, match=r"holds a run with another seed \(0 there, 3 here\): choose another folder"):
        run_recipe(config.model_copy(update={"seed": 3}), resume=True, progress=False)
    first = (config.output / "best_of_n.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("prudent.rlhf.sampling.stored.sample_batch", None)  # nothing of steps 1 and 2 is sampled again
        result = run_recipe(config, resume=True, progress=False)
    assert (config.output / "best_of_n.json").read_text() == first
    names = {path.name for path in config.output.iterdir()}
    assert {"config.yaml", "reward", "best_of_n.json", "best_of_n.jsonl", "ppo", "recipe.json"} <= names
    saved = load_config(PPOConfig, config.output / "ppo" / "config.yaml")
    assert (saved.recipe, saved.kl.coef, saved.reward.source) == ("ppo", 0.0, str(config.output / "reward/model"))
    assert (config.output / "ppo" / "policy").is_dir()
    said = str(result)
    assert said.index("1. reward model and PET") < said.index("2. best of n") < said.index("3. PPO without KL")
    assert "best of 4, 5 prompts: picked by" in said
    assert "PET minus it" in said
    picks = [json.loads(line) for line in (config.output / "best_of_n.jsonl").read_text().splitlines()]
    assert len(picks) == 5
    assert set(picks[0]) == {"prompt", "single head", "PET"}
    # the written config goes in again
    again = load_config(PPOConfig, config.output / "config.yaml")
    assert run_recipe(again, resume=True, progress=False).metrics["best_of_n"] == result.metrics["best_of_n"]
    other = run_recipe(again.model_copy(update={"gold": None}), resume=True, progress=False)
    assert other.metrics["best_of_n"]["gold"] is None  # numbers of another judge are not this one's


def test_kl_is_off_and_the_samples_are_drawn_as_the_policys_are(
    tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = resolved(_config(tiny_chat_folder, files, tmp_path / "run", "rollout.temperature=0.7", "seed=5"))
    assert config.kl.coef == 0.0
    train, ppo = reward_config(config), ppo_config(config)
    assert (train.stage, train.pet.max_new_tokens, train.pet.temperature, train.seed) == ("pet", 4, 0.7, 5)
    assert (ppo.kl.coef, ppo.recipe, ppo.output) == (0.0, "ppo", tmp_path / "run" / "ppo")


def test_what_the_recipe_decides_is_refused(tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    for entry, message in (
        ("kl.coef=0.1", "kl: expected none with recipe pet, whose reward is trained for PPO without KL, got coef 0.1"),
        ("kl.chi2=0.1", "kl: expected none with recipe pet"),
        ("kl.place=loss", r"kl\.place: has no effect with kl\.coef 0"),
        ("reward.source=some/model", "reward.source, reward.kind: expected none with recipe pet"),
        ("pet.max_new_tokens=9", "pet.max_new_tokens: has no effect with recipe pet, which samples as PPO does"),
        ("rollout.prompts_per_step=7", "rollout.prompts_per_step: expected at most 6"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(_config(tiny_chat_folder, files, tmp_path / "run", entry), progress=False)
    with pytest.raises(ValueError, match=r"^pet\.start: .*nothing"):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "run", f"pet.start={tmp_path}/nothing"), progress=False)
    cut = tmp_path / "cut"
    shutil.copytree(tiny_chat_folder, cut)
    os.truncate(cut / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"^model: .*cut: its weights cannot be read"):
        run_recipe(_config(cut, files, tmp_path / "run"), progress=False)
    assert not (tmp_path / "run" / "reward").exists()
    with pytest.raises(ValueError, match="pet: has no effect with recipe ppo: set recipe to pet"):
        _config(tiny_chat_folder, files, tmp_path / "run", "recipe=ppo", "reward.source=x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a new or empty folder or one of a run, got .* with other files"):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "other"), progress=False)


JUDGE = """
def broken(prompts, responses):
    raise RuntimeError("no judge today")

def length(prompts, responses):
    return [float(len(text)) for text in responses]
"""


@pytest.mark.parametrize(
    ("sets", "error", "said"),
    [
        (
            ["update.estimator=rloo", "rollout.samples_per_prompt=2", "update.lam=0.5"],
            ValueError,
            r"^update\.lam: has no effect with estimator rloo",
        ),
        (["policy.mode=full", "policy.lora_rank=8"], ValueError, r"^policy\.lora_rank: has no effect"),
        (['stop_when=["disagreement > 3x"]'], ValueError, "needs a reward of several heads, not one"),
        (
            ['stop_when=["disagreement > 3x"]', "pet.start={one}"],
            ValueError,
            "needs a reward of several heads, not one",
        ),
        (["gold={judge}:broken"], ValueError, "gold: .*broken raised RuntimeError: no judge today"),
        (["trackers=[trackio]"], ImportError, "trackers: trackio not installed"),
        (["pet.start={tmp}/nowhere"], ValueError, r"^pet\.start: "),
    ],
)
def test_what_only_the_last_step_would_refuse_is_refused_before_the_first(
    tiny_chat_folder: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sets: list[str],
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    (tmp_path / "judge.py").write_text(JUDGE)
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=1).save_pretrained(tmp_path / "one")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "one")
    names = {"judge": tmp_path / "judge.py", "one": tmp_path / "one", "tmp": tmp_path}
    sets = [entry.format(**names) for entry in sets]
    with pytest.raises(error, match=said):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "run", *sets), progress=False)
    assert not (tmp_path / "run" / "reward").exists()
    mended = _config(tiny_chat_folder, files, tmp_path / "run", "seed=3", f"gold={tmp_path / 'judge.py'}:length")
    monkeypatch.setattr(pet_recipe, "run_train", _begun)
    with pytest.raises(KeyboardInterrupt):  # the folder is taken, and the first step has begun
        run_recipe(mended, progress=False)


def _begun(config: TrainConfig, **_: Any) -> None:
    config.output.mkdir()
    (config.output / "metrics.jsonl").write_text("{}\n")
    raise KeyboardInterrupt


def test_several_heads_may_be_watched(tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    watched = _config(tiny_chat_folder, files, tmp_path, 'stop_when=["disagreement > 3x"]', "pet.start=brme")
    refuse_early(resolved(watched))


def test_data_that_cannot_be_read_may_be_mended(
    tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (files[0].with_name("nowhere.jsonl"), files[1])
    with pytest.raises((ValueError, OSError), match="nowhere"):
        run_recipe(_config(tiny_chat_folder, wrong, tmp_path / "run"), progress=False)
    monkeypatch.setattr(loop, "run_ppo", _begun)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "run"), progress=False)


def test_what_only_ppo_reads_may_be_changed_until_ppo_has_begun(
    tiny_chat_folder: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pet_recipe, "run_train", _begun)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "run"), progress=False)
    other = _config(tiny_chat_folder, files, tmp_path / "run", "update.lr=0.01", "policy.lora_rank=4")
    monkeypatch.setattr(pet_recipe, "run_train", lambda *_, **__: pytest.fail("gone on"))
    with pytest.raises(pytest.fail.Exception, match="gone on"):
        run_recipe(other, resume=True, progress=False)
    assert load_config(PPOConfig, tmp_path / "run" / "config.yaml").update.lr == 0.01
    with pytest.raises(ValueError, match=r"another pet\.samples \(4 there, 5 here\)"):
        run_recipe(_config(tiny_chat_folder, files, tmp_path / "run", "pet.samples=5"), resume=True, progress=False)
    (tmp_path / "run" / "ppo").mkdir()
    (tmp_path / "run" / "ppo" / "metrics.jsonl").write_text("{}\n")
    again = other.model_copy(update={"update": UpdateConfig(minibatches=1, lr=0.5)})
    with pytest.raises(ValueError, match=r"another update\.lr \(0\.01 there, 0\.5 here\)"):
        run_recipe(again, resume=True, progress=False)


def test_recipe_ppo_is_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run_ppo", lambda config, **options: (config.steps, options))
    given: dict[str, Any] = {"model": "m", "prompts": "p", "output": tmp_path, "steps": 7}
    config = load_config(PPOConfig, None, ["reward.source=r"], **given)
    assert run_recipe(config, resume=True, progress=False) == (7, {"resume": True, "progress": False})


def test_best_of_n_by_hand() -> None:
    """2 prompts, n = 2: at n = 1 the mean of all, at n = 2 what the reward picks."""
    proxies = {"single head": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "PET": torch.tensor([[0.0, 1.0], [0.0, 1.0]])}
    gold = torch.tensor([[0.0, 4.0], [1.0, 3.0]])
    rollouts = [Rollout("p", ["one", "two words"], [True, True], torch.zeros(2, 1)) for _ in range(2)]
    metrics = _metrics(proxies, gold, rollouts)
    assert metrics["n"] == [1, 2]
    assert metrics["rewards"]["single head"]["gold"] == [2.0, 1.5]
    assert metrics["rewards"]["PET"]["gold"] == metrics["oracle"] == [2.0, 3.5]
    assert (metrics["rewards"]["single head"]["words"], metrics["rewards"]["single head"]["same_as_pet"]) == (1.5, 0.5)
    assert metrics["difference"]["single head"]["value"] == 2.0
    assert _metrics(proxies, None, rollouts)["rewards"]["PET"]["gold"] is None
