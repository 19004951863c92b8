"""Rewards from a server, over HTTP."""

from __future__ import annotations

from typing import Any

from ...doors.client import FORMS, RewardClient, form_of, token_of
from ...doors.http import Endpoint, check_url
from ..batch import Samples
from .answers import rewards_of
from .sources import Rewards, Texts

_COLUMNS = ("nominal", "worst", "mean", "std", "distance")


class HTTPReward:
    """A server that answers one POST per step: JSON in, JSON out.

    It gets `prompts`, `responses`, and `query`: prompt and response in the policy's template, special tokens included,
    which OpenRLHF's reward servers read. It answers {"rewards": [N numbers, null for a missing one]}, optionally with
    `nominal`, `worst`, `mean`, `std` and `distance`, or the bare list. A URL that ends with /score, /classify or
    /pooling is one of `prudent serve` or of vLLM and is asked as `doors.client.RewardClient` does.

    A request without an answer is sent again a few times, each time with a warning in the log. The environment's
    PRUDENT_TOKEN is sent as a bearer token.

    Args:
        key: the config key that errors name.
        url: of the server.
        texts: prompts and the policy's tokeniser.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: for a wrong URL; from a call, if the request is refused (4xx), if no answer comes in time after a
            few tries, or for an answer of another form.
    """

    num_heads: int | None = None

    def __init__(self, key: str, url: str, texts: Texts, *, timeout: float = 60.0) -> None:
        check_url(key, url)
        self.name, self._where, self._texts = url, f"{key}: {url}", texts
        self._client = RewardClient(url, timeout=timeout, name=key) if form_of(url) in FORMS else None
        self._endpoint = Endpoint(url, self._where, timeout=timeout, token=token_of(None))

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """The rewards of all samples, in their order."""
        texts = self._texts
        prompts, responses = texts.prompts_of(samples), texts.responses_of(samples)
        if self._client is not None:
            items = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]
            return rewards_of(_columns(self._client.score(items)), len(items), self._where)
        body = {"prompts": prompts, "responses": responses, "query": texts.whole_of(samples)}
        return rewards_of(self._endpoint.post(body), len(responses), self._where)


def _columns(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Results as the answer that `rewards_of` reads: a list for each number, without those that the form lacks."""
    found = {name: [result[name] for result in results] for name in _COLUMNS if name in results[0]}
    return {"rewards": [result["reward"] for result in results], **found}
