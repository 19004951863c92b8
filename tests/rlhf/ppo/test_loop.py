"""`prudent ppo` from end to end on a tiny model: it learns, it shows what it does, it stops when told to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prudent.cli import main
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.folder import locked_folder
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.ppo import loop
from prudent.rlhf.ppo.checkpoint import Checkpoints
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.loop import PPOResult, run_ppo
from prudent.rlhf.ppo.stop import METRICS
from prudent.rlhf.ppo.watch import report
from prudent.rlhf.ppo.watch.monitor import read_texts

REWARDS = """
def good(prompts, responses):
    return [text.split().count("good") for text in responses]

def short(prompts, responses):
    return [-len(text.split()) for text in responses]
"""


def _config(tiny: Path, tmp_path: Path, *sets: str, reward: str = "good", **given: Any) -> PPOConfig:
    prompts, rewards = tmp_path / "prompts.txt", tmp_path / "rewards.py"
    if not prompts.exists():
        prompts.write_text("the food\na hotel\nmy day\nthe train\nyour film\nthe soup\nthe room\nvery good people\n")
    rewards.write_text(REWARDS)
    small = ["steps=3", "rollout.prompts_per_step=4", "rollout.max_new_tokens=8"]
    given = {"reward.source": f"{rewards}:{reward}", "output": str(tmp_path / "run"), **given}
    return load_config(PPOConfig, None, [*small, *sets], model=str(tiny), prompts=str(prompts), **given)


@pytest.fixture(scope="module")
def finished(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PPOResult:
    """A run of 12 steps for a word, watched by a judge who likes it short."""
    folder = tmp_path_factory.mktemp("ppo")
    return run_ppo(
        _config(
            tiny_chat_folder,
            folder,
            "steps=12",
            "rollout.prompts_per_step=8",
            "rollout.samples_per_prompt=8",
            "update.lr=0.01",
            "update.estimator=rloo",
            "kl.coef=0.01",
            "save_every=5",
            "sample_every=5",
            gold=f"{folder / 'rewards.py'}:short",
        ),
        progress=False,
    )


def test_it_learns_what_is_rewarded(finished: PPOResult) -> None:
    rewards = [row["reward/mean"] for row in read_metrics(finished.folder)]
    assert sum(rewards[-3:]) / 3 > 3 * sum(rewards[:3]) / 3 + 0.5
    assert finished.metrics["last"]["reward/mean"] == rewards[-1]


def test_every_step_has_one_line_of_known_metrics(finished: PPOResult) -> None:
    rows = read_metrics(finished.folder)
    assert [row["step"] for row in rows] == list(range(12))
    for row in rows:
        assert set(row) - {"step", "time"} <= set(METRICS)
    assert abs(rows[0]["kl/sequence"]) < 1e-4  # the policy starts as the reference
    assert rows[-1]["kl/sequence"] > 0.1


def test_the_folder_holds_what_it_says(finished: PPOResult) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "policy", "report.html", "ppo.json"}
    assert expected <= names
    assert Checkpoints(finished.folder / "checkpoints").steps() == [10, 12]
    assert sorted({row["step"] for row in read_texts(finished.folder)}) == [0, 5, 10, 12]
    outcome = json.loads((finished.folder / "ppo.json").read_text())
    assert (outcome["steps"], outcome["stopped"]) == (12, None)
    assert "12 steps done" in str(finished)
    assert "gold/mean" in str(finished)


def test_the_policy_that_is_saved_is_the_one_that_learned(finished: PPOResult, tiny_chat_folder: Path) -> None:
    from peft import PeftModel

    folder = finished.folder / "policy"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_chat_folder), folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the food"}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"] if isinstance(ids, dict) or hasattr(ids, "keys") else ids])
    good = tokenizer.convert_tokens_to_ids("good")
    with torch.no_grad():
        after = model(ids).logits[0, -1].softmax(0)[good]
        with model.disable_adapter():
            before = model(ids).logits[0, -1].softmax(0)[good]
    assert after > 2 * before


def test_a_finished_run_is_not_run_again_and_more_steps_go_on(finished: PPOResult, tmp_path: Path) -> None:
    config = load_config(PPOConfig, finished.folder / "config.yaml")
    again = run_ppo(config, resume=True, progress=False)
    assert again.finished_before
    assert "nothing to do" in str(again)
    more = run_ppo(config.model_copy(update={"steps": 13}), resume=True, progress=False)
    assert more.metrics["steps"] == 13
    assert [row["step"] for row in read_metrics(finished.folder)] == list(range(13))


def test_the_command_says_what_runs_shows_a_bar_and_leaves_torchs_generator_alone(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tiny_chat_folder, tmp_path)
    arguments = ["ppo", "--model", config.model, "--prompts", config.prompts, "--reward", config.reward.source]
    arguments += ["--output", str(config.output), "--steps", "1", "--stop-when", "kl > 20", "--stop-when", "kl > 9"]
    arguments += [
        "--set",
        "rollout.prompts_per_step=2",
        "--set",
        "rollout.max_new_tokens=4",
        "--set",
        "rollout.top_k=40",
    ]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert main(arguments) == 0
    assert torch.equal(torch.get_rng_state(), before)
    shown = capsys.readouterr()
    combination = ("steps 0 to 1", "reference: ", "reward source: ", "(callable)", "trained: ")
    for said in (*combination, "1/1", "reward ", "kl ", "length "):
        assert said in shown.err
    assert "(top_k: the update assumes samples of the whole distribution" in shown.err
    assert "1 step done" in shown.out
    assert load_config(PPOConfig, config.output / "config.yaml").stop_when == ("kl > 20", "kl > 9")
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and seconds of pictures."""
    monkeypatch.setattr(report, "render", lambda *args: "<!doctype html>")


