"""Memory: micro-batches are planned for what a run is, and its process is held to its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prudent.engine import EnsembleRewardModel
from prudent.rlhf.ppo import memory, run
from prudent.rlhf.ppo.config import PPOConfig
from prudent.rlhf.ppo.loop import run_ppo

from .cases import settings


def test_micro_tokens_are_planned_on_a_gpu_and_the_update_s_own_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = settings(memory_budget="80GB")
    assert memory.with_micro_tokens(config, None, torch.device("cpu")) is config
    asked: list[tuple[int, int | None]] = []

    def planned(config: PPOConfig, shape: Any, limit: int, heads: int) -> int:
        asked.append((limit, config.rollout.max_prompt_tokens))
        return 1234

    monkeypatch.setattr(memory, "_card", lambda device: 100 * 10**9)
    monkeypatch.setattr(memory, "auto_micro_tokens", planned)
    gpu = torch.device("cuda")
    found = memory.with_micro_tokens(config, None, gpu, longest=7)
    assert (found.update.micro_tokens, found.rollout) == (1234, config.rollout)
    assert memory.with_micro_tokens(config, None, gpu).update.micro_tokens == 1234
    assert asked == [(80 * 10**9, 7), (80 * 10**9, None)]


def test_memory_is_planned_for_the_kind_of_reward_that_auto_has_turned_out_to_be(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a reward model beside the policy has its own weights: a run taken for one with heads on its trunk runs out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the food\na hotel\n")
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_chat_folder))
    seen: list[Any] = []

    def planned(config: PPOConfig, shape: Any, device: Any, longest: int, kind: str, heads: int) -> PPOConfig:
        seen.append((kind, heads))
        return config

    monkeypatch.setattr(run, "with_micro_tokens", planned)
    for name, trunk in (("own", AutoModelForCausalLM.from_pretrained(tiny_chat_folder)), ("other", other)):
        folder = tmp_path / name
        EnsembleRewardModel.from_trunk(trunk, num_heads=3).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(folder)
        config = settings(
            model=str(tiny_chat_folder),
            prompts=str(prompts),
            output=tmp_path / f"run of {name}",
            reward={"source": str(folder)},
            rollout={"prompts_per_step": 2, "max_new_tokens": 4},
            steps=1,
        )
        run_ppo(config, progress=False)
    assert seen == [("shared", 3), ("model", 0)]


def test_what_the_reward_turned_out_to_be_is_what_memory_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    big = LlamaConfig(**sizes, architectures=["LlamaForSequenceClassification"], num_labels=1)
    big.save_pretrained(tmp_path / "big")
    config = settings(reward={"source": str(tmp_path / "big")})
    monkeypatch.setattr(memory, "_card", lambda device: 5 * 10**9)
    gpu = torch.device("cuda")
    assert memory.with_micro_tokens(config, big, gpu, 32, "shared").update.micro_tokens != "auto"
    with pytest.raises(ValueError, match=r"memory: expected at most 4\.7 GiB"):
        memory.with_micro_tokens(config, big, gpu, 32, "model")


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_the_process_is_held_to_its_budget_on_the_gpu_it_runs_on(
    monkeypatch: pytest.MonkeyPatch, device: str, index: int
) -> None:
    # torch's own function, down to the driver: it refuses a device that has no index
    calls: list[tuple[float, int]] = []
    monkeypatch.setattr(memory, "_card", lambda device: 100 * 10**9)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *call: calls.append(call), raising=False)
    memory.limit_memory(settings(memory_budget="80GB"), torch.device(device))
    assert calls == [(0.8, index)]
