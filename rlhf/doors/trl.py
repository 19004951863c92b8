"""A pessimistic reward for TRL's GRPO, RLOO and AsyncGRPO, and for Unsloth and ms-swift, which call rewards alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...engine import Aggregation
from .backend import Backend, Scored, Source, is_url, open_backend
from .stops import Stops, policy_stops
from .uncertainty import columns_of, metrics_of


def trl_reward(
    model_or_url: Source,
    *,
    aggregation: str | Aggregation | None = None,
    trust: float | None = None,
    policy: Any = None,
    name: str = "prudent",
    batch_tokens: int = 4096,
    timeout: float = 60.0,
) -> TRLReward | TRLServerReward:
    """A reward function for `reward_funcs`: the reward that `Scorer` gives, with its uncertainty in the trainer's log.

        trainer = GRPOTrainer(model=..., reward_funcs=prudent.trl_reward("runs/reward/model"), ...)

    Prompts and completions are plain texts or messages. A completion whose last token is none of the policy's stop
    tokens was cut off and is scored as such: its turn or text gets no end. Each call logs, through the trainer's
    log_metric, NAME/std, NAME/gap, NAME/distance, NAME/foreign, NAME/truncated, NAME/missing and NAME/shortened (see
    `uncertainty.metrics_of`), and through log_extra the columns NAME_std, NAME_gap and NAME_distance of the table of
    completions. A reward that is not finite is None, which the trainer leaves out.

    Args:
        model_or_url: a reward model's folder or hub name, a `Scorer`, or a server's URL (`prudent serve`, or vLLM with
            our model). A folder is read when the first reward is needed. With a URL the function is asynchronous.
        aggregation: how the heads become one reward; None: the model's own. Centring is the trainer's.
        trust: the price of the distance, as in the aggregation `trust:c`, beside the aggregation.
        policy: the policy's tokeniser, or its model's folder or hub name, whose generation config is read too:
            `completion_ids` are its token ids. None: the reward model's own tokeniser, which the first call checks
            against the completions' texts. A URL needs it.
        name: of the reward in the log; two rewards need two.
        batch_tokens: tokens in a micro-batch, padding included; of a local model.
        timeout: seconds to wait for each answer of a server.

    Raises:
        ValueError: for a model, URL or aggregation that cannot be used; from a call, for a policy with another
            tokeniser that was not named, if no completion can be read, or if the server gives no rewards.
    """
    remote = is_url(model_or_url)
    if remote and policy is None:
        raise ValueError(
            "policy: expected the policy's tokeniser, or its folder or hub name, beside a URL, to tell completions "
            "that were cut off from those that ended, got None"
        )
    backend = open_backend(model_or_url, aggregation, trust, batch_tokens=batch_tokens, timeout=timeout)
    kind = TRLServerReward if remote else TRLReward
    return kind(backend, None if policy is None else policy_stops(policy), name)


class _Reward:
    """What both forms share: completions to items, results to rewards and logs. `last`: the metrics of the last call,
    for trainers without log_metric."""

    def __init__(self, backend: Backend, stops: Stops | None, name: str) -> None:
        self.backend, self.__name__, self.last = backend, name, dict[str, float]()
        self._stops = stops

    def _items(
        self, completions: Sequence[Any], prompts: Sequence[Any] | None, ids: Any, columns: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        if prompts is None:  # ms-swift gives whole conversations
            prompts = [list(messages[:-1]) for messages in columns["messages"]]
        complete = self._complete(completions, ids, columns)
        return [
            {"prompt": prompt, "response": completion, "complete": whole}
            for prompt, completion, whole in zip(prompts, completions, complete, strict=True)
        ]

    def _complete(self, completions: Sequence[Any], ids: Any, columns: Mapping[str, Any]) -> list[bool]:
        if ids is None:  # ms-swift says it, from the engine's finish reason
            return [not cut for cut in columns.get("is_truncated") or [False] * len(completions)]
        if self._stops is None:
            self._stops = self._own_stops(completions, ids)
        return [self._stops.complete(row) for row in ids]

    def _own_stops(self, completions: Sequence[Any], ids: Any) -> Stops:
        """The reward model's own stops, if completions are texts of its tokeniser."""
        tokenizer = self.backend.scorer.tokenizer  # type: ignore[attr-defined]  # a URL has been given the policy
        texts = [(_text(completion), row) for completion, row in zip(completions, ids, strict=True)]
        known = [(text, row) for text, row in texts if text]
        if any(text in tokenizer.decode(row, skip_special_tokens=True) for text, row in known) or not known:
            return Stops(tokenizer)
        raise ValueError(
            "policy: expected the policy's tokeniser, or its folder or hub name, because completion_ids are not those "
            "of the reward model's tokeniser, got None"
        )

    def _rewards(
        self,
        scored: Sequence[Scored],
        items: Sequence[Mapping[str, Any]],
        log_metric: Callable[[str, float], Any] | None,
        log_extra: Callable[[str, list[Any]], Any] | None,
    ) -> list[float | None]:
        metrics = metrics_of(scored, [item["complete"] for item in items])
        self.last = {f"{self.__name__}/{name}": value for name, value in metrics.items()}
        if log_metric is not None:
            for name, value in self.last.items():
                log_metric(name, value)
        if log_extra is not None:
            for name, column in columns_of(scored).items():
                log_extra(f"{self.__name__}_{name}", column)
        return [result["reward"] for result in scored]


class TRLReward(_Reward):
    """Rewards from a model in this process; made by `trl_reward`."""

    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], Any] | None = None,
        log_extra: Callable[[str, list[Any]], Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The rewards of N completions: N finite floats or None.

        Args:
            completions, prompts: N texts, or N lists of messages.
            completion_ids: N lists of the policy's token ids, the stop token included.
            log_metric, log_extra: the trainer's, if it has them.
            columns: what else the trainer gives: other columns of the data set, trainer_state.
        """
        items = self._items(completions, prompts, completion_ids, columns)
        return self._rewards(self.backend.score(items), items, log_metric, log_extra)


class TRLServerReward(_Reward):
    """Rewards from a server; made by `trl_reward`. Calls are awaited, so that several rewards are asked at once."""

    async def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], Any] | None = None,
        log_extra: Callable[[str, list[Any]], Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As `TRLReward.__call__`."""
        items = self._items(completions, prompts, completion_ids, columns)
        return self._rewards(await self.backend.score_async(items), items, log_metric, log_extra)

    # TRL asks `inspect.iscoroutinefunction` of the object itself until it looks at __call__ (from 1.1x on): an object
    # that carries a coroutine function's code counts as one
    __code__ = __call__.__code__
    __defaults__ = __call__.__defaults__
    __kwdefaults__ = __call__.__kwdefaults__


def _text(completion: Any) -> str:
    """A completion's text, or that of its last message; "" if it has none."""
    if not isinstance(completion, str):
        completion = completion[-1].get("content") if completion else ""
    return completion.strip() if isinstance(completion, str) else ""
