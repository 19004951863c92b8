"""PET that trains the trunk by a LoRA: its objective on texts, its stage in `prudent train`, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from prudent.engine import EnsembleRewardModel, Scorer
from prudent.engine.text import Encoded
from prudent.rlhf.data.pairs import load_pairs, split_by_prompt
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import read_metrics
from prudent.rlhf.models.adapter import load_head
from prudent.rlhf.reward.config import BRMEConfig
from prudent.rlhf.reward.pet.config import PETConfig
from prudent.rlhf.reward.pet.objective import pet_loss, takes_rejected
from prudent.rlhf.reward.pet.trunk import PETTexts, PETTrainer
from prudent.rlhf.reward.train import TrainConfig, run_train

from ...sentiment import write_pairs


def _texts(count: int, seed: int) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=g).tolist()
    return [Encoded(torch.randint(4, 30, (length,), generator=g).tolist(), False, seed % length) for length in lengths]


@pytest.mark.parametrize(
    ("reference", "taps"), [("chosen", None), ("dataset", None), ("sample", None), ("sample", "wide")]
)
def test_the_loss_on_texts_is_the_objective_of_the_rewards_of_each_alone(
    tiny_chat_folder: Path, tmp_path: Path, reference: Any, taps: Any
) -> None:
    """4 pairs of 2 prompts with 3 samples each; the last pair's prompt has none."""
    torch.manual_seed(0)
    options = {"num_heads": 2, "aggregation": "min", "dtype": torch.float32, "taps": taps}
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), **options)
    drawn = _texts(8, 2)
    data = PETTexts(
        _texts(4, 0), _texts(4, 1), [0, 1, 0, -1], [drawn[:3], drawn[3:6]], drawn[6:], [0.0, 0.5, 0.0, 0.25]
    )
    config = PETConfig(samples=3, reference=reference, seed=1)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = PETTrainer(
        model=model, args=arguments, data=data, held_out=data, pet=config, batch_tokens=8, run_log=None
    )
    model.eval()

    def reward(texts: list[Encoded]) -> Tensor:
        starts = [torch.tensor([text.start]) for text in texts]
        inputs = [torch.tensor([text.ids]) for text in texts]
        return torch.cat([model(i, response_start=s).logits[:, 0] for i, s in zip(inputs, starts, strict=True)])

    chosen, rejected = reward(data.chosen), reward(data.rejected)
    best = torch.stack([reward(own).max() for own in data.samples])[[0, 1, 0]]
    others = {
        "chosen": chosen[:3],
        "dataset": torch.where(takes_rejected(0, 4, config), rejected, chosen)[:3],
        "sample": reward(data.reference)[[0, 1, 0]],
    }
    want = pet_loss(best, others[reference], chosen, rejected, config, torch.tensor(data.margin))
    loss = trainer.compute_loss(model, {"row": torch.arange(4)})
    torch.testing.assert_close(loss, want.loss, rtol=1e-4, atol=1e-5)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentiment pairs: 6 prompts, 36 pairs."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", ("very",))


def _config(model: Path, data: Path, output: Path, *sets: str) -> TrainConfig:
    base = ["stage=pet", "mode=lora", "eval_fraction=0.34", "brme.num_heads=2", "pet.samples=4", "pet.max_new_tokens=5"]
    base += ["trunk.lr=0.01", "trunk.lora_rank=2", "trunk.batch_size=6", "trunk.max_steps=4", "trunk.save_every=2"]
    return load_config(TrainConfig, None, [*base, *sets], model=str(model), data=str(data), output=output)


