"""The endpoint plugin on an application like vLLM's, with a stand-in for its engine."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prudent import EnsembleRewardConfig, EnsembleRewardModel, Scorer
from prudent.rlhf.doors.vllm import contract

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make doors-vllm`"),
]

CHAT = [{"role": "user", "content": "my day"}, {"role": "assistant", "content": "good food"}]


class Engine:
    """Runs the model itself. `cached`: a response is NaN unless it is asked for without the prefix cache."""

    def __init__(self, folder: Path, cached: bool = False) -> None:
        self.model, self.cached = EnsembleRewardModel.from_pretrained(folder), cached
        self.asked: list[Any] = []
        self.model_config = SimpleNamespace(
            hf_config=EnsembleRewardConfig.from_pretrained(folder),
            model=str(folder),
            tokenizer=str(folder),
            revision=None,
            max_model_len=128,
        )

    async def encode(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append(params)
        ids = torch.tensor([prompt["prompt_token_ids"]])
        start = torch.tensor([params.extra_kwargs["response_start"]])
        with torch.no_grad():
            vector = contract.vectors(self.model.score(self.model.features(ids, None, start)))[0]
        await asyncio.sleep(0)
        if self.cached and not params.skip_reading_prefix_cache:
            vector = torch.full_like(vector, float("nan"))
        yield SimpleNamespace(outputs=SimpleNamespace(data=vector))


def client(folder: Path, engine: Engine, keys: list[str] | None = None) -> Any:
    """A client of an application that has a route /classify of vLLM's own."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from prudent.rlhf.doors.vllm.endpoints import RewardEndpoints

    app = FastAPI()
    app.state.args = SimpleNamespace(model=str(folder), revision=None, api_key=keys)

    @app.post("/classify")
    async def own() -> str:
        return "vLLM's own"

    plugin = RewardEndpoints()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, app.state.args))
    return TestClient(app)


def test_the_vector_of_our_reading_takes_the_place_of_vllms_own(reward_folder: Path, scorer: Scorer) -> None:
    answer = client(reward_folder, Engine(reward_folder)).post("/classify", json={"messages": CHAT})
    (expected,) = scorer.score([CHAT]).reward
    assert answer.json()["data"][0]["probs"][-1] == pytest.approx(expected, abs=1e-6)


def test_a_server_of_another_model_keeps_its_routes(reward_folder: Path, tiny_chat_folder: Path) -> None:
    found = client(tiny_chat_folder, Engine(reward_folder))
    assert found.post("/classify", json={}).json() == "vLLM's own"
    assert found.post("/get_reward", json={}).status_code == 404


def test_a_cached_response_is_asked_for_again_without_the_cache(reward_folder: Path, scorer: Scorer) -> None:
    engine = Engine(reward_folder, cached=True)
    answer = client(reward_folder, engine).post("/score", json={"chats": [CHAT]})
    assert answer.json()["scores"][0]["reward"] == pytest.approx(scorer.score([CHAT]).reward[0], abs=1e-6)
    assert [params.skip_reading_prefix_cache for params in engine.asked] == [None, True]
    start = scorer.read(CHAT).start
    assert start > 0
    assert [params.extra_kwargs for params in engine.asked] == [{"response_start": start}] * 2


def test_with_a_key_every_path_asks_for_it(reward_folder: Path) -> None:
    found = client(reward_folder, Engine(reward_folder), keys=["one", "two"])
    body = {"texts": ["my day"]}
    assert found.post("/score", json=body).status_code == 401
    for header in ("Bearer three", "Basic two", "two"):
        assert found.post("/score", json=body, headers={"Authorization": header}).status_code == 401
    assert found.post("/score", json=body, headers={"Authorization": "Bearer two"}).status_code == 200


def test_a_score_that_is_not_finite_never_leaves(reward_folder: Path) -> None:
    engine = Engine(reward_folder)
    with torch.no_grad():
        engine.model.score.bias.fill_(float("nan"))
    found = client(reward_folder, engine)
    (score,) = found.post("/score", json={"chats": [CHAT]}).json()["scores"]
    assert score["reward"] is None
    assert not score["finite"]
    assert found.post("/classify", json={"messages": CHAT}).status_code == 422
