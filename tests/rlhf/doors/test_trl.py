"""`trl_reward`: the rewards of `Scorer`, truncation from the ids, the log, and what it refuses."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import prudent
from prudent import Scorer

STOP = 3  # <|end|>, the tokeniser's EOS
PROMPTS = ["the day", "my food", "the day", "the hotel"]
TEXTS = ["is good", "is bad and sad", "was fine", "very long"]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS]
ANSWERS = [[{"role": "assistant", "content": text}] for text in TEXTS]
LOGGED = {"std", "gap", "distance", "foreign", "truncated", "missing", "shortened"}


class Log:
    """The trainer's two hooks, recorded."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.columns: dict[str, list[Any]] = {}

    def hooks(self) -> dict[str, Any]:
        return {"log_metric": self.metrics.__setitem__, "log_extra": self.columns.__setitem__}


@pytest.fixture
def ids(scorer: Scorer) -> list[list[int]]:
    """The completions' ids; the last one was cut off."""
    rows = [scorer.tokenizer(text)["input_ids"] for text in TEXTS]
    return [*([*row, STOP] for row in rows[:-1]), rows[-1]]


def expected(scorer: Scorer, complete: tuple[bool, ...] = (True, True, True, False), **options: Any) -> list[float]:
    items = [
        {"prompt": prompt, "response": text, "complete": whole}
        for prompt, text, whole in zip(PROMPTS, TEXTS, complete, strict=True)
    ]
    rewards = scorer.score(items, **options).reward
    assert len({round(r, 6) for r in rewards}) == len(rewards)  # told apart
    return rewards


def test_the_name_is_handed_on_without_transformers():
    code = (
        "import sys, prudent; print('transformers' in sys.modules, 'trl_reward' in prudent.__all__); "
        "prudent.trl_reward; print('trl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
    assert prudent.trl_reward.__module__ == "prudent.rlhf.doors.trl"


@pytest.mark.parametrize(("prompts", "completions"), [(PROMPTS, TEXTS), (CHATS, ANSWERS)])
def test_the_rewards_are_the_scorers_for_texts_and_for_messages(reward_folder, scorer, ids, prompts, completions):
    reward = prudent.trl_reward(reward_folder)
    found = reward(prompts=prompts, completions=completions, completion_ids=ids, solution=["x"] * 4, trainer_state=None)
    assert found == pytest.approx(expected(scorer), abs=1e-6)
    assert all(type(value) is float for value in found)


def test_a_completion_without_a_stop_token_is_scored_as_cut_off(reward_folder, scorer, ids):
    reward = prudent.trl_reward(reward_folder)
    whole = [*ids[:-1], [*ids[-1], STOP]]
    found = reward(prompts=PROMPTS, completions=TEXTS, completion_ids=whole)
    assert found == pytest.approx(expected(scorer, (True,) * 4), abs=1e-6)
    assert abs(found[-1] - expected(scorer)[-1]) > 1e-3


def test_uncertainty_goes_to_the_trainers_log(reward_folder, scorer, ids):
    reward, log = prudent.trl_reward(reward_folder, name="rm"), Log()
    reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids, **log.hooks())
    assert set(log.metrics) == {f"rm/{name}" for name in LOGGED}
    assert set(log.columns) == {"rm_std", "rm_gap", "rm_distance"}
    items = [{"prompt": p, "response": t, "complete": t != TEXTS[-1]} for p, t in zip(PROMPTS, TEXTS, strict=True)]
    scores = scorer.score(items)
    assert log.columns["rm_std"] == pytest.approx(scores.std.mean(1).tolist(), rel=1e-5)
    gaps = [n - w for n, w in zip(scores.nominal, scores.worst, strict=True)]
    assert log.columns["rm_gap"] == pytest.approx(gaps, abs=1e-5)
    assert log.columns["rm_distance"] == pytest.approx(scores.distance.tolist(), rel=1e-5)
    assert log.metrics["rm/std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert log.metrics["rm/distance"] == pytest.approx(scores.distance.mean().item(), rel=1e-5)
    assert log.metrics["rm/foreign"] == (scores.distance > 1).float().mean().item()
    assert log.metrics["rm/truncated"] == 0.25
    assert log.metrics["rm/missing"] == 0
    assert reward.last == log.metrics
    assert reward.__name__ == "rm"


def test_aggregation_and_trust_change_the_reward_as_they_do_in_the_scorer(reward_folder, scorer, ids):
    given = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": ids}
    lower = prudent.trl_reward(reward_folder, aggregation="lcb:1", trust=2.0)(**given)
    assert lower == pytest.approx(expected(scorer, aggregation="lcb:1,trust=2"), abs=1e-5)
    own = prudent.trl_reward(reward_folder, trust=0.5)(**given)
    assert own == pytest.approx(expected(scorer, aggregation="tradeoff:0.4,trust=0.5"), abs=1e-5)


def test_completions_too_long_for_the_reward_model_are_counted(scorer, ids):
    short = Scorer(scorer.model, scorer.tokenizer, max_length=9, progress=False)
    lengths = [len(scorer.encode({"prompt": p, "response": t})) for p, t in zip(PROMPTS, TEXTS, strict=True)]
    assert [length > 9 for length in lengths] == [False, True, False, False]
    reward = prudent.trl_reward(short)
    reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids)
    assert reward.last["prudent/shortened"] == 0.25


