"""Rewards from a function or a lexicon: their arguments, and how their results are used."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.ppo.batch import Samples
from prudent.rlhf.ppo.rewards.function import CallableReward
from prudent.rlhf.ppo.rewards.open import open_gold
from prudent.rlhf.ppo.rewards.sources import Texts
from prudent.rlhf.sampling.prompts import Prompt


def _open(source: str, tokenizer: Any, prompts: list[Prompt]) -> CallableReward:
    return CallableReward("reward.source", source, Texts(tokenizer, prompts))


def _function(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(f"def score(prompts, responses):\n    {body}\n", "utf-8")
    return f"{tmp_path / 'mine.py'}:score"


def test_a_function_gets_prompts_and_responses(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    body = "return [len(p) + 100 * (r == 'good food') + 200 * (r == '') for p, r in zip(prompts, responses)]"
    rewards = _open(_function(tmp_path, body), tokenizer, prompts)(samples)
    assert rewards.reward.tolist() == [106.0, 6.0, 212.0]
    assert set(rewards[1:]) == {None}


def test_a_module_beside_the_command_is_found(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_of_mine.py").write_text("import numpy\ndef f(p, r): return numpy.ones(len(p))", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert open_gold("reward_of_mine:f", Texts(tokenizer, prompts))(samples).reward.tolist() == [1.0, 1.0, 1.0]


RESPONSES, PROMPTS = [9.0, 9.0, 0.0], [6.0, 6.0, 12.0]  # lengths of the samples' texts


@pytest.mark.parametrize(
    ("signature", "counted", "expected"),
    [
        ("prompts, responses", "responses", RESPONSES),
        ("p, r", "r", RESPONSES),
        ("question, answer, weight=2", "answer", RESPONSES),
        ("p, r=None", "r", RESPONSES),
        ("*args", "args[1]", RESPONSES),
        ("*args, **kwargs", "args[1]", RESPONSES),
        ("responses, prompts", "responses", RESPONSES),
        ("completions, prompts", "prompts", PROMPTS),
        ("completions, prompts=None, **kwargs", "completions", RESPONSES),
        ("completions, prompts=None, **kwargs", "prompts", PROMPTS),
        ("completion, prompt, /", "completion", RESPONSES),
        ("*, response", "response", RESPONSES),
        ("completions, completion_ids=None", "completions", RESPONSES),
        ("completions, **kwargs", "kwargs['prompts']", PROMPTS),
        ("**kwargs", "kwargs['completions']", RESPONSES),
    ],
)
def test_arguments_get_what_their_names_say_in_any_order_and_other_names_go_by_position(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, signature: str, counted: str, expected: Any
) -> None:
    body = f"def score({signature}):\n    return [float(len(text)) for text in {counted}]\n"
    (tmp_path / "mine.py").write_text(body, "utf-8")
    assert _open(f"{tmp_path / 'mine.py'}:score", tokenizer, prompts)(samples).reward.tolist() == expected


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        ("completions, answer", "PPO has no value for answer"),
        ("prompts, answers", "PPO has no value for answers"),
        ("prompts, responses, labels, **kwargs", "PPO has no value for labels"),
        ("queries, prompts, labels", "PPO has no value for queries"),
        ("solution_str, ground_truth", "PPO has no value for solution_str"),
        ("data_source, solution_str, ground_truth, extra_info=None", "PPO has no value for data_source"),
        ("texts", "PPO has no value for texts"),
        ("outputs, inputs", "PPO has no value for outputs"),
        ("a, question", "PPO has no value for a"),
        ("text, label", "PPO has no value for text"),
        ("outputs=None, inputs=None", "it takes no responses"),
        ("p, r, *, reference", "PPO has no value for p"),
        ("prompts", "it takes no responses"),
        ("", "it takes no responses"),
    ],
)
def test_a_function_that_needs_what_ppo_does_not_give_is_refused_before_the_first_step(
    tokenizer: Any, prompts: list[Prompt], tmp_path: Path, signature: str, reason: str
) -> None:
    (tmp_path / "mine.py").write_text(f"def score({signature}): ...\n", "utf-8")
    expected = r"^reward.source: .*mine.py:score: expected a function of prompts and responses \(or completions\), got "
    with pytest.raises(ValueError, match=expected + re.escape(f"({signature}): {reason}")):
        _open(f"{tmp_path / 'mine.py'}:score", tokenizer, prompts)


def test_true_is_1_and_false_is_0(tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path) -> None:
    for body in ("return [r != '' for r in responses]", "import numpy; return numpy.array(responses) != ''"):
        rewards = _open(_function(tmp_path, body), tokenizer, prompts)(samples)
        assert rewards.reward.tolist() == [1, 1, 0]


@pytest.mark.parametrize("value", ["None", "float('nan')", "float('inf')", "10**400"])
def test_what_is_no_finite_number_is_nan(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, value: str
) -> None:
    rewards = _open(_function(tmp_path, f"return [{value}, {value}, 2]"), tokenizer, prompts)(samples)
    assert [math.isnan(x) for x in rewards.reward.tolist()] == [True, True, False]


def test_a_mapping_may_say_what_its_heads_think(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    body = "return {'rewards': [1, 2, 3], 'worst': [0, 0, 0], 'mean': [[1, 2]] * 3, 'std': [[.1, .2]] * 3, 'x': 5}"
    rewards = _open(_function(tmp_path, body), tokenizer, prompts)(samples)
    assert (rewards.worst.tolist(), rewards.nominal, list(rewards.std.shape)) == ([0, 0, 0], None, [3, 2])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"mine.py:score: rewards: expected a list of 3, one per response, got 1"),
        ("return 1.0", "expected a list of 3, one per response, got float"),
        ("return ['a', 1, 2]", "expected numbers, None or NaN, got 'a'"),
        ("return {'score': [1, 2, 3]}", "expected rewards in the answer, got score"),
        (
            "return {'rewards': [1, 2, 3], 'mean': [[1], [1, 2], [1]]}",
            "mean: expected one list per response, all of one",
        ),
        ("return {'rewards': [1, 2, 3], 'mean': [[], [], []]}", "mean: expected one list per response, .* none empty"),
        (
            "return {'rewards': [1, 2, 3], 'mean': [[1, 2]] * 3, 'std': [[1, 2, 3]] * 3}",
            r"mine.py:score: expected mean and std of the same heads, got 2 and 3 per response",
        ),
        ("pass", r"reward.source: .*mine.py:score: expected rewards, got None"),
        ("return {'rewards': None}", "expected rewards, got None"),
        ("raise KeyError('k')", r"reward.source: .*mine.py:score raised KeyError: 'k'"),
        ("raise SystemExit(0)", r"reward.source: .*mine.py:score raised SystemExit: 0"),
    ],
)
def test_what_a_function_does_wrong_is_said(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _open(_function(tmp_path, body), tokenizer, prompts)(samples)


def test_a_gold_function_that_ends_the_process_is_refused_like_any_error(
    tokenizer: Any, prompts: list[Prompt], samples: Samples, tmp_path: Path
) -> None:
    gold = open_gold(_function(tmp_path, "raise SystemExit(0)"), Texts(tokenizer, prompts))
    with pytest.raises(ValueError, match=r"^gold: .*mine.py:score raised SystemExit: 0"):
        gold(samples)
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n", "utf-8")
    with pytest.raises(ValueError, match=r"^gold: .*script.py cannot be imported: SystemExit: 0"):
        open_gold(f"{tmp_path / 'script.py'}:score", Texts(tokenizer, prompts))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "gold: no_such_module cannot be imported: ModuleNotFoundError"),
        ("math:no_such", "gold: expected a function no_such in math, got none"),
        ("nothing", "gold: expected MODULE:FUNCTION or FILE.py:FUNCTION, got 'nothing'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(
    tokenizer: Any, prompts: list[Prompt], source: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_gold(source, Texts(tokenizer, prompts))


def test_vader_judges_the_response_alone(tokenizer: Any, prompts: list[Prompt], samples: Samples) -> None:
    pytest.importorskip("vaderSentiment")
    gold = open_gold("vader", Texts(tokenizer, prompts))(samples).reward
    assert gold[0] > 0 > gold[1]
    assert gold[2] == 0
