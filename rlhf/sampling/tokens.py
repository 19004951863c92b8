"""Draw tokens from logits with random numbers that depend on a key alone, and find the tokens that end a response."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


def keyed_uniforms(key: str, *shape: int) -> Tensor:
    """Return fp32 random numbers in [0, 1) on the CPU that depend on `key` and `shape` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator)


class Sampling(NamedTuple):
    """How tokens are drawn: at `temperature`, from the `top_k` likeliest (0: all), cut to the fewest with mass `top_p`.

    With top_k 0 and top_p 1 the distribution is softmax(logits / temperature).
    """

    max_new_tokens: int = 24
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """[N, V] logits and [N] numbers in [0, 1) -> [N] token ids, by the inverse of the cumulative distribution."""
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    probability = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        before = probability.cumsum(dim=-1) - probability
        probability = probability * (before < sampling.top_p)
    mass = probability.cumsum(dim=-1)
    total = mass[:, -1:]
    # the product may round up to the whole mass, which would select an index behind the last token
    goal = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = (mass <= goal).sum(dim=-1, keepdim=True)
    return (index if ids is None else ids.gather(1, index))[:, 0]


class Rule:
    """How one token is drawn, and which tokens end a response.

    Attributes:
        sampling: see `Sampling`.
        min_new_tokens: no stop id is drawn before this many tokens.
        stop: [M] ids that end a response.
    """

    def __init__(self, sampling: Sampling, min_new_tokens: int, stop: set[int]) -> None:
        self.sampling, self.min_new_tokens = sampling, min_new_tokens
        self.stop = torch.tensor(sorted(stop), dtype=torch.int64)

    def draw(self, logits: Tensor, uniform: Tensor, step: int | Tensor) -> Tensor:
        """[N, V] logits and [N] numbers in [0, 1) -> [N] ids; `step`: number of tokens drawn before."""
        if self.min_new_tokens:
            early = torch.as_tensor(step, device=logits.device) < self.min_new_tokens
            stop = self.stop.to(logits.device)
            kept = logits[:, stop]
            logits = logits.index_copy(1, stop, torch.where(early, float("-inf"), kept))
        return draw_tokens(logits, uniform, self.sampling)

    def ends(self, drawn: Tensor) -> Tensor:
        """[N] ids -> [N] bool: which of them end a response."""
        return (drawn[:, None] == self.stop.to(drawn.device)).any(dim=1)
