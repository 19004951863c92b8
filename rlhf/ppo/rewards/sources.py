"""The interface of reward sources, and the simplest one, VADER."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.gold import VaderGold
from ...data.rows import Prompt as PromptItem
from ...sampling.prompts import Prompt
from ...sampling.turn import Ending
from ..batch import Samples


class Rewards(NamedTuple):
    """N samples scored; fp32 on the CPU.

    reward          [N], NaN where scoring failed
    nominal, worst  [N] of K > 1 heads, by their means; else None
    mean, std       [N, K], None if the source has no heads
    distance        [N] from the reference responses, 1 = their 95 % quantile; None if the source does not measure it
    """

    reward: Tensor
    nominal: Tensor | None = None
    worst: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    distance: Tensor | None = None


class RewardSource(Protocol):
    """Scores samples. name: for logs; num_heads: K, None if there are no heads."""

    name: str
    num_heads: int | None

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """The rewards of all samples, in their order. seed: of noise, for a source that has heads to sample."""
        ...


class Texts:
    """Prompts and responses as text, for rewards that do not read the policy's tokens."""

    def __init__(self, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self._ending = Ending(tokenizer)

    def prompts_of(self, samples: Samples) -> list[PromptItem]:
        """The prompts as given: texts, messages, {"messages", "tools"} or {"system", "text"}."""
        return [self.prompts[index].item for index in samples.prompt_index]

    def responses_of(self, samples: Samples) -> list[str]:
        """The texts of the responses, without the stop token and the template's closing."""
        if samples.texts is not None:
            return samples.texts
        rows = zip(samples.prompts, samples.responses, samples.stopped, strict=True)
        return [self._ending.response_text(prompt, response, stopped) for prompt, response, stopped in rows]

    def whole_of(self, samples: Samples) -> list[str]:
        """Prompt and response in the policy's own template, special tokens included."""
        rows = zip(samples.prompts, samples.responses, strict=True)
        return [str(self.tokenizer.decode(p + r, skip_special_tokens=False)) for p, r in rows]


class VaderReward:
    """The compound sentiment of the response alone; see `gold.VaderGold`."""

    name = "vader"
    num_heads: int | None = None

    def __init__(self, texts: Texts) -> None:
        self._texts, self._gold = texts, VaderGold()

    def __call__(self, samples: Samples, seed: int | None = None) -> Rewards:
        """See `RewardSource`."""
        return Rewards(torch.tensor(self._gold(self._texts.responses_of(samples)), dtype=torch.float32))
