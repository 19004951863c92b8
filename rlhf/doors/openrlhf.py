"""A `reward_func` for OpenRLHF, which loads it from a file of yours.

    from prudent.rlhf.doors.openrlhf import reward_function
    reward_func = reward_function("runs/reward/model", aggregation="lcb:1")

and `--reward.remote_url that_file.py`. OpenRLHF loads the file in every vLLM actor and gives it one response a call:
the model then is there as often as there are actors. A server is one model for all and scores many responses at once:
`--reward.remote_url http://host:8000/get_reward?aggregation=lcb:1`, without any file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...engine import Aggregation
from .backend import Source, is_url, open_backend
from .dialects import read_openrlhf


def reward_function(
    model: Source,
    *,
    aggregation: str | Aggregation | None = None,
    trust: float | None = None,
    batch_tokens: int = 4096,
) -> Callable[[Sequence[str], Sequence[str], Sequence[Any]], dict[str, Any]]:
    """reward_func(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}, as `/get_reward` answers.

    Queries, prompts and labels are read as `dialects.read_openrlhf` says; extra_logs has std, gap, and distance if the
    model measures it. It may be called from several threads.

    Args:
        model: a reward model's folder or hub name, read at the first call, or a `Scorer`.
        aggregation, trust, batch_tokens: as in `trl_reward`.
    """
    if is_url(model):
        raise ValueError(
            f"model: expected a folder or hub name, got the URL {model}: give OpenRLHF itself the URL's /get_reward"
        )
    backend = open_backend(model, aggregation, trust, batch_tokens=batch_tokens)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        body = {"query": list(queries), "prompts": list(prompts), "labels": list(labels)}
        asked = read_openrlhf(body, {})
        answer: dict[str, Any] = asked.reply(backend.score(asked.items))
        return answer

    return reward_func
