"""The reward manager and reward function for verl: with verl itself where it is installed, else with its contract."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

INSTALLED = importlib.util.find_spec("verl") is not None
PROMPT = [{"role": "user", "content": "the day"}]
STOP = 3


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `prudent.rlhf.doors.verl`, on the real base class or on one with its constructor."""
    name = "verl.experimental.reward_loop.reward_manager.base"
    if not INSTALLED:

        class RewardManagerBase:
            def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
                self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score
                self.loop = asyncio.new_event_loop()

        for end in range(1, 6):
            monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:end]), ModuleType(name))
        sys.modules[name].RewardManagerBase = RewardManagerBase  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "prudent.rlhf.doors.verl", raising=False)
    return importlib.import_module("prudent.rlhf.doors.verl")


class Config(dict):
    """A config as OmegaConf reads: keys are attributes too."""

    __getattr__ = dict.__getitem__


def config_of(reward_model: dict[str, Any] | None = None, **options: Any) -> Config:
    function = Config(path=None, name="compute_score", reward_kwargs=options or None)
    return Config(reward=Config(custom_reward_function=function, reward_model=Config(reward_model or {})))


class Row(SimpleNamespace):
    """One row of verl's DataProto, as far as a manager reads it."""

    def __getitem__(self, key: Any) -> Row:
        return self


def row_of(tokenizer: Any, response: str, ended: bool, padding: int = 2) -> Row:
    prompt = tokenizer("the day")["input_ids"]
    ids = tokenizer(response)["input_ids"] + ([STOP] if ended else [])
    row = torch.tensor([*ids, *([0] * padding)])
    mask = torch.tensor([1] * (len(prompt) + len(ids)) + [0] * padding)
    return Row(
        batch={"responses": row, "attention_mask": mask},
        non_tensor_batch={"raw_prompt": np.array(PROMPT, dtype=object)},
    )