@pytest.mark.usefixtures("no_pictures")
class TestStopping:
    """`stop_when` ends a run, or takes the policy back."""

    def test_a_rule_that_fires_ends_the_run(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        result = run_ppo(_config(tiny_chat_folder, tmp_path, 'stop_when=["length > 0 for 2"]'), progress=False)
        assert result.metrics["steps"] == 2
        assert result.metrics["stopped"].startswith("'length > 0 for 2' held from step 0 to 1")
        assert "stopped early" in str(result)
        assert run_ppo(load_config(PPOConfig, result.folder / "config.yaml"), resume=True).finished_before

    def test_rolled_back_the_policy_is_the_last_one_from_before(
        self, tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured = loop.Run.refuse_bad
        spoilt: list[int] = []

        def spoil(run: Any, step: int, learned: dict[str, float]) -> None:
            spoilt.append(step)
            measured(run, step, learned)

        monkeypatch.setattr(loop.Run, "refuse_bad", spoil)
        config = _config(
            tiny_chat_folder,
            tmp_path,
            "steps=9",
            "save_every=1",
            "kl.target=1",  # its coefficient is a metric whose course is known
            "kl.horizon=2",
            'stop_when=["kl/coef < 0.5x for 3 then rollback"]',
        )
        result = run_ppo(config, progress=False)
        coefficients = [row["kl/coef"] for row in read_metrics(config.output)]
        since = next(step for step, value in enumerate(coefficients) if value < 0.5 * coefficients[0])
        assert result.metrics["steps"] == since + 3 == len(spoilt)
        assert result.metrics["rolled_back_to"] == since - 1
        assert f"the policy was rolled back to the checkpoint of step {since - 1}" in result.metrics["stopped"]
        kept = Checkpoints(config.output / "checkpoints")
        assert since - 1 in kept.steps()
        loaded = kept.load(since - 1)
        assert loaded is not None
        good = loaded.policy
        saved = {}
        for file in (config.output / "policy").glob("**/*.safetensors"):
            saved |= load_file(file)
        norms = sorted(float(tensor.norm()) for tensor in saved.values())
        assert norms == sorted(float(tensor.norm()) for tensor in good.values())
        # the texts are those of the policy that is kept, and the numbers are said not to be
        assert max(row["step"] for row in read_texts(config.output)) == since - 1
        assert f"first and last step, before the policy was rolled back to step {since - 1}:" in str(result)

    def test_without_an_older_checkpoint_the_policy_stays(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        config = _config(tiny_chat_folder, tmp_path, 'stop_when=["length > 0 for 2 then rollback"]')
        result = run_ppo(config, progress=False)
        assert result.metrics["rolled_back_to"] is None
        assert "no checkpoint is older, so the policy was not rolled back" in result.metrics["stopped"]

    @pytest.mark.parametrize(
        ("rule", "sets", "takes"),
        [
            ("gold/mean < 0", (), "a gold scorer: set gold"),
            ("value/explained_variance < 0 for 3", ("update.estimator=rloo", "rollout.samples_per_prompt=2"), "critic"),
            ("disagreement > 3x for 5", (), "a reward of several heads, not one"),
        ],
    )
    def test_a_metric_that_the_run_cannot_have_is_refused_before_it_samples(
        self, tiny_chat_folder: Path, tmp_path: Path, rule: str, sets: tuple[str, ...], takes: str
    ) -> None:
        from prudent import EnsembleRewardModel

        source = tmp_path / "one"
        EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=1).save_pretrained(source)
        AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(source)
        config = _config(tiny_chat_folder, tmp_path, f'stop_when=["{rule}"]', *sets, **{"reward.source": str(source)})
        with pytest.raises(ValueError, match=f"stop_when: '{rule}' watches .*{takes}"):
            run_ppo(config, progress=False)
        assert not (config.output / "metrics.jsonl").exists() or not read_metrics(config.output)

    def test_a_metric_that_is_not_measured_is_refused(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        config = _config(tiny_chat_folder, tmp_path, 'stop_when=["disagreement > 3x for 5"]')
        with pytest.raises(ValueError, match="which this run does not measure"):
            run_ppo(config, progress=False)


@pytest.mark.usefixtures("no_pictures")
class TestFinishedAgain:
    """A finished run of which something is gone is finished again, from its newest checkpoint."""

    @pytest.mark.parametrize("gone", ["policy", "report.html", "ppo.json", "metrics.jsonl"])
    def test_a_removed_file_is_restored(self, tiny_chat_folder: Path, tmp_path: Path, gone: str) -> None:
        config = _config(tiny_chat_folder, tmp_path, "steps=2")
        before = run_ppo(config, progress=False).metrics
        path = config.output / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = run_ppo(config, resume=True, progress=False)
        assert again.finished_before == (gone == "metrics.jsonl")  # which nothing gives again, and nothing asks for
        assert again.metrics == before
        assert run_ppo(config, resume=True, progress=False).finished_before

    @pytest.mark.parametrize("text", ["{}", "[]", '{"steps": 2', ""])
    def test_an_unreadable_ppo_json_is_written_again(self, tiny_chat_folder: Path, tmp_path: Path, text: str) -> None:
        config = _config(tiny_chat_folder, tmp_path, "steps=2")
        before = run_ppo(config, progress=False).metrics
        (config.output / "ppo.json").write_text(text)
        again = run_ppo(config, resume=True, progress=False)
        assert (again.finished_before, again.metrics) == (False, before)

    def test_lost_metrics_are_named(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        config = _config(tiny_chat_folder, tmp_path, "steps=2")
        run_ppo(config, progress=False)
        (config.output / "metrics.jsonl").unlink()
        with pytest.raises(ValueError, match="holds a run already"):  # its checkpoints are there
            run_ppo(config, progress=False)
        more = run_ppo(config.model_copy(update={"steps": 4}), resume=True, progress=False)
        assert more.metrics["faults"] == "metrics.jsonl lacks steps 0 to 1: the numbers cover only the other steps."
        assert more.metrics["faults"] in str(more)

    def test_without_the_reports_packages_no_report_is_promised(
        self, tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(*_: Any) -> str:
            raise ImportError("pip install 'prudent[report]'")

        monkeypatch.setattr(report, "render", missing)
        config = _config(tiny_chat_folder, tmp_path, "steps=1")
        assert "report:" not in str(run_ppo(config, progress=False))
        assert run_ppo(config, resume=True, progress=False).finished_before


class TestRefusals:
    """What cannot be run is refused before anything is computed."""

    def test_several_processes(self, tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="expected one process"):
            run_ppo(_config(tiny_chat_folder, tmp_path))

    def test_a_folder_that_another_process_writes(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        config = _config(tiny_chat_folder, tmp_path)
        with locked_folder(config.output), pytest.raises(ValueError, match="is being written by process"):
            run_ppo(config, resume=True, progress=False)

    def test_a_tracker_that_is_not_installed(
        self, tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
        config = _config(tiny_chat_folder, tmp_path, trackers=["wandb"])
        with pytest.raises(ImportError, match="trackers: wandb not installed"):
            run_ppo(config, progress=False)
        assert not config.output.exists()

    def test_a_prompt_longer_than_the_model_holds_is_named(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("the food\n" + "good " * 200 + "\n")
        with pytest.raises(ValueError, match=r"prompts\.txt, line 2: expected at most \d+ tokens.*'good good"):
            run_ppo(_config(tiny_chat_folder, tmp_path, "rollout.prompts_per_step=1", "update.minibatches=1"))

    def test_fewer_prompts_than_a_step_takes(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"rollout\.prompts_per_step: expected at most 8"):
            run_ppo(_config(tiny_chat_folder, tmp_path, "rollout.prompts_per_step=9"))

    def test_an_unread_key_leaves_no_folder_behind(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        config = _config(tiny_chat_folder, tmp_path, "policy.mode=full", "policy.lora_rank=4")
        with pytest.raises(ValueError, match=r"policy\.lora_rank: has no effect"):
            run_ppo(config)
        assert not config.output.exists()

    def test_preference_data_for_a_reward_without_heads(self, tiny_chat_folder: Path, tmp_path: Path) -> None:
        data = tmp_path / "pairs.jsonl"
        data.write_text('{"prompt": "the food", "chosen": "very good", "rejected": "bad"}\n')
        with pytest.raises(
            ValueError,
            match=r"^data: has no effect with reward\.kind callable: a reward without heads has no uncertainty",
        ):
            run_ppo(_config(tiny_chat_folder, tmp_path, data=str(data)), progress=False)


@pytest.mark.parametrize("other", [False, True])
def test_a_kept_sample_has_the_reward_that_the_scorer_gives_its_prompt_and_response(
    tiny_chat_folder: Path, tmp_path: Path, other: bool
) -> None:
    """Also if the reward has its own template, in which a finished turn does not begin as an opened turn does."""
    from prudent import EnsembleRewardModel, Scorer

    reward = tmp_path / "reward"
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2).save_pretrained(reward)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    if other:
        tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "'the ' + message['content']")
    tokenizer.save_pretrained(reward)
    sets = ["reward.kind=shared", "steps=1", "sample_every=1"]
    config = _config(tiny_chat_folder, tmp_path, *sets, **{"reward.source": str(reward)})
    rows = read_texts(run_ppo(config, progress=False).folder)
    asked = (tmp_path / "prompts.txt").read_text().splitlines()
    prompts = [next(text for text in asked if text in row["prompt"]) for row in rows]
    items = [{"prompt": prompt, "response": row["response"]} for prompt, row in zip(prompts, rows, strict=True)]
    scores = Scorer(EnsembleRewardModel.from_pretrained(reward), tokenizer, progress=False).score(items)
    assert len(rows) == 8
    assert [row["reward"] for row in rows] == pytest.approx(scores.reward, abs=1e-4)


def test_answers_that_end_at_once_are_one_token_and_no_error(tiny_chat_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_chat_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 100.0  # every hidden state then points along the first axis
        model.lm_head.weight.zero_()
        model.lm_head.weight[3, 0] = 10.0
    config = _config(tiny_chat_folder, tmp_path, "steps=2")
    run_ppo(config, model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_chat_folder), progress=False)
    for row in read_metrics(config.output):
        assert (row["text/length"], row["text/truncated"], row["samples/dropped"], row["update/skipped"]) == (
            1,
            0,
            0,
            0,
        )
    assert {row["response"] for row in read_texts(config.output)} == {""}
