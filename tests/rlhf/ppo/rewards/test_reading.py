"""A reward on the policy's trunk equals `Scorer`'s reward of the sample's prompt and text, whatever the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prudent.engine import EnsembleHead, EnsembleRewardModel, Scorer
from prudent.engine.likelihood import special_ids
from prudent.rlhf.models.adapter import save_head
from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.policy.policy import Policy, RewardOnTrunk
from prudent.rlhf.ppo.rewards.reading import Reading
from prudent.rlhf.ppo.rewards.resolve import open_encoder
from prudent.rlhf.ppo.rewards.sources import Texts
from prudent.rlhf.ppo.score import score
from prudent.rlhf.sampling.prompts import Prompt
from prudent.rlhf.sampling.stored import Request, sample
from prudent.rlhf.sampling.tokens import Sampling
from prudent.rlhf.sampling.turn import Turn

from ...templates import ALIKE, DIFFERENT, PLAIN, a_tokenizer

TEMPLATES = {**ALIKE, **DIFFERENT, **{name: template for name, (template, _) in PLAIN.items()}}
ASKED = "the day?"
UPDATE = {"micro_tokens": 8192}
SAID = [" it was the one", "<think> the </think> it is", "two\nlines ", ""]


def a_trunk() -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=128, initializer_range=0.3, eos_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


def a_reward(folder: Path, trunk: Any, tokenizer: Any, taps: list[str] | None = None) -> Scorer:
    torch.manual_seed(4)
    options = {"logprob_skips": special_ids(tokenizer)}
    model = EnsembleRewardModel.from_trunk(trunk, num_heads=3, taps=taps, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Scorer(model.eval(), tokenizer, progress=False)


def drawn(turn: Turn, tokenizer: Any) -> Samples:
    """Each text stopped and cut, and one spelled letter by letter, as the tokeniser itself does not."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAID]
    ids.append([tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "the other"])
    end = tokenizer.eos_token_id
    rows = [(row, True) for row in ids] + [(row, False) for row in ids if row]
    responses = [[*row, end] if stopped else row for row, stopped in rows]
    return Samples([turn.prompt(ASKED)] * len(rows), responses, [s for _, s in rows], [0] * len(rows))


@pytest.mark.parametrize("taps", [None, ["last:2", "mean:1", "logprob"]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_reward_of_a_sample_is_the_scorers_of_its_prompt_and_text(
    template: str, packed: bool, taps: list[str] | None, tmp_path: Path
) -> None:
    tokenizer, trunk = a_tokenizer(TEMPLATES[template]), a_trunk()
    scorer = a_reward(tmp_path, trunk, tokenizer, taps)
    config = PPOConfig(model="m", prompts="p", output="o", reward={"source": "r"}, packed=packed, update=UPDATE)
    skips = scorer.model.config.logprob_skips or ()
    policy = Policy(config, a_trunk(), device="cpu", reward=RewardOnTrunk(scorer.model.score, taps=taps, skips=skips))
    turn = Turn(tokenizer, policy.model)
    texts = Texts(tokenizer, [Prompt(ASKED, turn.prompt(ASKED))])
    samples = drawn(turn, tokenizer)
    reading = Reading(open_encoder(tmp_path, policy.model), texts)
    experience = score(policy, None, samples, config, closing=turn.closing, reading=reading)
    wanted = scorer.score([{"prompt": ASKED, "response": text} for text in texts.responses_of(samples)])
    torch.testing.assert_close(experience.reward, torch.tensor(wanted.reward), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experience.head_mean, wanted.mean, rtol=1e-4, atol=1e-4)
    again = reading.others(samples, turn.closing)
    if template in ALIKE:
        # only the text that is spelled otherwise, and one that ends with the blank that the template writes itself
        assert len(again) == 2 + bool(turn.ending.lead)
    elif template in DIFFERENT:
        assert len(again) > 3


@pytest.mark.parametrize("template", [*DIFFERENT, "chatml", "alpaca"])
def test_stored_features_are_those_that_the_scorer_reads(template: str, tmp_path: Path) -> None:
    tokenizer, trunk = a_tokenizer(TEMPLATES[template]), a_trunk()
    taps = ["last:2", "mean:1", "logprob"]
    model = EnsembleRewardModel.from_trunk(trunk, taps=taps, logprob_skips=special_ids(tokenizer))
    scorer = Scorer(model, tokenizer, progress=False)
    requests = [Request(ASKED, 6), Request("two", 6)]
    rollouts = sample(trunk, tokenizer, requests, tmp_path, Sampling(10), taps=taps, progress=False)
    for rollout in rollouts:
        items = [{"prompt": rollout.prompt, "response": text} for text in rollout.responses]
        torch.testing.assert_close(rollout.features, scorer.features(items), rtol=1e-4, atol=1e-4)


def test_a_text_that_the_template_refuses_has_no_reward_and_spoils_no_other(tmp_path: Path) -> None:
    refuses = ALIKE["chatml"] + "{% if 'other' in messages[-1].content %}{{ raise_exception('no other') }}{% endif %}"
    tokenizer, trunk = a_tokenizer(refuses), a_trunk()
    scorer = a_reward(tmp_path, trunk, tokenizer)
    config = PPOConfig(model="m", prompts="p", output="o", reward={"source": "r"}, update=UPDATE)
    policy = Policy(config, a_trunk(), device="cpu", reward=RewardOnTrunk(scorer.model.score))
    turn = Turn(tokenizer, policy.model)
    samples = drawn(turn, tokenizer)
    texts = Texts(tokenizer, [Prompt(ASKED, turn.prompt(ASKED))])
    reading = Reading(open_encoder(tmp_path, policy.model), texts)
    experience = score(policy, None, samples, config, closing=turn.closing, reading=reading)
    assert experience.reward.isnan().tolist() == ["other" in text for text in texts.responses_of(samples)]
    assert experience.ref_logprob.isfinite().all()


def test_an_adapter_reads_at_most_the_length_that_it_was_trained_on(tmp_path: Path) -> None:
    tokenizer, trunk = a_tokenizer(ALIKE["chatml"]), a_trunk()
    tokenizer.save_pretrained(tmp_path)
    save_head(EnsembleHead(32, 2), tmp_path, max_score_length=5)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    encoder = open_encoder(tmp_path, trunk)
    assert len(encoder.encode({"prompt": ASKED, "response": "it was"})) == 5
