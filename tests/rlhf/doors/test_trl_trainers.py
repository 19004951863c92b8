"""Real steps of TRL's trainers with `trl_reward`: the reward that the trainer used is the one that `Scorer` gives."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import prudent

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow
TRAINERS = {"grpo": ("GRPOTrainer", "GRPOConfig"), "rloo": ("RLOOTrainer", "RLOOConfig")}
OPTIONS = {
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
    "num_generations": 4,
    "max_completion_length": 6,
    "per_device_train_batch_size": 8,
    "beta": 0.0,
}
PROMPTS = ["the day", "my food is", "the hotel", "people"]


def train(which: str, policy: Path, folder: Path, reward: Any, chat: bool, **more: Any) -> tuple[Any, list[Any]]:
    """(the trainer, and for each step what it gave the reward with the rewards that it used)."""
    trainer_class, config_class = (getattr(trl, name) for name in TRAINERS[which])
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if chat else PROMPTS
    seen: list[Any] = []

    class Recording(trainer_class):
        def _calculate_rewards(self, inputs, prompts, completions, ids, *rest):
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids, *rest)
            seen.append((prompts, completions, ids, rewards[:, 0].tolist()))
            return rewards

    trainer = Recording(
        model=str(policy),
        args=config_class(output_dir=str(folder / "run"), **{**OPTIONS, **more}),
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()
    return trainer, seen


def check(trainer: Any, seen: list[Any], scorer: prudent.Scorer, aggregation: str | None = None) -> None:
    assert len(seen) == 2
    stop = scorer.tokenizer.eos_token_id
    cut = 0
    for prompts, completions, ids, used in seen:
        complete = [row[-1] == stop for row in ids]
        cut += complete.count(False)
        items = [
            {"prompt": prompt, "response": completion, "complete": whole}
            for prompt, completion, whole in zip(prompts, completions, complete, strict=True)
        ]
        assert used == pytest.approx(scorer.score(items, aggregation=aggregation).reward, abs=1e-5)
        assert max(used) - min(used) > 0.01  # told apart
    assert cut > 0  # both kinds of ending were seen
    logs = [entry for entry in trainer.state.log_history if "rewards/prudent/mean" in entry]
    assert len(logs) == 2
    for log, (_, _, _, used) in zip(logs, seen, strict=True):
        assert log["rewards/prudent/mean"] == pytest.approx(sum(used) / len(used), abs=1e-5)
        assert log["prudent/std"] > 0
        assert log["prudent/distance"] > 0
        assert 0 <= log["prudent/foreign"] <= 1
        assert log["prudent/missing"] == 0


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("which", TRAINERS)
def test_steps_with_a_model_in_the_process(which, chat, tiny_chat_folder, reward_folder, scorer, tmp_path):
    reward = prudent.trl_reward(reward_folder)
    trainer, seen = train(which, tiny_chat_folder, tmp_path, reward, chat, log_completions=True)
    check(trainer, seen, scorer)
    assert {"prudent_std", "prudent_gap", "prudent_distance"} <= set(trainer._logs["extra"])  # of the table's columns


@pytest.mark.parametrize("which", TRAINERS)
def test_steps_with_a_server(which, tiny_chat_folder, server, scorer, tmp_path):
    reward = prudent.trl_reward(server, aggregation="lcb:1", trust=0.5, policy=tiny_chat_folder)
    trainer, seen = train(which, tiny_chat_folder, tmp_path, reward, True)
    check(trainer, seen, scorer, "lcb:1,trust=0.5")


def test_two_rewards_have_names_of_their_own(tiny_chat_folder, reward_folder, tmp_path):
    rewards = [prudent.trl_reward(reward_folder), prudent.trl_reward(reward_folder, aggregation="min", name="lowest")]
    trainer, _ = train("grpo", tiny_chat_folder, tmp_path, rewards, False)
    log = trainer.state.log_history[0]
    assert log["rewards/lowest/mean"] < log["rewards/prudent/mean"]
    assert log["lowest/std"] == log["prudent/std"]


_CHILD = """
import asyncio, pickle, sys
from types import SimpleNamespace
from accelerate import PartialState
from trl.experimental.async_grpo import async_rollout_worker as worker
reward, prompts, completions, ids = pickle.load(sys.stdin.buffer)
n = len(prompts)
PartialState()  # which TRL's logger asks for
group = worker.RolloutGroup(
    prompts=prompts, reward_kwargs={}, completions=completions, completions_ids=ids,
    completions_sequences=[[SimpleNamespace(input_ids=[1], completion_mask=[1], old_log_probs=[0.0])]] * n,
    tool_call_counts=[0] * n, tool_failure_counts=[0] * n, model_version=0, group_id=0, env_rewards=[None] * n,
    rollout_rewards=[None] * n,
)
loop = SimpleNamespace(
    reward_funcs=[reward], reward_func_names=["prudent"], _env_reward_types=[], _provides_rollout_reward=False
)
samples = asyncio.run(worker._AsyncRolloutLoop._score_group(loop, group))
print(*(sample.metrics["reward"] for sample in samples))
"""


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_async_grpos_child_process_gets_the_same_rewards(remote, tiny_chat_folder, reward_folder, server, scorer):
    """Its worker needs vLLM to start; the reward goes through pickling, a spawned child and TRL's own scoring there."""
    pytest.importorskip("trl.experimental.async_grpo")
    source = server if remote else reward_folder
    reward = prudent.trl_reward(source, policy=tiny_chat_folder)
    texts = ["is good", "is bad"]
    ids = [[*scorer.tokenizer(text)["input_ids"], 3] for text in texts]
    sent = pickle.dumps((reward, PROMPTS[:2], texts, ids))
    done = subprocess.run([sys.executable, "-c", _CHILD], input=sent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found = done.stdout.decode().split()
    items = [{"prompt": prompt, "response": text} for prompt, text in zip(PROMPTS[:2], texts, strict=True)]
    assert [float(value) for value in found] == pytest.approx(scorer.score(items).reward, abs=1e-5)
