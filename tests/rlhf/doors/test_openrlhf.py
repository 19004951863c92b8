"""`reward_func` for OpenRLHF: its arguments and answer, from a file, in threads, and through OpenRLHF's own client."""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prudent.rlhf.doors.openrlhf import reward_function

INSTALLED = importlib.util.find_spec("openrlhf") is not None
PROMPT = "<|user|> the day <|end|><|assistant|> "


def query(answer: str, ended: bool = True) -> str:
    return f"{PROMPT}{answer}{' <|end|>' if ended else ''}"


@pytest.mark.parametrize("ended", [True, False])
def test_a_query_in_the_chat_template_gets_the_scorers_reward_and_its_uncertainty(reward_folder, scorer, ended):
    found = reward_function(reward_folder, aggregation="lcb:1")([query("is good", ended)], [PROMPT], [""])
    scores = scorer.score([{"prompt": "the day", "response": "is good", "complete": ended}], aggregation="lcb:1")
    assert found["rewards"] == found["scores"] == pytest.approx(scores.reward[0], abs=1e-5)
    assert found["extra_logs"]["std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert found["extra_logs"]["distance"] == pytest.approx(scores.distance.item(), rel=1e-5)


def test_raw_messages_come_through_the_label_when_the_templates_differ(reward_folder, scorer):
    label = [{"role": "user", "content": "my food"}]
    found = reward_function(reward_folder)(["[Q] my food [A] is bad</s>"], ["[Q] my food [A] "], [label])
    want = scorer.score([{"prompt": label, "response": "is bad"}]).reward[0]
    assert found["rewards"] == pytest.approx(want, abs=1e-5)


def test_many_threads_get_each_their_own_reward(reward_folder, scorer):
    answers = [
        f"is {word} and {other}" for word in ("good", "bad", "sad", "fine") for other in ("calm", "loud", "long")
    ]
    reward_func = reward_function(scorer)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda text: reward_func([query(text)], [PROMPT], [None])["rewards"], answers))
    want = scorer.score([{"prompt": "the day", "response": text} for text in answers]).reward
    assert found == pytest.approx(want, abs=1e-5)
    assert len({round(value, 5) for value in found}) == len(found)


def test_a_url_is_given_to_openrlhf_itself():
    with pytest.raises(ValueError, match="give OpenRLHF itself the URL's /get_reward"):
        reward_function("http://127.0.0.1:8000")


def _file(folder: Path, model: Path) -> Path:
    path = folder / "reward.py"
    path.write_text(
        f"from prudent.rlhf.doors.openrlhf import reward_function\nreward_func = reward_function({str(model)!r})\n"
    )
    return path


def test_openrlhf_loads_it_from_a_file(tmp_path, reward_folder, scorer):
    spec = importlib.util.spec_from_file_location("reward_func", _file(tmp_path, reward_folder))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.reward_func([query("is good")], [PROMPT], ["label"])
    assert found["rewards"] == pytest.approx(
        scorer.score([{"prompt": "the day", "response": "is good"}]).reward[0], abs=1e-5
    )


@pytest.mark.doors
@pytest.mark.skipif(not INSTALLED, reason="OpenRLHF is not installed: make doors")
@pytest.mark.parametrize("remote", [False, True], ids=["file", "server"])
def test_openrlhfs_own_client_gets_the_scorers_rewards(tmp_path, reward_folder, scorer, server, remote):
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    url = f"{server}/get_reward" if remote else str(_file(tmp_path, reward_folder))
    answers = ["is good", "is bad", "was sad and long", "was fine"]
    queries = [query(answer, ended) for answer, ended in zip(answers, (True, True, True, False), strict=True)]

    async def ask() -> list[Any]:
        executor = SingleTurnAgentExecutor(url)
        fetch = executor._fetch_rewards_via_http if remote else executor._fetch_rewards_via_func
        return [found for text in queries for found in await fetch([text], [PROMPT], [""])]

    found = asyncio.run(ask())
    items = [{"prompt": "the day", "response": a, "complete": a != "was fine"} for a in answers]
    scores = scorer.score(items)
    assert [float(one["rewards"]) for one in found] == pytest.approx(scores.reward, abs=1e-5)
    assert [one["extra_logs"]["std"] for one in found] == pytest.approx(scores.std.mean(1).tolist(), rel=1e-5)
