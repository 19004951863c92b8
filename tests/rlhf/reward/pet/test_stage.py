"""The stage pet of `prudent train`: what it saves and says, resuming, where it starts from, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.rlhf.data.pairs import load_pairs, split_by_prompt
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.reward.config import BradleyTerryConfig, BRMEConfig
from prudent.rlhf.reward.outcome import _DROPPED, TrainResult
from prudent.rlhf.reward.pet import fit as pet_fit
from prudent.rlhf.reward.pet.stage import PETStage
from prudent.rlhf.reward.train import TrainConfig, run_train

from ...sentiment import write_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentiment pairs: 6 prompts, 36 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ("very",))


def _config(model: Path, data: Path, output: Path, *sets: str) -> TrainConfig:
    base = [
        "stage=pet",
        "mode=head",
        "eval_fraction=0.34",
        "bt.solver=adamw",
        "bt.epochs=20",
        "bt.lr=0.02",
        "brme.num_heads=3",
    ]
    base += ["pet.samples=8", "pet.max_new_tokens=5", "pet.epochs=10", "pet.lr=0.02"]
    return load_config(TrainConfig, None, [*base, *sets], model=str(model), data=str(data), output=output)


@pytest.fixture(scope="module")
def finished(tiny_chat_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = _config(tiny_chat_folder, pairs, tmp_path_factory.mktemp("runs") / "run")
    said = str(run_train(config, progress=False))
    assert "PET on 6 prompts, n = 8, beta = 10; before -> after" in said
    assert "single head, after PET" in said
    return config


def _metrics(config: TrainConfig) -> dict[str, Any]:
    return dict(json.loads((config.output / "train.json").read_text()))


def test_the_stage_trains_saves_and_says_what_it_did(finished: TrainConfig) -> None:
    pet = _metrics(finished)["pet"]
    assert (pet["start"], pet["aggregation"], pet["prompts_too_long"]) == ("bt", "mean", 0)
    assert pet["after"]["loss"] < pet["before"]["loss"]
    assert {"eval_gap", "eval_bt", "eval_accuracy"} <= set(pet["after"])
    rows = read_metrics(finished.output)
    assert {"pet/loss", "pet/gap", "pet/bt", "pet/eval_gap", "pet/eval_accuracy"} <= {
        name for row in rows for name in row
    }
    assert {"reference", "stage1", "model"} <= {path.name for path in finished.output.iterdir()}
    start, model = (EnsembleRewardModel.from_pretrained(finished.output / name) for name in ("stage1", "model"))
    assert not torch.equal(start.score.weight[0], model.score.weight[0])
    assert str(model.score.aggregation) == "mean"


def test_the_saved_model_has_the_gap_that_was_measured(finished: TrainConfig) -> None:
    """From the texts alone: held-out prompts, the samples kept in the run folder, in the saved model's unit."""
    model = EnsembleRewardModel.from_pretrained(finished.output / "model")
    scorer = Scorer(model, AutoTokenizer.from_pretrained(finished.output / "model"), progress=False)
    _, held = split_by_prompt(load_pairs(finished.data).pairs, 0.34, 0)
    lines = [json.loads(line) for line in (finished.output / "reference/samples.jsonl").read_text().splitlines()]
    drawn = {line["prompt"]: line["responses"] for line in lines}
    gaps = []
    for pair in held:
        best = max(scorer.score([{"prompt": pair.prompt, "response": r} for r in drawn[pair.prompt]]).reward)
        gaps.append(best - scorer.score([pair.items()[0]]).reward[0])
    want = _metrics(finished)["pet"]["after"]["eval_gap"]
    assert sum(gaps) / len(gaps) * float(model.score.scale) == pytest.approx(want, abs=2e-3)


