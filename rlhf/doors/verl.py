"""A reward manager for verl, with or without verl's own reward-model replicas.

verl loads it by its import path, from the command line:

    reward.reward_manager.source=importlib
    reward.reward_manager.name=PrudentRewardManager
    reward.reward_manager.module.path=pkg://prudent.rlhf.doors.verl
    +reward.custom_reward_function.reward_kwargs.model=http://host:8000

Beside `model` (a server's URL, or a folder) the reward_kwargs may have `aggregation` and `trust`. If verl serves the
model itself (reward.reward_model.enable=true, our model in vLLM), it asks a manager only where a reward function is
named too, and `model` is left out:

    reward.custom_reward_function.path=pkg://prudent.rlhf.doors.verl
    reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

try:
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
except ImportError as error:
    raise ImportError(
        f"the reward manager is for verl, which cannot be imported ({error}): pip install verl"
    ) from error

from ...engine.text import ItemEncoder
from .backend import Backend, Scored, open_backend
from .client import RewardClient
from .stops import Stops
from .uncertainty import COLUMNS, columns_of

_OPTIONS = ("model", "aggregation", "trust")


class PrudentRewardManager(RewardManagerBase):
    """`run_single` scores one response as `Scorer` does, prompt, chat template and truncation included.

    reward_extra_info has prudent_std, prudent_gap, prudent_distance and prudent_truncated, numbers of every sample; NaN
    where the model does not measure one. verl has no missing reward: one that is not finite is a ValueError.

    A folder is read in each of the `reward.num_workers` processes, which have no GPU: for more than a small model, name
    a server.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        given = config.reward.custom_reward_function.get("reward_kwargs") or {}
        unknown = [name for name in given if name not in _OPTIONS]
        if unknown:
            raise ValueError(f"reward_kwargs: expected {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        model = given.get("model")
        if (model is None) == (reward_router_address is None):
            raise ValueError(
                "reward_kwargs.model: expected a URL or folder, or reward.reward_model.enable=true without it, got "
                f"{'neither' if model is None else 'both'}"
            )
        self._stops = Stops(tokenizer)
        self._encoder: ItemEncoder | None = None
        if model is not None:
            self._backend: Backend = open_backend(model, given.get("aggregation"), given.get("trust"))
        else:
            if given.get("aggregation") or given.get("trust"):
                raise ValueError(
                    "reward_kwargs: expected no aggregation or trust, because vLLM's replicas apply the model's own"
                )
            url = f"http://{reward_router_address}/classify"
            self._backend = RewardClient(url, model=config.reward.reward_model.model_path, name="reward_router_address")
            self._encoder = ItemEncoder(
                reward_model_tokenizer, append_eos=True, max_length=None, vocab_size=len(reward_model_tokenizer)
            )

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of the last sequence of a DataProto: {"reward_score": float, "reward_extra_info": {...}}."""
        row = data[-1:][0]
        responses = row.batch["responses"]
        length = int(row.batch["attention_mask"][-responses.shape[-1] :].sum())
        ids = responses[:length].tolist()
        response = await self.loop.run_in_executor(None, lambda: self.tokenizer.decode(ids, skip_special_tokens=True))
        complete = self._stops.complete(ids)
        item: Any = {"prompt": list(row.non_tensor_batch["raw_prompt"]), "response": response, "complete": complete}
        if self._encoder is not None:
            item = self._encoder.text_of(item).removeprefix(self._encoder.tokenizer.bos_token or "")  # vLLM adds it
        (scored,) = await self._backend.score_async([item])
        return {"reward_score": _reward_of(scored), "reward_extra_info": _extra(scored, complete)}


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    model: str,
    aggregation: str | None = None,
    trust: float | None = None,
    **_: Any,
) -> dict[str, float]:
    """verl's reward function for its own managers, if the data set's extra_info has the `prompt` (a text or messages).

    It does not see the token ids: a response that was cut off is scored as one that ended. `PrudentRewardManager` does.
    """
    if not extra_info or "prompt" not in extra_info:
        raise ValueError("extra_info: expected the prompt of the response, got none: use PrudentRewardManager")
    backend = _backend(model, aggregation, trust)
    (scored,) = await backend.score_async([{"prompt": extra_info["prompt"], "response": solution_str}])
    return {"score": _reward_of(scored), **_extra(scored, True)}


@cache
def _backend(model: str, aggregation: str | None, trust: float | None) -> Backend:
    return open_backend(model, aggregation, trust)


def _reward_of(scored: Scored) -> float:
    reward = scored["reward"]
    if reward is None:
        raise ValueError("prudent: expected a finite reward, which verl needs of every response, got one that is not")
    return float(reward)


def _extra(scored: Scored, complete: bool) -> dict[str, float]:
    columns = columns_of([scored])
    numbers = {name: columns.get(name, [None])[0] for name in COLUMNS}
    found = {f"prudent_{name}": math.nan if value is None else value for name, value in numbers.items()}
    return {**found, "prudent_truncated": float(not complete)}