def test_a_reward_that_is_not_finite_is_none_and_is_counted(scorer, reward_folder, ids, monkeypatch):
    broken = prudent.EnsembleRewardModel.from_pretrained(reward_folder)
    embedding = broken.get_input_embeddings().weight
    with torch.no_grad():
        embedding[scorer.tokenizer.convert_tokens_to_ids("sad")] = float("nan")
    reward, log = prudent.trl_reward(Scorer(broken, scorer.tokenizer, progress=False)), Log()
    found = reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids, **log.hooks())
    assert [value is None for value in found] == [False, True, False, False]
    assert log.metrics["prudent/missing"] == 0.25
    assert log.columns["prudent_std"][1] is None
    assert all(value == value for value in log.metrics.values())  # means leave it out


def test_a_completion_that_cannot_be_read_is_none_and_the_others_have_their_rewards(reward_folder, scorer, ids, capsys):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    completions = [*ANSWERS[:3], [call]]
    found = prudent.trl_reward(reward_folder)(prompts=CHATS, completions=completions, completion_ids=ids)
    assert found[:3] == pytest.approx(expected(scorer)[:3], abs=1e-6)
    assert found[3] is None
    assert "cannot be read" in capsys.readouterr().err


def test_if_none_can_be_read_the_first_error_is_raised(reward_folder, ids):
    with pytest.raises(ValueError, match="item 0: response: expected messages"):
        prudent.trl_reward(reward_folder)(prompts=CHATS, completions=[[{"role": "a"}]] * 4, completion_ids=ids)


def test_ids_of_another_tokeniser_are_refused_until_the_policy_is_named(reward_folder, scorer, make_bytes, tmp_path):
    other = make_bytes()
    ids = [[*other(text)["input_ids"], other.eos_token_id] for text in TEXTS]
    ids[-1].pop()
    given = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": ids}
    with pytest.raises(ValueError, match="policy: expected the policy's tokeniser"):
        prudent.trl_reward(reward_folder)(**given)
    other.save_pretrained(tmp_path)
    for policy in (other, tmp_path, str(tmp_path)):
        assert prudent.trl_reward(reward_folder, policy=policy)(**given) == pytest.approx(expected(scorer), abs=1e-6)