def test_a_killed_stage_goes_on_to_the_same_bits_and_samples_nothing_twice(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.model_copy(update={"output": tmp_path / "run"})
    train_epoch = pet_fit._State.train_epoch

    def die(state: Any, epoch: int) -> dict[str, float]:
        if epoch == 4:
            raise KeyboardInterrupt
        return train_epoch(state, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(pet_fit._State, "train_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            run_train(config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("prudent.rlhf.sampling.stored.sample_batch", None)
        run_train(config, resume=True, progress=False)
    first, second = (load_file(c.output / "model" / "model.safetensors") for c in (finished, config))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _metrics(finished) == _metrics(config)


def test_an_ensemble_of_this_run_becomes_pessimistic(tiny_chat_folder: Path, pairs: Path, tmp_path: Path) -> None:
    sets = (
        "pet.start=brme",
        "aggregation=min",
        "brme.epochs=5",
        "pet.reference=sample",
        "pet.cache=" + str(tmp_path / "c"),
    )
    run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", *sets), progress=False)
    start, model = (EnsembleRewardModel.from_pretrained(tmp_path / "run" / name) for name in ("start", "model"))
    assert model.config.num_heads == 3
    assert str(model.score.aggregation) == "min"
    assert torch.equal(start.score.scale, model.score.scale)
    pet = _metrics(_config(tiny_chat_folder, pairs, tmp_path / "run", *sets))["pet"]
    assert pet["aggregation"] == "min"
    assert pet["after"]["loss"] < pet["before"]["loss"]
    accuracy = json.loads((tmp_path / "run" / "train.json").read_text())["accuracy"]
    assert {"worst, before PET", "worst, after PET"} <= set(accuracy)
    other = _config(tiny_chat_folder, pairs, tmp_path / "other", *sets, "pet.temperature=0.5")
    with pytest.raises(
        ValueError, match=r"pet.cache: .* holds samples with another temperature \(1.0 there, 0.5 here\)"
    ):
        run_train(other, progress=False)


def test_a_given_reward_model_becomes_pessimistic(finished: TrainConfig, tmp_path: Path) -> None:
    """Some of its prompts sampled for; its own trunk's features are those of the texts."""
    given = _config(
        Path(finished.model), Path(finished.data), tmp_path / "run", f"pet.start={finished.output / 'model'}"
    )
    given = given.model_copy(update={"bt": BradleyTerryConfig(), "brme": BRMEConfig(), "max_length": 16})
    given = given.model_copy(update={"pet": given.pet.model_copy(update={"prompts": 2})})
    run_train(given, progress=False)
    metrics = _metrics(given)
    assert metrics["pet"]["prompts"] == 4  # 2 to train on, 2 held out
    assert list(metrics["accuracy"]) == ["single head, before PET", "single head, after PET"]
    assert not (given.output / "stage1").exists()


def test_what_the_stage_cannot_use_is_refused(finished: TrainConfig, tmp_path: Path) -> None:
    model, data = Path(finished.model), Path(finished.data)
    for sets, message in (
        (("stage=bt", "pet.beta=3"), "pet.samples: has no effect with stage bt: set stage to pet"),
        ((f"pet.start={finished.output / 'model'}",), "bt.epochs: has no effect beside pet.start"),
        ((f"stage1={model}",), "stage1: expected none with stage pet"),
        (("mode=full",), "mode: expected head or lora with stage pet"),
        (("pet.max_new_tokens=127",), "pet.max_new_tokens: expected room for 128 tokens after some prompt"),
        (
            (
                "pet.start=nowhere",
                f"bt.solver={BradleyTerryConfig().solver}",
                "bt.epochs=10",
                "bt.lr=0.003",
                "brme.num_heads=5",
            ),
            "pet.start: nowhere is neither a folder",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            run_train(_config(model, data, tmp_path / re.sub(r"\W", "", message[:20]), *sets), progress=False)


def test_prompts_too_long_for_a_response_are_counted_and_left_to_bradley_terry(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    long = {"prompt": "the " * 130, "chosen": "good", "rejected": "bad"}
    file.write_text(pairs.read_text() + json.dumps(long) + "\n")
    result = run_train(_config(tiny_chat_folder, file, tmp_path / "run", "max_length=100"), progress=False)
    assert result.metrics["pet"]["prompts_too_long"] == 1
    assert "prompts too long for a response: 1" in str(result)


def test_a_gap_below_zero_is_warned_of() -> None:
    """The objective then falls without end, by a reward that tells the sources apart."""
    pet = {
        "prompts": 1,
        "samples": 2,
        "beta": 1.0,
        "prompts_too_long": 0,
        "before": {"gap": 1.0},
        "after": {"gap": -1.0},
    }
    metrics = {"train_pairs": 1, "held_out_pairs": 0, "dropped": dict.fromkeys(_DROPPED, 0), "accuracy": {}, "pet": pet}
    assert "warning: the reference responses now score above" in str(TrainResult(Path("run"), metrics))


def _count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folder of every model and tokeniser that is loaded from now on."""
    loaded: list[str] = []
    for kind in (PreTrainedModel, PreTrainedTokenizerBase):
        load = kind.from_pretrained.__func__

        def counted(cls: Any, name: Any, *args: Any, _load: Any = load, _kind: str = kind.__name__, **kw: Any) -> Any:
            loaded.append(f"{_kind}: {name}")
            return _load(cls, name, *args, **kw)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(counted))
    return loaded


@pytest.mark.parametrize("start", ["bt", "model"])
def test_one_trunk_is_in_memory_and_each_folder_is_loaded_once(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    config = _config(Path(finished.model), Path(finished.data), tmp_path / "run", "pet.epochs=1")
    if start == "model":
        given = finished.pet.model_copy(update={"start": str(finished.output / "model")})
        config = config.model_copy(update={"bt": BradleyTerryConfig(), "brme": BRMEConfig(), "pet": given})
    stages: list[PETStage] = []
    heads = PETStage.heads

    def kept(self: PETStage, scorer: Scorer, *args: Any) -> Any:
        stages.append(self)
        assert scorer.model.model is self.policy.model  # the inner model of LlamaForCausalLM
        return heads(self, scorer, *args)

    monkeypatch.setattr(PETStage, "heads", kept)
    loaded = _count_loads(monkeypatch)
    run_train(config, progress=False)
    assert len(stages) == 1
    folders = [finished.model] + ([config.pet.start] if start == "model" else [])
    assert sorted(loaded) == sorted(
        f"{k}: {f}" for k in ("PreTrainedModel", "PreTrainedTokenizerBase") for f in folders
    )