@pytest.fixture(scope="module", params=["bt", "brme"])
def finished(
    request: pytest.FixtureRequest, tiny_chat_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = _config(tiny_chat_folder, pairs, folder, f"pet.start={request.param}", "aggregation=min")
    run_train(config, progress=False)
    return config


def _metrics(config: TrainConfig) -> dict[str, Any]:
    return dict(json.loads((config.output / "train.json").read_text()))


def test_the_stage_goes_on_from_the_one_before_and_lowers_the_objective(finished: TrainConfig) -> None:
    metrics, ensemble = _metrics(finished), finished.pet.start == "brme"
    pet = metrics["pet"]
    assert (pet["start"], pet["aggregation"]) == (finished.pet.start, "min" if ensemble else "mean")
    assert pet["after"]["loss"] < pet["before"]["loss"]
    assert {"worst, before PET", "worst, after PET"} <= set(metrics["accuracy"]) or not ensemble
    logged = {name for row in read_metrics(finished.output) for name in row}
    assert {"pet/loss", "pet/norm_mean", "pet/eval_gap", "pet/eval_accuracy"} <= logged
    assert (finished.output / "start").exists() == ensemble
    names = ("start" if ensemble else "stage1", "model")
    start, model = (EnsembleRewardModel.from_pretrained(finished.output / name) for name in names)
    assert not torch.equal(start.score.weight, model.score.weight)
    assert ensemble == torch.equal(start.score.scale, model.score.scale)  # of the single head: that of the start
    for name in ("up_proj", "down_proj"):
        one, other = (getattr(m.model.layers[0].mlp, name).weight for m in (start, model))
        assert not torch.equal(one, other)


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
    unit = float(model.score.scale) if model.score.num_heads == 1 else 1.0
    want = _metrics(finished)["pet"]["after"]["eval_gap"]
    assert sum(gaps) / len(gaps) * unit == pytest.approx(want, abs=2e-3)


def test_the_adapter_says_on_the_policys_trunk_what_the_model_says(finished: TrainConfig) -> None:
    folder, texts = finished.output / "adapter", ["very good", "very bad food", "day"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished.model), folder)
    split = EnsembleRewardModel.from_trunk(adapted.get_base_model().model, head=load_head(folder)).eval()
    merged = EnsembleRewardModel.from_pretrained(finished.output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, theirs = (Scorer(model, tokenizer, progress=False).score(texts) for model in (split, merged))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)


def test_a_killed_stage_goes_on_to_the_same_numbers_and_samples_nothing_twice(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.model_copy(update={"output": tmp_path / "run"})
    shutil.copytree(finished.output, config.output)
    for left in ("model", "adapter", "checkpoints/pet/checkpoint-4", "checkpoints/pet/adapter"):
        shutil.rmtree(config.output / left)
    (config.output / "train.json").unlink()
    file = config.output / "config.yaml"
    file.write_text(file.read_text().replace(str(finished.output), str(config.output)))
    monkeypatch.setattr("prudent.rlhf.sampling.stored.sample_batch", None)
    run_train(config, resume=True, progress=False)
    first, second = (load_file(c.output / "model" / "model.safetensors") for c in (finished, config))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert _metrics(finished)["pet"]["before"] == _metrics(config)["pet"]["before"]


def test_a_given_reward_model_is_the_start_and_leaves_no_adapter_for_another_trunk(
    finished: TrainConfig, tmp_path: Path
) -> None:
    given = finished.output / "model"
    config = _config(
        Path(finished.model), Path(finished.data), tmp_path / "run", f"pet.start={given}", "aggregation=min"
    )
    config = config.model_copy(update={"brme": BRMEConfig()})
    run_train(config, progress=False)
    before = _metrics(config)["pet"]["before"]
    assert before["gap"] == pytest.approx(_metrics(finished)["pet"]["after"]["gap"], abs=1e-3)
    assert not (config.output / "adapter").exists()
    start, model = (
        EnsembleRewardModel.from_pretrained(folder / "model") for folder in (finished.output, config.output)
    )
    assert not torch.equal(start.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mode=full", "mode: expected head or lora with stage pet"),
        ("pet.lr=0.1", "pet.lr: has no effect in mode lora: set trunk.lr"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tiny_chat_folder: Path, pairs: Path, tmp_path: Path, entry: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_train(_config(tiny_chat_folder, pairs, tmp_path / "run", entry), progress=False)
