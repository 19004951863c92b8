"""Training the trunk through transformers.Trainer: the losses, LoRA and full, accumulation, checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from prudent.engine import EnsembleRewardModel
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.log import RunLog, read_metrics
from prudent.rlhf.reward.fit import BradleyTerryConfig, BRMEConfig, FitConfig
from prudent.rlhf.reward.losses import bradley_terry, brme, bsr
from prudent.rlhf.reward.train import TrainConfig, run_train
from prudent.rlhf.reward.trunk import PairTrainer, TrunkConfig, collate, last_checkpoint, train_trunk


def _rows(count: int, stage: str = "bt", heads: int = 1) -> list[dict[str, Any]]:
    """Sequences of word ids; the chosen ones say a good word (17..22), the rejected a bad one."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        prefix = torch.randint(4, 14, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
        row = {"chosen": [*prefix, 17 + i % 6], "rejected": [*prefix, 28 + i % 6, 4], "head": i % heads}
        rows.append({**row, "p_hat": 0.9 if stage == "brme" else None, "margin": None})
    return rows


def _model(folder: Path, heads: int = 1) -> EnsembleRewardModel:
    torch.manual_seed(0)
    aggregation = "mean" if heads == 1 else "tradeoff:0.4"
    return EnsembleRewardModel.from_trunk(
        str(folder), num_heads=heads, aggregation=aggregation, dtype=torch.float32
    ).eval()


def _trainer(folder: Path, output: Path, losses: FitConfig, rows: list[dict[str, Any]], **options: Any) -> PairTrainer:
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        max_grad_norm=0.0,
        **options,
    )
    return PairTrainer(
        model=_model(folder, losses.num_heads),
        args=arguments,
        data_collator=collate,
        train_dataset=rows,
        losses=losses,
        run_log=None,
    )


