"""In every job, a row that the chat template refuses is named by file and line, or counted and left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel
from prudent.rlhf.demo.demo import DemoConfig, run_demo
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.evaluation.score import ScoreConfig, run_score
from prudent.rlhf.job.config import load_config
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.loop import run_ppo
from prudent.rlhf.reward.config import TrainConfig
from prudent.rlhf.reward.train import run_train

WORDS = ("food", "film", "hotel", "day", "train", "soup")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
NO_DAYS = "{% if messages[0]['content'] == 'my day' %}{{ raise_exception('no days') }}{% endif %}"


@pytest.fixture(scope="module")
def models(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/, whose template takes no system turn; reward/ and picky/, which refuses one prompt that policy/ reads."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_chat_folder, folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    own = tokenizer.chat_template
    torch.manual_seed(1)
    for name, opening in (("policy", NO_SYSTEM), ("reward", NO_SYSTEM), ("picky", NO_DAYS)):
        if name != "policy":
            EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2).save_pretrained(folder / name)
        tokenizer.chat_template = opening + own
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven pairs; line 3 has a system prompt."""
    rows = [{"prompt": f"the {word} was", "chosen": f"very good {word}", "rejected": f"bad {word}"} for word in WORDS]
    rows.insert(2, {"system": "my people", **rows[0]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _train(models: Path, data: Path, out: Path, skip: bool, *sets: str) -> Any:
    small = ["eval_fraction=0.2", f"skip_bad_rows={str(skip).lower()}", *sets]
    config = load_config(TrainConfig, None, small, model=str(models / "policy"), data=str(data), output=out)
    return run_train(config, progress=False).metrics["dropped"]["bad_rows"], json.loads((out / "data.json").read_text())


def _head(models: Path, data: Path, out: Path, skip: bool) -> int:
    bad, counts = _train(models, data, out, skip, "brme.num_heads=2", "brme.max_steps=2")
    assert (counts["pairs"], counts["prompts"]) == (6, 6)
    assert counts["train_pairs"] + counts["held_out_pairs"] == 6
    return int(bad)


def _pet(models: Path, data: Path, out: Path, skip: bool) -> int:
    sets = ("stage=pet", "pet.samples=2", "pet.max_new_tokens=4", "pet.max_steps=2", f"pet.start={models / 'picky'}")
    return int(_train(models, data, out, skip, *sets)[0])


def _eval(models: Path, data: Path, out: Path, skip: bool) -> int:
    model = str(models / "reward")
    config = EvalConfig(model=model, data=str(data), output=out, pictures=False, resamples=100, skip_bad_rows=skip)
    metrics = run_eval(config, progress=False).metrics
    assert metrics["pairs"] == metrics["data"]["pairs"] == 6
    return int(metrics["data"]["bad_rows"])


def _score(models: Path, data: Path, out: Path, skip: bool) -> int:
    config = ScoreConfig(model=str(models / "reward"), data=str(data), output=str(out), skip_bad_rows=skip)
    return run_score(config, progress=False).bad_rows


def _demo(models: Path, data: Path, out: Path, skip: bool) -> int:
    sets = [
        "brme.epochs=1",
        "brme.num_heads=2",
        "dtype=float32",
        f"skip_bad_rows={str(skip).lower()}",
    ]
    more = [  # a trust region needs 20 responses
        {"prompt": f"the {word} was {how}", "chosen": f"very good {word}", "rejected": f"bad {word}"}
        for word in WORDS
        for how in ("very", "not")
    ]
    enough = data.parent / "more" / data.name
    enough.parent.mkdir(exist_ok=True)
    enough.write_text(data.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    config = load_config(DemoConfig, None, sets, model=str(models / "policy"), preferences=str(enough), output=out)
    counts = run_demo(config, progress=False).metrics["counts"]
    assert counts["pairs"] + counts["held_out_pairs"] == counts["prompts"] == 18
    return int(counts["bad_rows"])


@pytest.mark.parametrize("job", [_head, _pet, _eval, _score, _demo])
def test_a_row_that_the_template_refuses(job: Callable[..., int], models: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl, line 3[a-z, ]*: the chat template refuses it: no system turn$"
    ):
        job(models, data, tmp_path / "refused", False)
    assert job(models, data, tmp_path / "done", True) == 1


def _ppo(models: Path, prompts: Path, out: Path, *sets: str) -> PPOConfig:
    small = ["steps=1", "rollout.prompts_per_step=2", "rollout.max_new_tokens=4", *sets]
    given = {"model": str(models / "policy"), "prompts": str(prompts), "output": str(out)}
    return load_config(PPOConfig, None, small, **given, **{"reward.source": str(models / "picky")})


@pytest.mark.parametrize("kind", ["shared", "model"])
def test_a_prompt_that_the_policys_or_the_rewards_template_refuses(
    models: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    reward = f"reward.kind={kind}"
    data.write_text(data.read_text() + json.dumps({"prompt": "my day"}) + "\n")
    with pytest.raises(
        ValueError, match=r"prompts: .*pairs\.jsonl, line 3: the chat template refuses it: no system turn$"
    ):
        run_ppo(_ppo(models, data, tmp_path / "refused", reward), progress=False)
    (tmp_path / "days.jsonl").write_text(json.dumps({"prompt": "my day"}) + "\n")
    with pytest.raises(
        ValueError, match=r"prompts: .*days\.jsonl, line 1: reward\.source: the chat template refuses it: no days$"
    ):
        run_ppo(_ppo(models, tmp_path / "days.jsonl", tmp_path / "refused", reward), progress=False)
    result = run_ppo(_ppo(models, data, tmp_path / "done", reward, "skip_bad_rows=true"), progress=False)
    assert f"prompts: {data}: 2 bad rows skipped\n" in capsys.readouterr().err
    assert result.metrics["bad_rows"] == {"prompts": 2}
    assert "prompts: broken rows skipped: 2" in str(result)


def test_preference_data_of_ppo_that_the_policys_template_refuses(models: Path, data: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the food was\nthe film was\n")
    with pytest.raises(
        ValueError, match=r"data: .*pairs\.jsonl, line 3, chosen: the chat template refuses it: no system"
    ):
        run_ppo(_ppo(models, prompts, tmp_path / "refused", f"data={data}"), progress=False)
    result = run_ppo(_ppo(models, prompts, tmp_path / "done", f"data={data}", "skip_bad_rows=true"), progress=False)
    assert result.metrics["bad_rows"] == {"prompts": 0, "data": 1}