def run(manager: Any, row: Row) -> dict[str, Any]:
    async def once() -> dict[str, Any]:
        manager.loop = asyncio.get_running_loop()
        found: dict[str, Any] = await manager.run_single(row)
        return found

    return asyncio.run(once())


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_a_response_gets_the_scorers_reward_and_its_uncertainty(door, remote, ended, reward_folder, server, scorer):
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    options = {"model": server if remote else str(reward_folder), "aggregation": "lcb:1", "trust": 0.5}
    manager = door.PrudentRewardManager(config_of(**options), tokenizer, None, reward_router_address=None)
    found = run(manager, row_of(tokenizer, "is good", ended))
    item = {"prompt": PROMPT, "response": "is good", "complete": ended}
    scores = scorer.score([item], aggregation="lcb:1,trust=0.5")
    assert found["reward_score"] == pytest.approx(scores.reward[0], abs=1e-5)
    extra = found["reward_extra_info"]
    assert set(extra) == {"prudent_std", "prudent_gap", "prudent_distance", "prudent_truncated"}
    assert extra["prudent_std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert extra["prudent_distance"] == pytest.approx(scores.distance.item(), rel=1e-5)
    assert extra["prudent_truncated"] == float(not ended)


def test_verls_own_replicas_are_asked_with_the_text_that_the_scorer_reads(door, reward_folder, server, scorer):
    """The test's server answers /classify as vLLM with our model does: means, stds, distance and reward."""
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    manager = door.PrudentRewardManager(
        config_of({"model_path": str(reward_folder)}),
        tokenizer,
        None,
        reward_router_address=server.removeprefix("http://"),
        reward_model_tokenizer=tokenizer,
    )
    found = run(manager, row_of(tokenizer, "is good", True))
    scores = scorer.score([{"prompt": PROMPT, "response": "is good"}])
    assert found["reward_score"] == pytest.approx(scores.reward[0], abs=1e-5)
    assert found["reward_extra_info"]["prudent_std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert math.isnan(found["reward_extra_info"]["prudent_gap"])  # vectors have no nominal and worst


def test_the_reward_function_takes_the_prompt_from_extra_info(door, reward_folder, scorer):
    given = {"data_source": "x", "solution_str": "is good", "ground_truth": None, "model": str(reward_folder)}
    found = asyncio.run(door.compute_score(**given, extra_info={"prompt": PROMPT, "num_turns": None}))
    assert found["score"] == pytest.approx(
        scorer.score([{"prompt": PROMPT, "response": "is good"}]).reward[0], abs=1e-5
    )
    assert found["prudent_std"] > 0
    with pytest.raises(ValueError, match="extra_info: expected the prompt"):
        asyncio.run(door.compute_score(**given, extra_info={}))


@pytest.mark.parametrize(
    ("options", "router", "message"),
    [
        ({}, None, "expected a URL or folder, or .*, got neither"),
        ({"model": "http://127.0.0.1:1"}, "127.0.0.1:2", "got both"),
        ({"modle": "x"}, None, "reward_kwargs: expected model, aggregation, trust, got modle"),
        ({"trust": 1.0}, "127.0.0.1:2", "expected no aggregation or trust"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_at_the_start(door, options, router, message, tiny_chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    with pytest.raises(ValueError, match=message):
        door.PrudentRewardManager(config_of(**options), tokenizer, None, router, tokenizer)


@pytest.mark.skipif(INSTALLED, reason="verl is installed")
def test_without_verl_the_error_names_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "prudent.rlhf.doors.verl", raising=False)
    with pytest.raises(ImportError, match="pip install verl"):
        importlib.import_module("prudent.rlhf.doors.verl")


@pytest.mark.doors
@pytest.mark.skipif(not INSTALLED, reason="verl is not installed: make doors")
def test_verl_loads_the_manager_from_its_configuration_and_scores_its_own_batches(reward_folder, scorer):
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    module = {"path": "pkg://prudent.rlhf.doors.verl", "name": None}
    manager_config = {"source": "importlib", "name": "PrudentRewardManager", "module": module}
    function = {"path": None, "name": "compute_score", "reward_kwargs": {"model": str(reward_folder)}}
    config = OmegaConf.create({"reward": {"reward_manager": manager_config, "custom_reward_function": function}})
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    row = row_of(tokenizer, "is bad", True)
    tensors = {name: value[None] for name, value in row.batch.items()}
    prompts = np.empty(1, dtype=object)
    prompts[0] = PROMPT
    data = DataProto.from_dict(tensors=tensors, non_tensors={"raw_prompt": prompts})

    async def once() -> Any:
        manager = load_reward_manager(config, tokenizer, reward_router_address=None, reward_model_tokenizer=None)
        return await manager.run_single(data)

    found = asyncio.run(once())
    want = scorer.score([{"prompt": PROMPT, "response": "is bad"}])
    assert found["reward_score"] == pytest.approx(want.reward[0], abs=1e-5)


@pytest.mark.doors
@pytest.mark.skipif(not INSTALLED, reason="verl is not installed: make doors")
def test_verls_reward_loop_scores_a_batch_in_two_ray_workers(reward_folder, scorer, server):
    import ray
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopManager

    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    answers = ["is good", "is bad", "was sad and long", "was fine", "is calm"]
    rows = [row_of(tokenizer, answer, answer != "was fine", padding=0) for answer in answers]
    width = max(len(row.batch["responses"]) for row in rows)
    prompt = torch.tensor(tokenizer("the day")["input_ids"])

    def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    prompts = np.empty(len(rows), dtype=object)
    prompts[:] = [PROMPT] * len(rows)
    tensors = {
        "prompts": prompt.expand(len(rows), -1).contiguous(),
        "responses": padded([row.batch["responses"] for row in rows]),
        "attention_mask": padded([row.batch["attention_mask"] for row in rows]),
    }
    assert tensors["attention_mask"].shape[1] == len(prompt) + width
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"tokenizer_path": None, "path": str(reward_folder)}},
            "reward": {
                "num_workers": 2,
                "reward_model": {"enable": False},
                "custom_reward_function": {"path": None, "name": "compute_score", "reward_kwargs": {"model": server}},
                "reward_manager": {
                    "source": "importlib",
                    "name": "PrudentRewardManager",
                    "module": {"path": "pkg://prudent.rlhf.doors.verl", "name": None},
                },
            },
        }
    )
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = RewardLoopManager(config).compute_rm_score(
            DataProto.from_dict(tensors=tensors, non_tensors={"raw_prompt": prompts})
        )
    finally:
        ray.shutdown()
    items = [{"prompt": PROMPT, "response": a, "complete": a != "was fine"} for a in answers]
    scores = scorer.score(items)
    rewards = found.batch["rm_scores"]
    assert rewards.sum(1).tolist() == pytest.approx(scores.reward, abs=1e-5)
    assert (rewards != 0).sum(1).tolist() == [1] * len(rows)  # at the last token
    assert found.non_tensor_batch["prudent_std"].tolist() == pytest.approx(scores.std.mean(1).tolist(), rel=1e-5)
    assert found.non_tensor_batch["prudent_truncated"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