def test_a_batch_is_chosen_then_rejected_right_padded() -> None:
    batch = collate(
        [
            {"chosen": [5], "rejected": [6, 7, 8], "head": 2, "p_hat": 0.25, "margin": None},
            {"chosen": [9, 9], "rejected": [1], "head": 0, "p_hat": 0.5, "margin": None},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 0, 0], [9, 9, 0], [6, 7, 8], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["head"].tolist() == [2, 0]
    assert batch["p_hat"].tolist() == [0.25, 0.5]
    assert "margin" not in batch


@pytest.mark.parametrize("stage", ["bt", "brme"])
def test_the_trainers_loss_is_the_stages_loss(tiny_chat_folder: Path, tmp_path: Path, stage: str) -> None:
    losses: FitConfig = BradleyTerryConfig(bsr=0.5) if stage == "bt" else BRMEConfig(num_heads=3, bsr=0.5, alpha=2.0)
    trainer = _trainer(tiny_chat_folder, tmp_path, losses, _rows(4, stage, losses.num_heads))
    batch = collate(_rows(4, stage, losses.num_heads))
    loss, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    reward = out.mean.mean(dim=1)
    if stage == "bt":
        expected = bradley_terry(reward[:4], reward[4:])
    else:
        expected = brme(out.mean, out.std, batch["p_hat"], batch["head"], 2.0)
    assert loss.item() == pytest.approx((expected + bsr(reward.sum(), 4, 0.5)).item(), rel=1e-6)


def _step_gradient(folder: Path, output: Path, losses: FitConfig, micro: int) -> torch.Tensor:
    """The head's gradient of one optimizer step over 8 pairs in micro-batches of `micro`."""
    trainer = _trainer(
        folder,
        output,
        losses,
        _rows(8),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    before = trainer.model.score.weight.detach().clone()
    trainer.train()
    return before - trainer.model.score.weight.detach()


def test_global_bsr_over_accumulated_micro_batches_is_that_of_one_batch(tiny_chat_folder: Path, tmp_path: Path) -> None:
    everywhere = BradleyTerryConfig(bsr=0.3, bsr_scope="global")
    whole = _step_gradient(tiny_chat_folder, tmp_path, BradleyTerryConfig(bsr=0.3), 8)
    parts = _step_gradient(tiny_chat_folder, tmp_path, everywhere, 2)
    local = _step_gradient(tiny_chat_folder, tmp_path, BradleyTerryConfig(bsr=0.3), 2)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
    assert (local - whole).norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_trunk_learns_and_comes_back_plain(tiny_chat_folder: Path, tmp_path: Path, mode: Any) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    config = TrunkConfig(
        lr=5e-3, batch_size=4, max_steps=30, save_every=15, lora_rank=4, gradient_checkpointing=mode == "lora"
    )
    base = _model(tiny_chat_folder)
    with RunLog(tmp_path) as log:
        model = train_trunk(
            _model(tiny_chat_folder),
            _rows(40),
            _rows(10),
            BradleyTerryConfig(),
            config,
            mode,
            tmp_path / "checkpoints",
            log=log,
            progress=False,
        )
    assert type(model) is EnsembleRewardModel
    assert set(model.state_dict()) == set(base.state_dict())
    assert not torch.equal(model.score.weight, base.score.weight)
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.model.state_dict()[name], base.model.state_dict()[name])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "bt/eval_accuracy_mean" in row] == [15, 30]
    assert [row for row in rows if "bt/eval_accuracy_mean" in row][-1]["bt/eval_accuracy_mean"] > 0.9
    trained = [row for row in rows if "bt/loss" in row]
    assert len(trained) == 30
    assert {"bt/norm_mean", "bt/norm_std", "bt/norm_gap_mean", "bt/norm_gap_std", "bt/learning_rate"} <= set(trained[0])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_to_the_same_numbers(
    tiny_chat_folder: Path, tmp_path: Path, mode: Any
) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    losses = BRMEConfig(num_heads=2, noise="sampled")
    rows = _rows(24, "brme", 2)
    config = TrunkConfig(lr=5e-3, batch_size=4, accumulation=2, epochs=4, save_every=4, lora_rank=4)

    def train(folder: str, resume: bool) -> EnsembleRewardModel:
        return train_trunk(
            _model(tiny_chat_folder, 2),
            rows,
            rows[:4],
            losses,
            config,
            mode,
            tmp_path / folder,
            resume=resume,
            progress=False,
        )

    whole = train("whole", False)
    # what a kill leaves: an older whole checkpoint, and a newer one cut short
    assert last_checkpoint(tmp_path / "whole") == str(tmp_path / "whole" / "checkpoint-12")
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    shutil.copytree(tmp_path / "whole" / "checkpoint-12", tmp_path / "killed" / "checkpoint-12")
    cut = tmp_path / "killed" / "checkpoint-12" / ("trainer_state.json" if mode == "full" else "optimizer.pt")
    cut.write_bytes(cut.read_bytes()[:-20])
    resumed = train("killed", True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_checkpoint_with_a_file_that_was_cut_is_passed_over(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (8, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save({"a": torch.zeros(99)}, folder / "optimizer.pt")
        save_file({"a": torch.zeros(99)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    file = tmp_path / "checkpoint-12" / name
    file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    if name != "trainer_state.json":  # which the Trainer writes last: without it a kill is the likely reason
        assert f"{file} is incomplete: its checkpoint is skipped" in caplog.text


def test_a_write_of_the_trainers_that_fails_is_one_sentence(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(PairTrainer, "train", full)
    with pytest.raises(OSError, match=r"could not be written \(is the disk full\?\)") as raised:
        train_trunk(
            _model(tiny_chat_folder),
            _rows(8),
            [],
            BradleyTerryConfig(),
            TrunkConfig(),
            "full",
            tmp_path,
            progress=False,
        )
    assert raised.value.filename == str(tmp_path)


def test_a_loss_that_is_not_finite_stops_training_by_name(tiny_chat_folder: Path, tmp_path: Path) -> None:
    rows = _rows(8)
    for row in rows:
        row["margin"] = float("nan") if row is rows[5] else 0.0
    with pytest.raises(ValueError, match=r"bt: training stopped: the loss is not finite at step .*a lower trunk\.lr"):
        train_trunk(
            _model(tiny_chat_folder),
            rows,
            [],
            BradleyTerryConfig(),
            TrunkConfig(batch_size=1),
            "full",
            tmp_path,
            progress=False,
        )


def test_a_whole_run_in_mode_lora_trains_both_stages(tiny_chat_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = tmp_path / "pairs.jsonl"
    rows = [
        f'{{"prompt": "the {thing}", "chosen": "was {good}", "rejected": "was {bad}"}}\n'
        for thing in ("day", "food", "hotel", "film")
        for good, bad in (("good", "bad"), ("great", "awful"), ("happy", "sad"), ("nice", "ugly"))
    ]
    file.write_text("".join(rows))
    sets = ["trunk.max_steps=6", "trunk.lr=0.01", "trunk.batch_size=4", "eval_fraction=0.25", "brme.num_heads=2"]
    config = load_config(
        TrainConfig, None, sets, model=str(tiny_chat_folder), data=str(file), output=tmp_path / "run", mode="lora"
    )
    result = run_train(config, progress=False)
    assert result.metrics["mode"] == "lora"
    assert set(result.metrics["accuracy"]) == {
        "single head (stage 1)",
        "nominal",
        "mean of heads",
        "worst",
        "tradeoff:0.4",
    }
    names = {path.name for path in config.output.iterdir()}
    assert {"stage1", "model", "checkpoints", "features", "train.json"} <= names
    single = load_file(config.output / "stage1" / "model.safetensors")
    final = load_file(config.output / "model" / "model.safetensors")
    assert not any("lora" in name for name in final)
    trunk = next(name for name in final if name.endswith("up_proj.weight"))
    assert not torch.equal(single[trunk], final[trunk])
    model = EnsembleRewardModel.from_pretrained(config.output / "model")
    assert model.score.num_heads == 2
    assert (model.score.scale != 1.0).all()
    assert run_train(config, resume=True, progress=False).finished_before


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_stage_2_may_go_on_from_stage_1s_trunk(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"prompt": "{p}", "chosen": "good", "rejected": "bad"}}\n' for p in ("day", "food")))
    sets = ["trunk.max_steps=2", "trunk.lr=0.05", "trunk.batch_size=2", "eval_fraction=0", "brme.num_heads=2"]
    begun: list[dict[str, torch.Tensor]] = []

    class Recorded(PairTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            begun.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr("prudent.rlhf.reward.trunk.PairTrainer", Recorded)
    for start in ("base", "stage1"):
        folder = tmp_path / start
        config = load_config(
            TrainConfig, None, [*sets, f"trunk.stage2_from={start}"], model=str(tiny_chat_folder), data=str(file),
            output=folder, mode=mode,
        )  # fmt: skip
        run_train(config, progress=False)
        first, second = begun[-2:]
        trained = load_file(folder / "stage1" / "model.safetensors")
        if mode == "full":
            name = "model.layers.0.mlp.up_proj.weight"
            wanted = trained[name] if start == "stage1" else first[name]
        else:
            name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
            saved = load_file(folder / "checkpoints" / "bt" / "adapter" / "adapter_model.safetensors")
            wanted = saved[name.replace(".default", "")] if start == "stage1" else torch.zeros_like(first[name])
        assert torch.equal(second[name], wanted)
        assert start == "base" or not torch.equal(second[name], first[name])
