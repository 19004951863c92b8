"""The NeMo-RL environment: message logs to the scorer's rewards, metrics once a batch, and the registration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from prudent.rlhf.doors import nemo_rl

PROMPT = "<|user|> the day <|end|><|assistant|> "


def log(answer: str) -> list[dict[str, str]]:
    """As NeMo-RL gives it: the prompt in the policy's chat template, the response as plain text."""
    return [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "server"])
def test_rewards_are_the_scorers_for_a_prompt_in_the_template(remote, reward_folder, server, scorer):
    model = server if remote else str(reward_folder)
    conversations = nemo_rl.Conversations({"model": model, "aggregation": "lcb:1", "trust": None})
    answers = ["is good", "is bad"]
    found = conversations.rewards([log(answer) for answer in answers], [None, {"ground_truth": "x"}])
    items = [{"prompt": "the day", "response": answer} for answer in answers]
    scores = scorer.score(items, aggregation="lcb:1")
    assert found == pytest.approx(scores.reward, abs=1e-5)
    metrics = conversations.metrics()
    assert set(metrics) == {"prudent/std", "prudent/gap", "prudent/distance", "prudent/foreign"}
    assert metrics["prudent/std"] == pytest.approx(scores.std.mean().item(), rel=1e-5)
    assert conversations.metrics() == {}  # each batch once


def test_a_raw_prompt_beside_the_log_is_rendered_by_the_reward_models_template(server, scorer):
    conversations = nemo_rl.Conversations({"model": server})
    prompt = [{"role": "user", "content": "my food"}]
    found = conversations.rewards([log("is bad")], [{"prompt": prompt}])
    want = scorer.score([{"prompt": prompt, "response": "is bad"}]).reward
    assert found == pytest.approx(want, abs=1e-5)


def test_a_reward_that_is_not_finite_and_a_missing_model_are_errors(reward_folder, monkeypatch):
    conversations = nemo_rl.Conversations({"model": str(reward_folder)})
    nothing = {"reward": None, "nominal": None, "worst": None, "mean": [None], "std": [None]}
    monkeypatch.setattr(conversations._backend, "score", lambda items: [nothing for _ in items])
    with pytest.raises(ValueError, match="expected finite rewards, got 2 of 2 that are not"):
        conversations.rewards([log("a"), log("b")], [None, None])
    with pytest.raises(ValueError, match=r"env\.prudent\.model: expected a URL or a folder"):
        nemo_rl.Conversations({"aggregation": "min"})


class EnvironmentReturn(NamedTuple):
    observations: Any
    metadata: Any
    next_stop_strings: Any
    rewards: Any
    terminateds: Any
    answers: Any


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """NeMo-RL's and Ray's names that the door uses, as their source of August 2026 has them."""
    registered: dict[str, str] = {}
    actors: dict[str, str] = {}
    contents: dict[str, dict[str, Any]] = {
        "ray": {"remote": lambda cls: SimpleNamespace(actor=cls)},
        "nemo_rl": {},
        "nemo_rl.environments": {},
        "nemo_rl.distributed": {},
        "nemo_rl.environments.interfaces": {"EnvironmentInterface": object, "EnvironmentReturn": EnvironmentReturn},
        "nemo_rl.environments.utils": {"register_env": registered.__setitem__},
        "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": SimpleNamespace(SYSTEM="python")},
        "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": actors},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    yield SimpleNamespace(registered=registered, actors=actors)
    vars(nemo_rl).pop("PrudentEnvironment", None)  # made with these modules


def test_it_is_registered_with_the_python_that_runs_it_and_steps(packages, reward_folder, scorer):
    nemo_rl.register("pessimistic")
    (actor,) = packages.registered.values()
    assert packages.registered == {"pessimistic": "prudent.rlhf.doors.nemo_rl.PrudentEnvironment"}
    assert packages.actors == {actor: "python"}
    environment = nemo_rl.PrudentEnvironment.actor({"model": str(reward_folder)})
    step = environment.step([log("is good"), log("is bad")], [None, None])
    want = scorer.score([{"prompt": "the day", "response": text} for text in ("is good", "is bad")]).reward
    assert step.rewards.tolist() == pytest.approx(want, abs=1e-5)
    assert step.rewards.dtype == torch.float32
    assert step.terminateds.tolist() == [True, True]
    assert step.answers == ["is good", "is bad"]
    assert len(step.observations) == len(step.metadata) == len(step.next_stop_strings) == 2
    batch, metrics = environment.global_post_process_and_metrics({"x": 1})
    assert batch == {"x": 1}
    assert metrics["prudent/std"] > 0


def test_without_nemo_rl_the_error_names_it():
    with pytest.raises(ImportError, match="for NeMo-RL, which cannot be imported"):
        nemo_rl.PrudentEnvironment  # noqa: B018
