"""TRL's RewardTrainer with BRME's loss and with the exact head: real steps, checked against our losses and fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer
from prudent.rlhf.reward.config import BRMEConfig
from prudent.rlhf.reward.convex import fit_ridge
from prudent.rlhf.reward.losses import brme, partition

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
training = pytest.importorskip("prudent.rlhf.doors.trl_training")

pytestmark = pytest.mark.slow
GOOD = ["is good", "is lovely", "was great", "is nice and calm"]
BAD = ["is bad", "is awful", "was sad", "is poor and loud"]
PROMPTS = ["the day", "my food", "the hotel", "people"]
ROWS = {
    "prompt": [f"{prompt} " for prompt in PROMPTS for _ in GOOD],
    "chosen": GOOD * 4,
    "rejected": BAD * 4,
}


@pytest.fixture
def make(tiny_chat_folder, tmp_path):
    """make(trainer class, data, **options) -> (trainer, model) with three heads on the tiny Llama."""

    def build(kind: Any, data: Any, steps: int = 1, **options: Any) -> tuple[Any, EnsembleRewardModel]:
        torch.manual_seed(0)
        model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3)
        arguments = trl.RewardConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=len(data),
            max_steps=steps,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
        tokenizer.chat_template = None  # texts, as the data are
        trainer = kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **options)
        return trainer, model

    return build


@pytest.fixture
def stage1(tiny_chat_folder) -> Scorer:
    torch.manual_seed(2)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=1, aggregation="mean")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    tokenizer.chat_template = None
    return Scorer(model, tokenizer, progress=False)


@pytest.fixture
def data(stage1) -> Any:
    return training.brme_columns(datasets.Dataset.from_dict(ROWS), stage1, 3, seed=5)


def scorer_of(model: EnsembleRewardModel, stage1: Scorer) -> Scorer:
    return Scorer(model, stage1.tokenizer, progress=False)


def side(name: str) -> list[dict[str, str]]:
    return [{"prompt": p, "response": r} for p, r in zip(ROWS["prompt"], ROWS[name], strict=True)]


def test_the_columns_are_stage_ones_probabilities_and_one_head_a_pair(data, stage1):
    chosen, rejected = (torch.tensor(stage1.score(side(name)).reward) for name in ("chosen", "rejected"))
    assert data["p_hat"] == pytest.approx(torch.sigmoid(chosen - rejected).tolist(), abs=1e-6)
    assert data["head"] == partition(16, 3, 5).tolist()


def test_the_loss_of_a_step_is_equation_8_and_the_heads_move(make, data, stage1):
    trainer, model = make(training.BRMETrainer, data)
    scorer = scorer_of(model, stage1)
    scores = scorer.score([*side("chosen"), *side("rejected")])
    p_hat, head = torch.tensor(data["p_hat"]), torch.tensor(data["head"])
    want = brme(scores.mean, scores.std, p_hat, head, BRMEConfig().alpha)
    before = model.score.weight.clone()
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(want.item(), rel=1e-4)
    assert log["std"] == pytest.approx(scores.std.mean().item(), rel=1e-4)
    assert 0 <= log["accuracy"] <= 1
    assert not torch.equal(model.score.weight, before)


def test_training_lowers_the_loss(make, data):
    trainer, _ = make(training.BRMETrainer, data, steps=12, alpha=2.0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_a_pair_trains_the_one_head_that_is_its_own(make, data):
    own = data.map(lambda row: {"head": 1})
    trainer, model = make(training.BRMETrainer, own)
    before = model.score.weight.clone()
    trainer.train()
    moved = (model.score.weight != before).any(dim=1).tolist()
    assert moved == [False, True, False, False, True, False]  # its mean and its std


def test_the_exact_head_is_the_one_that_prudent_train_would_fit(make, stage1):
    trainer, model = make(trl.RewardTrainer, datasets.Dataset.from_dict(ROWS))
    scorer = scorer_of(model, stage1)
    prompts = torch.arange(4).repeat_interleave(4)
    want = fit_ridge(scorer.features(side("chosen")), scorer.features(side("rejected")), prompts)
    fitted = training.fit_exact_head(trainer)
    assert fitted.l2 == want.l2
    assert fitted.held_out == "prompt"
    torch.testing.assert_close(model.score.weight, want.head.weight, rtol=1e-3, atol=1e-5)
    rewards = [torch.tensor(scorer_of(model, stage1).score(side(name)).reward) for name in ("chosen", "rejected")]
    assert (rewards[0] > rewards[1]).float().mean() > 0.9


def test_a_model_with_the_exact_head_is_saved_and_read_again(make, stage1, tmp_path):
    trainer, model = make(trl.RewardTrainer, datasets.Dataset.from_dict(ROWS))
    training.fit_exact_head(trainer, folds=2)
    want = scorer_of(model, stage1).score(side("chosen")).reward
    model.save_pretrained(tmp_path / "saved")
    again = EnsembleRewardModel.from_pretrained(tmp_path / "saved")
    assert scorer_of(again, stage1).score(side("chosen")).reward == pytest.approx(want, abs=1e-5)
