"""Open rewards from outside the policy, and gold scorers."""

from __future__ import annotations

from ..config import RewardConfig
from .function import CallableReward
from .model import ModelReward
from .resolve import Resolved
from .server import HTTPReward
from .sources import RewardSource, Texts, VaderReward


def open_source(config: RewardConfig, resolved: Resolved, texts: Texts) -> RewardSource | None:
    """Open the source of rewards of kind model, callable or http; None if the heads are on the policy's trunk.

    Args:
        config: `source`, `timeout`.
        resolved: from `resolve_reward`.
        texts: the prompts that `Samples.prompt_index` numbers, and the policy's tokeniser.

    Raises:
        ValueError: for a function or URL that cannot be used.
    """
    if resolved.on_trunk is not None:
        return None
    if resolved.scorer is not None:
        return ModelReward(config.source, resolved.scorer, texts)
    if resolved.kind == "http":
        return HTTPReward("reward.source", config.source, texts, timeout=config.timeout)
    return _open_callable("reward.source", config.source, texts)


def open_gold(name: str, texts: Texts) -> RewardSource:
    """Open a gold scorer: vader, MODULE:FUNCTION, FILE.py:FUNCTION or a URL. ValueError for anything else."""
    if name.startswith(("http://", "https://")):
        return HTTPReward("gold", name, texts)
    return _open_callable("gold", name, texts)


def _open_callable(key: str, name: str, texts: Texts) -> RewardSource:
    return VaderReward(texts) if name == "vader" else CallableReward(key, name, texts)
