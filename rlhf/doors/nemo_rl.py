"""An environment for NeMo-RL: a Ray actor that scores conversations, beside those that NeMo-RL has.

    from prudent.rlhf.doors.nemo_rl import register
    register("prudent")

before `create_env`, and in the config `env.prudent: {model: http://host:8000, aggregation: "lcb:1"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .backend import Scored, open_backend
from .uncertainty import columns_of, metrics_of

_OPTIONS = ("model", "aggregation", "trust", "batch_tokens", "timeout")


class Conversations:
    """What the environment does, without Ray: NeMo-RL's message logs in, rewards out, and a batch's metrics.

    NeMo-RL's data processors write the prompt with the policy's chat template into the first message, and the response
    is text without special tokens. The two together are scored as a text of that template, whose reward model must have
    the same one; if a row's extra_env_info has `prompt` (a text or messages), that prompt is rendered with the reward
    model's own template instead. A response counts as ended: NeMo-RL does not pass its token ids
    (grpo.overlong_filtering leaves out those that were cut off).

    Args:
        config: {"model": a server's URL or a folder, "aggregation", "trust", "batch_tokens", "timeout"}, all but the
            first optional, as in `trl_reward`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
        if "model" not in options:
            raise ValueError("env.prudent.model: expected a URL or a folder, got none")
        self._backend = open_backend(options.pop("model"), **options)
        self._scored: list[Scored] = []

    def rewards(self, message_logs: Sequence[Sequence[Mapping[str, Any]]], infos: Sequence[Any]) -> list[float]:
        """The reward of each log's last message. ValueError if one is not finite: NeMo-RL has no missing reward."""
        items = [_item(log, info) for log, info in zip(message_logs, infos, strict=True)]
        scored = self._backend.score(items)
        self._scored += scored
        rewards = [result["reward"] for result in scored]
        if None in rewards:
            raise ValueError(
                f"prudent: expected finite rewards, got {rewards.count(None)} of {len(rewards)} that are not"
            )
        return rewards

    def metrics(self) -> dict[str, float]:
        """std, gap, distance and the share of foreign responses since the last call, under prudent/."""
        scored, self._scored = self._scored, []
        if not scored:
            return {}
        kept = {*columns_of(scored), "foreign"}
        found = metrics_of(scored, [True] * len(scored))
        return {f"prudent/{name}": value for name, value in found.items() if name in kept}


def _item(log: Sequence[Mapping[str, Any]], info: Any) -> dict[str, Any]:
    response = str(log[-1]["content"])
    if isinstance(info, Mapping) and info.get("prompt") is not None:
        return {"prompt": info["prompt"], "response": response}
    prompt = "".join(str(message["content"]) for message in log[:-1])
    return {"rendered": prompt + response, "prompt": prompt, "complete": True}


def register(name: str = "prudent") -> None:
    """Make the environment known to NeMo-RL as `name`. ImportError without NeMo-RL."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    actor = f"{__name__}.PrudentEnvironment"
    ACTOR_ENVIRONMENT_REGISTRY[actor] = PY_EXECUTABLES.SYSTEM  # the Python that runs NeMo-RL, which has prudent
    register_env(name, actor)


def __getattr__(name: str) -> Any:
    if name != "PrudentEnvironment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    environment = _environment()
    globals()[name] = environment
    return environment


def _environment() -> Any:
    """The Ray actor; made when NeMo-RL asks for it, because the module is read without NeMo-RL too."""
    try:
        import ray
        import torch
        from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
    except ImportError as error:
        raise ImportError(f"the environment is for NeMo-RL, which cannot be imported ({error})") from error

    class PrudentEnvironment(EnvironmentInterface):
        """Scores the last message of each conversation, which ends the episode."""

        def __init__(self, config: Mapping[str, Any]) -> None:
            self._conversations = Conversations(config)

        def step(self, message_log_batch: list[Any], metadata: list[Any]) -> Any:
            rewards = self._conversations.rewards(message_log_batch, metadata)
            count = len(rewards)
            return EnvironmentReturn(
                observations=[{"role": "environment", "content": f"Environment: {reward:g}"} for reward in rewards],
                metadata=[None] * count,
                next_stop_strings=[None] * count,
                rewards=torch.tensor(rewards, dtype=torch.float32),
                terminateds=torch.ones(count, dtype=torch.bool),
                answers=[str(log[-1]["content"]) for log in message_log_batch],
            )

        def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
            return batch, self._conversations.metrics()

    return ray.remote(PrudentEnvironment)
