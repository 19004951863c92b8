"""Micro-batches are planned for the run's own reward and prompts; its process keeps to its memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prudent.engine import EnsembleRewardModel
from prudent.rlhf.job.log import RunLog
from prudent.rlhf.ppo import memory, set_up
from prudent.rlhf.ppo.config import PPOConfig

from .cases import settings


def _auto(**changes: Any) -> PPOConfig:
    return settings(update={"micro_tokens": "auto"}, **changes)


def _resolved(config: PPOConfig, model_config: Any, device: str, kind: Any = "shared") -> PPOConfig:
    return memory.resolve_micro_tokens(config, model_config, torch.device(device), longest=7, kind=kind, heads=5)


def test_micro_tokens_are_a_number_planned_on_a_gpu_and_fixed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _auto(memory_budget="80GB")
    asked: list[tuple[int, int | None]] = []

    def planned(config: PPOConfig, shape: Any, limit: int, heads: int, features: Any) -> int:
        asked.append((limit, config.rollout.max_prompt_tokens))
        return 1234

    monkeypatch.setattr(memory, "_card", lambda device: 100 * 10**9)
    monkeypatch.setattr(memory, "auto_micro_tokens", planned)
    found = _resolved(config, None, "cuda")
    assert (found.micro_tokens, found.rollout, found.reward) == (1234, config.rollout, config.reward)
    assert asked == [(80 * 10**9, 7)]
    assert _resolved(config, None, "cpu").micro_tokens == 8192
    given = settings(update={"micro_tokens": 50})
    assert _resolved(given, None, "cuda") is given
    with pytest.raises(ValueError, match=r"^update\.micro_tokens: expected a number, got auto"):
        _ = config.micro_tokens


def test_a_run_has_one_config_with_memory_planned_for_the_kind_of_reward_that_auto_turned_out_to_be(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a reward model beside the policy has its own weights: planned as heads on the trunk, a run would run out of memory
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the food\na hotel\n")
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_chat_folder))
    seen: list[Any] = []

    def planned(config: PPOConfig, *_: Any, longest: int, kind: str, heads: int, features: Any) -> PPOConfig:
        seen.append((kind, heads))
        return config.model_copy(update={"update": config.update.model_copy(update={"micro_tokens": 77})})

    monkeypatch.setattr(set_up, "resolve_micro_tokens", planned)
    for name, trunk in (("own", AutoModelForCausalLM.from_pretrained(tiny_chat_folder)), ("other", other)):
        folder = tmp_path / name
        EnsembleRewardModel.from_trunk(trunk, num_heads=3).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(folder)
        config = _auto(
            model=str(tiny_chat_folder),
            prompts=str(prompts),
            output=tmp_path / f"run of {name}",
            reward={"source": str(folder)},
            rollout={"prompts_per_step": 2, "max_new_tokens": 4},
            steps=1,
        )
        with RunLog(config.output) as log:
            run = set_up.set_up(config, log, torch.device("cpu"), progress=False)
            run.monitor.close()
        assert run.config is run.policy.config is run.monitor.config
        assert run.config.micro_tokens == 77
    assert seen == [("shared", 3), ("model", 3)]


def test_the_weights_of_a_reward_model_of_its_own_are_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    big = LlamaConfig(**sizes, architectures=["LlamaForSequenceClassification"], num_labels=1)
    big.save_pretrained(tmp_path / "big")
    config = _auto(reward={"source": str(tmp_path / "big")})
    monkeypatch.setattr(memory, "_card", lambda device: 5 * 10**9)
    assert _resolved(config, big, "cuda", "shared").micro_tokens > 0
    with pytest.raises(ValueError, match=r"memory: expected at most 4\.7 GiB"):
        _resolved(config, big, "cuda", "model")


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_the_process_is_limited_to_its_budget_on_the_gpu_it_runs_on(
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
