"""`prudent train` as a function: the run folder, its refusals, and going on after a kill."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.data.pairs import load_pairs, split_by_prompt
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.reward import fit as fit_module
from prudent.rlhf.reward.config import BradleyTerryConfig
from prudent.rlhf.reward.start import check_given, load_stage1
from prudent.rlhf.reward.train import TrainConfig, run_train

from ..sentiment import write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentiment pairs: 12 prompts, 72 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ("very", "not"))


def _config(model: Path, data: Path, output: Path, *sets: str, **given: Any) -> TrainConfig:
    base = [
        "mode=head",
        "eval_fraction=0.25",
        "bt.solver=adamw",
        "bt.epochs=20",
        "brme.epochs=20",
        "bt.lr=0.02",
        "brme.lr=0.02",
        "brme.num_heads=3",
    ]
    return load_config(TrainConfig, None, [*base, *sets], model=str(model), data=str(data), output=output, **given)


@pytest.fixture(scope="module")
def finished(tiny_chat_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = _config(tiny_chat_folder, data, tmp_path_factory.mktemp("runs") / "run", "brme.bsr=0.001")
    result = run_train(config, progress=False)
    assert "finished\n54 pairs trained on, 18 held out" in str(result)
    assert not result.finished_before
    return config


def test_the_run_folder_holds_everything(finished: TrainConfig) -> None:
    names = {path.name for path in finished.output.iterdir()}
    expected = {
        "config.yaml",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "features",
        "checkpoints",
        "stage1",
        "model",
    }
    assert names == expected | {"train.json"}
    assert load_config(TrainConfig, finished.output / "config.yaml") == finished
    counts = json.loads((finished.output / "data.json").read_text())
    assert (counts["pairs"], counts["train_pairs"], counts["held_out_pairs"], counts["held_out_prompts"]) == (
        72,
        54,
        18,
        3,
    )
    metrics = read_metrics(finished.output)
    assert {"features/train/norm_mean", "features/train/norm_gap_std"} <= set(metrics[0])
    assert sum("bt/loss" in row for row in metrics) == sum("brme/eval_accuracy_nominal" in row for row in metrics) == 20


def test_the_saved_models_score_what_was_measured(finished: TrainConfig) -> None:
    accuracy = json.loads((finished.output / "train.json").read_text())["accuracy"]
    assert list(accuracy) == ["single head (stage 1)", "nominal", "mean of heads", "worst", "tradeoff:0.4"]
    assert accuracy["single head (stage 1)"]["value"] > 0.8
    assert accuracy["mean of heads"]["value"] > 0.8
    _, held = split_by_prompt(load_pairs(finished.data).pairs, 0.25, 0)
    for folder, name in (("stage1", "single head (stage 1)"), ("model", "tradeoff:0.4")):
        model = EnsembleRewardModel.from_pretrained(finished.output / folder)
        scorer = Scorer(model, AutoTokenizer.from_pretrained(finished.output / folder), progress=False)
        chosen, rejected = (scorer.score([pair.items()[side] for pair in held]).reward for side in (0, 1))
        right = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(held)
        assert right == pytest.approx(accuracy[name]["value"], abs=1 / len(held))


def test_every_accuracy_has_the_interval_of_eval_and_is_compared_with_the_best(finished: TrainConfig) -> None:
    found = json.loads((finished.output / "train.json").read_text())
    accuracy = found["accuracy"]
    best = max(row["value"] for row in accuracy.values())
    assert accuracy[found["best"]]["value"] == best
    assert set(found["minus_best"]) == set(accuracy) - {found["best"]}
    for name, difference in found["minus_best"].items():
        assert difference["value"] == pytest.approx(accuracy[name]["value"] - best)
    config = EvalConfig(
        model=str(finished.output / "model"),
        data=finished.data,
        output=finished.output.parent / "eval",
        eval_fraction=0.25,
        pictures=False,
    )
    evaluated = run_eval(config, progress=False).metrics
    assert evaluated["prompts"] == found["held_out_prompts"] == 3
    for ours, theirs in (("nominal", "nominal"), ("mean of heads", "mean"), ("worst", "worst")):
        assert {key: evaluated["accuracy"][theirs][key] for key in ("value", "low", "high")} == accuracy[ours]


def test_the_saved_models_read_as_many_tokens_as_they_were_trained_on(
    tiny_chat_folder: Path, data: Path, tmp_path: Path
) -> None:
    run_train(_config(tiny_chat_folder, data, tmp_path / "run", "max_length=7"), progress=False)
    for name in ("stage1", "model"):
        folder = tmp_path / "run" / name
        scorer = Scorer(EnsembleRewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        assert scorer.max_length == 7


def test_the_final_heads_are_calibrated_on_the_training_features(finished: TrainConfig) -> None:
    model = EnsembleRewardModel.from_pretrained(finished.output / "model")
    train, _ = split_by_prompt(load_pairs(finished.data).pairs, 0.25, 0)
    scorer = Scorer(model, AutoTokenizer.from_pretrained(finished.output / "model"), progress=False)
    mean = scorer.score([item for pair in train for item in pair.items()]).mean
    torch.testing.assert_close(mean.mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(mean.std(dim=0), torch.ones(3), atol=1e-3, rtol=0)
    assert str(model.score.aggregation) == "tradeoff:0.4"
    assert not torch.equal(model.score.std_ref, torch.ones(3))


def test_a_finished_run_resumed_says_so_and_does_nothing(
    finished: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prudent.rlhf.reward.run.load_pairs", None)
    result = run_train(finished, resume=True, progress=False)
    assert result.finished_before
    assert "was finished before; nothing to do" in str(result)


def test_a_folder_that_holds_a_run_or_anything_else_is_refused(finished: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        run_train(finished, progress=False)
    other = finished.model_copy(update={"seed": 3, "brme": finished.brme.model_copy(update={"lr": 0.1})})
    with pytest.raises(ValueError, match=r"another seed \(0 there, 3 here\), brme\.lr \(.* there, 0\.1 here\): choose"):
        run_train(other, resume=True, progress=False)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a new or empty folder or one of a run, got .* with other files"):
        run_train(finished.model_copy(update={"output": tmp_path}), resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match=r"output: expected a folder, got .*thesis\.txt, which is a file"):
        run_train(finished.model_copy(update={"output": tmp_path / "thesis.txt"}), progress=False)


def test_a_key_that_the_mode_does_not_read_is_refused(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    for mode, entry, message in (
        ("lora", "brme.lr=0.1", "brme.lr: has no effect in mode lora: set trunk.lr"),
        ("full", "bt.max_steps=3", "bt.max_steps: has no effect in mode full: set trunk.max_steps"),
        ("full", "trunk.lora_rank=3", "trunk.lora_rank: has no effect in mode full: set mode to lora"),
        ("head", "trunk.lr=0.1", "trunk.lr: has no effect in mode head: set bt.lr and brme.lr"),
        ("head", "trunk.lora_rank=3", "trunk.lora_rank: has no effect in mode head: set mode to lora or full"),
        ("head", "trunk.stage2_from=stage1", "trunk.stage2_from: has no effect in mode head: set mode to lora or full"),
        ("lora", "bt.folds=3", "bt.folds: has no effect in mode lora, whose trunk AdamW trains: leave it out"),
        ("head", "bt={solver: newton, lr: 0.1}", "bt.lr: has no effect with bt.solver newton: set bt.solver to"),
    ):
        config = load_config(
            TrainConfig, None, [entry], model=str(tiny_chat_folder), data=str(data), output=tmp_path / "run", mode=mode
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            run_train(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_may_lower_its_batches(finished: TrainConfig) -> None:
    lower = finished.model_copy(update={"batch_tokens": finished.batch_tokens // 2})
    assert run_train(lower, resume=True, progress=False).finished_before


def _weights(config: TrainConfig, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(config.output / folder / "model.safetensors")


def test_an_interrupted_run_goes_on_to_the_same_bits_and_repeats_no_stage(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.model_copy(update={"output": tmp_path / "run"})
    train_epoch = fit_module._State.train_epoch

    def die_in_stage_2(state: Any, epoch: int) -> dict[str, float]:
        if state.config.stage == "brme" and epoch == 7:
            raise KeyboardInterrupt
        return train_epoch(state, epoch)

    monkeypatch.setattr(fit_module._State, "train_epoch", die_in_stage_2)
    with pytest.raises(KeyboardInterrupt):
        run_train(config, progress=False)
    assert (config.output / "stage1").exists()
    assert not (config.output / "model").exists()
    trained: list[tuple[str, int]] = []

    def count(state: Any, epoch: int) -> dict[str, float]:
        trained.append((state.config.stage, epoch))
        return train_epoch(state, epoch)

    monkeypatch.setattr(fit_module._State, "train_epoch", count)
    run_train(config, resume=True, progress=False)
    assert trained == [("brme", epoch) for epoch in range(7, 20)]
    for name, value in _weights(finished).items():
        assert torch.equal(_weights(config)[name], value), name
    assert (config.output / "train.json").read_text() == (finished.output / "train.json").read_text()
    steps = [(row["step"], *sorted(row)) for row in read_metrics(config.output)]
    assert len(steps) == len(set(steps)) == len(read_metrics(finished.output))


def test_data_that_changed_under_a_run_is_refused(
    tiny_chat_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(data.read_text())
    config = _config(tiny_chat_folder, file, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("prudent.rlhf.reward.two_stage.fit_heads", None)  # dies after the features
        with pytest.raises(TypeError, match="NoneType"):
            run_train(config, progress=False)
    file.write_text("\n".join(data.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"has changed since the run in .* began"):
        run_train(config, resume=True, progress=False)


def test_stage_bt_alone_gives_a_single_calibrated_head(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    config = _config(tiny_chat_folder, data, tmp_path / "run", "stage=bt", "eval_fraction=0")
    result = run_train(config, progress=False)
    assert result.metrics["accuracy"] == {}
    model = EnsembleRewardModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_heads == 1
    assert str(model.score.aggregation) == "mean"
    assert model.score.scale.item() != 1.0


def test_several_runs_share_a_feature_folder(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    stamps = []
    for name in ("a", "b"):
        run_train(_config(tiny_chat_folder, data, tmp_path / name, feature_cache=tmp_path / "cache"), progress=False)
        stamps.append({p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")})
        assert not (tmp_path / name / "features").exists()
    assert stamps[0] == stamps[1] != {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("brme.num_heads=55", "brme.num_heads: expected at most the 54 training pairs, got 55"),
        ("max_length=100000", "Scorer: max_length: expected 1 to 128"),
        ("aggregation=head:3", r"aggregation 'head:3': expected a head below 3 \(K\), got 3"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    tiny_chat_folder: Path, data: Path, tmp_path: Path, entry: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_train(_config(tiny_chat_folder, data, tmp_path / "run", entry), progress=False)
    # nothing was computed, so the folder is free for the mended command
    mended = _config(tiny_chat_folder, data, tmp_path / "run", "bt.epochs=1", "brme.epochs=1")
    assert not run_train(mended, progress=False).finished_before


@pytest.mark.parametrize("mode", ["head", "full"])
def test_an_existing_stage_1_takes_the_place_of_bradley_terry(
    finished: TrainConfig, data: Path, tmp_path: Path, mode: str
) -> None:
    given = finished.output / "stage1"
    sets = ["brme.num_heads=2", "eval_fraction=0.25"] + (["trunk.max_steps=2"] if mode == "full" else [])
    config = load_config(
        TrainConfig,
        None,
        [*sets, f"mode={mode}", f"stage1={given}"],
        model=str(given if mode == "head" else finished.model),
        data=str(data),
        output=tmp_path / "run",
    )
    accuracy = run_train(config, progress=False).metrics["accuracy"]
    before = json.loads((finished.output / "train.json").read_text())["accuracy"]
    assert accuracy["single head (stage 1)"] == before["single head (stage 1)"]
    assert not any(key.startswith("bt/") for row in read_metrics(config.output) for key in row)
    first, again = _weights(finished, "stage1"), _weights(config, "stage1")
    assert set(first) == set(again)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert EnsembleRewardModel.from_pretrained(config.output / "model").config.num_heads == 2


def test_a_calibrated_stage_1_and_a_classifier_give_bradley_terry_logits(
    finished: TrainConfig, tiny_chat_folder: Path, tmp_path: Path
) -> None:
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=1)
    ids = torch.randint(4, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    want = model(ids).logits.detach()
    model.score.shift.fill_(3.0)
    model.score.scale.fill_(7.0)
    model.save_pretrained(tmp_path / "calibrated")
    classifier = LlamaForSequenceClassification(LlamaConfig(**{**model.model.config.to_dict(), "num_labels": 1}))
    classifier.model.load_state_dict(model.model.state_dict())
    classifier.score.weight.data = model.score.weight.data[:1].clone()
    classifier.save_pretrained(tmp_path / "classifier")
    for name in ("calibrated", "classifier"):
        loaded = load_stage1(finished.model_copy(update={"stage1": str(tmp_path / name), "max_length": 9}))
        assert loaded.config.max_score_length == 9
        bias = 0.0 if name == "calibrated" else model.score.bias[0].item()  # a Llama classifier has none
        torch.testing.assert_close(loaded(ids).logits + bias, want, rtol=1e-4, atol=1e-4)


def test_a_reward_model_where_a_trunk_is_expected_is_refused(
    finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single, final = str(finished.output / "stage1"), str(finished.output / "model")
    for update, message in (
        ({"model": final}, "model: expected a language model, got the reward model"),
        ({"model": single, "stage1": final}, "model: expected stage1's .* because mode head trains on stage 1's own"),
        ({"model": final, "stage1": final}, "stage1: expected a reward model with one head, got 3"),
        (
            {"model": single, "stage1": single, "append_eos": False},
            "append_eos: expected True, with which stage1 .* trained",
        ),
        ({"model": single, "stage1": single, "stage": "bt"}, "stage: expected brme with stage1"),
        ({"model": single, "stage1": single, "bt": finished.bt}, "bt.epochs: has no effect beside stage1"),
    ):
        config = finished.model_copy(update={"output": tmp_path / "run", "bt": BradleyTerryConfig(), **update})
        with pytest.raises(ValueError, match=message):
            run_train(config, progress=False)
    classifier = LlamaForSequenceClassification(AutoConfig.from_pretrained(finished.model))
    classifier.save_pretrained(tmp_path / "classifier")
    with caplog.at_level(logging.WARNING):
        check_given(finished.model_copy(update={"model": str(tmp_path / "classifier")}), "head")
    assert "has a classification head, which is dropped" in caplog.text


def test_a_model_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .*nowhere: no such file or folder"):
        run_train(_config(tmp_path / "nowhere", data, tmp_path / "run"), progress=False)


def test_what_was_left_out_of_the_data_is_said_at_the_end(
    finished: TrainConfig, tiny_chat_folder: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    lines = data.read_text().splitlines()
    equal = json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"})
    file.write_text("\n".join([*lines, lines[0], lines[1], equal, "{broken"]))
    config = _config(tiny_chat_folder, file, tmp_path / "run", "skip_bad_rows=true", "bt.epochs=1", "brme.epochs=1")
    said = str(run_train(config, progress=False))
    dropped = ["broken rows skipped: 1", "duplicate pairs dropped: 2", "pairs of two equal responses dropped: 1"]
    assert said.splitlines()[2:5] == dropped
    assert "min_score_gap" not in said
    assert "dropped" not in str(run_train(finished, resume=True, progress=False))


def test_several_processes_are_refused(finished: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="train: expected one process"):
        run_train(finished, resume=True, progress=False)


def test_a_centred_aggregation_is_measured_as_it_ranks(tiny_chat_folder: Path, data: Path, tmp_path: Path) -> None:
    accuracies = []
    for i, centre in enumerate(("", ",centre=batch")):
        config = _config(tiny_chat_folder, data, tmp_path / str(i), f"aggregation=median{centre}", "brme.epochs=2")
        accuracies.append(run_train(config, progress=False).metrics["accuracy"][config.aggregation])
    assert accuracies[0] == accuracies[1]


def test_a_wrong_aggregation_is_refused_with_the_config() -> None:
    with pytest.raises(ValueError, match="aggregation: kind: expected one of tradeoff"):
        load_config(TrainConfig, None, ["aggregation=best"], model="m", data="d", output="o")
    for spec in ("batch_worst", "tradeoff:0.4,worst=batch"):
        with pytest.raises(
            ValueError, match="aggregation: expected one that gives a text the same reward in every batch"
        ):
            load_config(TrainConfig, None, [f"aggregation={spec}"], model="m", data="d", output="o")


@pytest.mark.slow
def test_a_real_small_model_learns_real_preferences(shared_dir: Path, tmp_path: Path) -> None:
    config = load_config(
        TrainConfig,
        None,
        ["limit=3000", "eval_fraction=0.3"],
        model=str(shared_dir / "models" / "stories260k"),
        data=str(shared_dir / "data" / "ukpconvarg1_strict.jsonl"),
        output=tmp_path / "run",
    )
    accuracy = run_train(config, progress=False).metrics["accuracy"]
    assert accuracy["single head (stage 1)"]["value"] > 0.6
    assert accuracy["mean of heads"]["value"] > 0.6
