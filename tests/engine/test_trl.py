"""The unchanged model in TRL's trainers: one real step of each, on the CPU and without a network."""

from __future__ import annotations

import pytest
import torch
import transformers

from prudent.engine import EnsembleRewardModel

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ONE_STEP = {
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
TRAINERS = {"grpo": ("GRPOTrainer", "GRPOConfig"), "rloo": ("RLOOTrainer", "RLOOConfig")}


@pytest.fixture
def policy(tiny_config, make_tokenizer, tmp_path):
    """A tiny Llama and its tokeniser in a folder: RLOO reads its reference model from there."""
    torch.manual_seed(0)
    folder = tmp_path / "policy"
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    model.save_pretrained(folder)
    make_tokenizer(chat=True).save_pretrained(folder)
    return folder


def make_reward_model(trunk):
    """Heads large enough to tell random completions apart."""
    torch.manual_seed(1)
    model = EnsembleRewardModel.from_trunk(trunk, num_heads=3, aggregation="tradeoff:0.4")
    with torch.no_grad():
        model.score.weight *= 20
    return model


def make_trainer(which, policy, tmp_path, reward, dataset, **options):
    trainer, config = (getattr(trl, name) for name in TRAINERS[which])
    generation = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 4}
    arguments = config(output_dir=str(tmp_path / "run"), **generation, **ONE_STEP)
    return trainer(model=policy, args=arguments, reward_funcs=reward, train_dataset=dataset, **options)


def load_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain_prompts():
    return datasets.Dataset.from_dict({"prompt": ["Once", "Why is", "The sky", "Tell me"]})


def chat_prompts():
    rows = [[{"role": "user", "content": text}] for text in ("Once", "Why is", "The sky", "Tell me")]
    return datasets.Dataset.from_dict({"prompt": rows})


def reward_statistics(trainer):
    (log,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    return log["reward"], log["reward_std"]


@pytest.mark.parametrize("which", TRAINERS)
@pytest.mark.parametrize("prompts", [plain_prompts, chat_prompts])
def test_one_step_with_the_model_in_memory(which, prompts, policy, tmp_path):
    reward_model = make_reward_model(str(policy))
    weights = {name: value.clone() for name, value in reward_model.state_dict().items()}
    trainer = make_trainer(
        which, str(policy), tmp_path, reward_model, prompts(), reward_processing_classes=load_tokenizer(policy)
    )
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    mean, std = reward_statistics(trainer)
    assert abs(mean) < 100
    assert std > 0.01  # the four completions of a prompt are told apart
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    for name, value in reward_model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("which", TRAINERS)
def test_one_step_with_the_path_of_a_saved_model(which, policy, tmp_path):
    folder = tmp_path / "reward"
    make_reward_model(str(policy)).save_pretrained(folder)
    load_tokenizer(policy).save_pretrained(folder)
    trainer = make_trainer(which, str(policy), tmp_path, str(folder), plain_prompts())
    assert type(trainer.reward_funcs[0]) is EnsembleRewardModel
    trainer.train()
    assert reward_statistics(trainer)[1] > 0.01
    assert "rewards/reward/mean" in trainer.state.log_history[0]


def test_the_reward_that_trl_computes_is_the_models(policy, tmp_path, monkeypatch):
    reward_model = make_reward_model(str(policy))
    seen = []
    forward = EnsembleRewardModel.forward

    def spy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append((kwargs["input_ids"].clone(), kwargs["attention_mask"].clone(), out.logits[:, 0].clone()))
        return out

    monkeypatch.setattr(EnsembleRewardModel, "forward", spy)
    trainer = make_trainer(
        "grpo", str(policy), tmp_path, reward_model, plain_prompts(), reward_processing_classes=load_tokenizer(policy)
    )
    trainer.train()
    monkeypatch.undo()
    ids, mask, rewards = seen[0]
    assert len(seen) == 1
    assert reward_statistics(trainer)[0] == pytest.approx(rewards.mean().item(), abs=1e-5)
    with torch.no_grad():
        alone = [reward_model(row[None, : int(m.sum())]).logits.item() for row, m in zip(ids, mask, strict=True)]
    assert rewards.tolist() == pytest.approx(alone, abs=1e-4)


def test_a_trunk_shared_with_the_policy_follows_the_policy(policy, tmp_path):
    """One trunk in memory: the policy that TRL trains, with the reward heads on it."""
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(policy)
    tokenizer = load_tokenizer(policy)
    reward_model = make_reward_model(causal_lm)
    options = {"processing_class": tokenizer, "reward_processing_classes": tokenizer}
    trainer = make_trainer("grpo", causal_lm, tmp_path, reward_model, plain_prompts(), **options)
    before = causal_lm.model.embed_tokens.weight.clone()
    trainer.train()
    assert reward_model.model is causal_lm.model
    assert not torch.equal(reward_model.model.embed_tokens.weight, before)


def test_reward_trainer_fits_the_heads_of_the_model(policy, tmp_path):
    """TRL's own preference training takes the model too: Bradley-Terry on the aggregated reward."""
    model = make_reward_model(str(policy))
    pairs = datasets.Dataset.from_dict({"chosen": ["good", "good good"], "rejected": ["bad", "bad bad"]})
    arguments = trl.RewardConfig(output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, **ONE_STEP)
    tokenizer = load_tokenizer(policy)
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    before = model.score.weight.clone()
    trainer.train()
    assert not torch.equal(model.score.weight, before)