@pytest.fixture
def make_bytes():
    """A tokeniser of single bytes, whose ids mean other texts than the reward model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build():
        vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
        tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>")

    return build


def test_bfloat16_autocast_of_the_trainer_does_not_reach_the_reward(reward_folder, scorer, ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prudent.trl_reward(reward_folder)(prompts=PROMPTS, completions=TEXTS, completion_ids=ids)
    assert found == pytest.approx(expected(scorer), abs=1e-6)


def test_weights_are_read_whole_where_zero_3_trains(reward_folder, scorer, ids):
    from transformers.integrations import deepspeed

    class Zero3:
        config: dict[str, Any] = {}  # noqa: RUF012

        def is_zero3(self) -> bool:
            return True

    held = Zero3()
    deepspeed.set_hf_deepspeed_config(held)
    try:
        found = prudent.trl_reward(reward_folder)(prompts=PROMPTS, completions=TEXTS, completion_ids=ids)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert found == pytest.approx(expected(scorer), abs=1e-6)


def test_ms_swift_calls_it_with_completions_first_and_whole_conversations(reward_folder, scorer):
    messages = [[*chat, *answer] for chat, answer in zip(CHATS, ANSWERS, strict=True)]
    cut = [False, False, False, True]
    reward = prudent.trl_reward(reward_folder)
    found = reward(TEXTS, messages=messages, is_truncated=cut, response_token_ids=[[]] * 4, trainer_state=None)
    assert found == pytest.approx(expected(scorer), abs=1e-6)
    assert reward.last["prudent/truncated"] == 0.25  # for a trainer without log_metric


def test_from_a_folder_it_is_pickled_as_the_folders_name(reward_folder, scorer, ids):
    reward = prudent.trl_reward(reward_folder)
    reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids)
    sent = pickle.dumps(reward)
    assert len(sent) < 20_000  # no weights
    assert pickle.loads(sent)(prompts=PROMPTS, completions=TEXTS, completion_ids=ids) == reward(
        prompts=PROMPTS, completions=TEXTS, completion_ids=ids
    )
    with pytest.raises(TypeError, match="got a Scorer in memory"):
        pickle.dumps(prudent.trl_reward(scorer))


def test_from_a_server_it_is_awaited_and_gives_the_same(server, reward_folder, scorer, ids):
    reward, log = prudent.trl_reward(server, aggregation="lcb:1", trust=2.0, policy=reward_folder), Log()
    given = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": ids}
    for one in (reward, pickle.loads(pickle.dumps(reward))):
        assert inspect.iscoroutinefunction(one)  # what TRL 1.0 asks
        assert inspect.iscoroutinefunction(one.__call__)  # what later releases ask too
        found = asyncio.run(one(**given, **log.hooks()))
        assert found == pytest.approx(expected(scorer, aggregation="lcb:1,trust=2"), abs=1e-5)
    assert set(log.metrics) == {f"prudent/{name}" for name in LOGGED}
    assert not inspect.iscoroutinefunction(prudent.trl_reward(reward_folder))


def test_a_server_that_does_not_answer_is_an_error_and_no_reward(reward_folder, ids, monkeypatch):
    from prudent.rlhf.doors import http

    monkeypatch.setattr(http, "WAITS", (0.01,))
    reward = prudent.trl_reward("http://127.0.0.1:9", policy=reward_folder)
    with pytest.raises(ValueError, match="expected rewards, got none in 2 tries"):
        asyncio.run(reward(prompts=PROMPTS, completions=TEXTS, completion_ids=ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "lcb:1,centre=group"}, "expected centre=none, because the trainer centres rewards"),
        ({"aggregation": "head:3"}, "expected a head below 3"),
        ({"aggregation": "best"}, "aggregation"),
        ({"trust": -1.0}, "aggregation: trust"),
    ],
)
def test_an_aggregation_that_cannot_be_used_is_refused_before_any_weight_is_read(reward_folder, options, message):
    with pytest.raises(ValueError, match=message):
        prudent.trl_reward(reward_folder, **options)


def test_a_price_of_distance_needs_a_trust_region(tiny_chat_folder, tmp_path):
    model = prudent.EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a model with a trust region for 'tradeoff:0\.4,trust=1'"):
        prudent.trl_reward(tmp_path, trust=1.0)


def test_what_names_no_model_is_refused(tmp_path: Path, tiny_chat_folder):
    with pytest.raises(ValueError, match="model: "):
        prudent.trl_reward(tmp_path)
    with pytest.raises(ValueError, match="policy: expected the policy's tokeniser, or its folder"):
        prudent.trl_reward("http://127.0.0.1:8000")
    with pytest.raises(ValueError, match="model_or_url: expected a URL"):
        prudent.trl_reward("http://", policy=tiny_chat_folder)
    with pytest.raises(ValueError, match="aggregation: expected one beside trust"):
        prudent.trl_reward("http://127.0.0.1:8000", trust=1.0, policy=AutoTokenizer.from_pretrained(tiny_chat_folder))
