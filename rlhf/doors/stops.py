"""Tell from a response's token ids whether the policy ended it or the length did."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

from transformers import GenerationConfig

from ..models.loading import load_tokenizer
from ..sampling.turn import Ending


class Stops:
    """The tokens that end a response of one policy.

    They are the tokeniser's EOS and padding (TRL counts it as an end too), the token with which its chat template
    closes a turn, and the EOS tokens of the model's generation config, where the model was named. Other special tokens
    end nothing: a response that was cut off may stand at one.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int] = ()) -> None:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
        self.ids = frozenset({tokenizer.eos_token_id, tokenizer.pad_token_id, *_closing(tokenizer), *eos} - {None})

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether the policy ended the response; no token at all is a response that was cut off."""
        return len(ids) > 0 and int(ids[-1]) in self.ids


def _closing(tokenizer: Any) -> set[int]:
    """The token with which the chat template closes a turn.

    None if it closes with plain text, at which no trainer stops, or if it does not take a question and an answer.
    """
    try:
        ending = Ending(tokenizer)
    except Exception:  # a template may raise anything
        return set()
    return set() if ending.text else ending.stop


def policy_stops(policy: Any) -> Stops:
    """The stops of a tokeniser, a processor, or a model's folder or hub name. Raises ValueError."""
    if not isinstance(policy, (str, PathLike)):
        return Stops(policy)
    name = fspath(policy)
    tokenizer = load_tokenizer("policy", name)
    try:
        eos = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has none
        eos = None
    return Stops(tokenizer, eos if isinstance(eos, list) else [] if eos is None else [eos])
