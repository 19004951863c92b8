"""How likely a response is under the language model whose states a reward reads: the tap `logprob`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import linear_logprob

NONE = -100  # in place of an id whose log-probability is not wanted


class LogitRule(NamedTuple):
    """logits = softcap tanh(scale z / softcap) with z = hidden @ weight.T; scale z without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any, name: str) -> LogitRule:
        """Read the rule from a causal language model's configuration; `name` is the model's, for errors.

        Raises:
            ValueError: for logits that are scaled and capped, which `linear_logprob` cannot compute.
        """
        scale, softcap = logit_scale(config), getattr(config, "final_logit_softcapping", None)
        if softcap is not None and scale != 1.0:
            raise ValueError(
                f"model: expected logits that are scaled or capped, got both in {name}: "
                f"scale {scale:g}, cap {softcap:g}"
            )
        return cls(scale, None if softcap is None else float(softcap))


def logit_scale(config: Any) -> float:
    """Return the factor on a causal language model's logits, under any name that configurations use; 1 for most."""
    scale = 1.0
    for name, divides in (("logit_scale", False), ("lm_head_multiplier", False), ("logits_scaling", True)):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value > 0:
            scale = scale / value if divides else scale * value
    return scale


def ties_head(config: Any) -> bool:
    """Whether a language model with this configuration shares its head with its embeddings; some families never do,
    and say nothing."""
    return bool(getattr(config, "tie_word_embeddings", False))


class LanguageHead(NamedTuple):
    """weight: [V, D], which logits are computed with, as `rule` says.

    skips: ids whose log-probability says nothing of a response, as those that end one: a response that was cut at its
    longest length gets an end that the model did not expect.
    """

    weight: Tensor
    rule: LogitRule
    skips: Sequence[int] = ()

    @classmethod
    def of(cls, model: Any, skips: Sequence[int] = ()) -> LanguageHead:
        """The head of a causal language model. Raises ValueError if it has none, or one with a bias."""
        head, name = model.get_output_embeddings(), type(model).__name__
        if head is None or getattr(head, "weight", None) is None:
            raise ValueError(f"model: expected a causal language model with a linear head, got {name}")
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"model: expected a language-model head without a bias, got one in {name}")
        return cls(head.weight, LogitRule.of(model.config, name), skips)

    def counts(self, ids: Tensor) -> Tensor:
        """ids of any shape -> bool: which of them are not skipped."""
        return ~torch.isin(ids, torch.tensor(self.skips, dtype=ids.dtype, device=ids.device))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """States [..., D] and the ids [...] that follow them -> log-probabilities [...] at temperature 1; fp32, in
        nats, 0 where the id is `NONE`."""
        weight, scale, softcap = self.weight.to(hidden.dtype), self.rule.scale, self.rule.softcap
        return linear_logprob(
            hidden, weight, targets, temperature=1 / scale, softcap=softcap, ignore_index=NONE
        ).logprob


def special_ids(tokenizer: Any) -> list[int]:
    """The ids that the tap `logprob` skips: special and added tokens. Some tokenisers declare the token that ends a
    turn only among the latter."""
    return sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})


def response_logprob(
    head: LanguageHead, output: Tensor, input_ids: Tensor, response: Tensor, place: Tensor | None = None
) -> Tensor:
    """Mean and least log-probability of a response's tokens: [B, 2] fp32, in nats, differentiable.

    The mean shows text in a wrong order, or of a wrong kind; the least shows one wrong word in a good sentence.

    Args:
        output: [B, T, D] the trunk's output; packed: [1, T, D], the B sequences one after another.
        input_ids: [B, T], or [1, T].
        response: [B, T] bool, the tokens of each response.
        place: [B, T] or [1, T], each token's place in its sequence; None: its column. The token at place 0 has no
            prediction and is left out, as are `head.skips`; a response without other tokens gets 0.
    """
    read = response.bool() & head.counts(input_ids)
    read = read & (True if place is None else place > 0)
    read[:, 0] = False
    wanted = read if len(output) == len(read) else read.any(dim=0, keepdim=True)
    targets = torch.where(wanted, input_ids, NONE)[:, 1:]
    logprob = head.logprobs(output[:, :-1], targets)  # [B, T - 1], or [1, T - 1]
    read, counts = read[:, 1:], read.sum(dim=1)
    mean = torch.where(read, logprob, 0.0).sum(dim=1) / counts.clamp_min(1)
    least = torch.where(read, logprob, float("inf")).amin(dim=1) if read.shape[1] else mean
    return torch.stack([mean, torch.where(counts > 0, least, 0.0)], dim=1)
