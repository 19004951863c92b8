"""What fits on a card: the memory of rollout, scoring and update, computed from a model's shape and a job's sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PHASES = ("rollout", "scoring", "update")
Phase = Literal["rollout", "scoring", "update"]


def parse_size(text: str | int) -> int:
    """Bytes: a number, or text such as 80GB (10^9), 80GiB (2^30), 512MB, 1.5TB. Cards are sold in GB and hold a little
    more.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    size = 0.0
    if found:
        power = " kmgt".index(found[2].lower() or " ")
        size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if size < 1:
        raise ValueError(f"size: expected bytes as 80GB (10^9), 80GiB (2^30) or a whole number, got {text!r}")
    return int(size)


class ModelShape(NamedTuple):
    """What the memory of a decoder follows from. matrices: (inputs, outputs) of each linear layer of one block, what
    LoRA adapts; parameters: of the whole, the vocabulary included."""

    name: str
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    matrices: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: Any, name: str = "") -> ModelShape:
        """The shape of a transformers config, its parameters counted on the meta device (no weights)."""
        raise NotImplementedError


@dataclass(frozen=True)
class JobShape:
    """The sizes of one step of the loop; tokens are those of the longest prompt and response."""

    prompts: int = 64
    samples: int = 1
    prompt_tokens: int = 512
    response_tokens: int = 512


class Budget(NamedTuple):
    """terms: phase -> term -> bytes at its peak."""

    terms: dict[str, dict[str, int]]

    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(sum(phase.values()) for phase in self.terms.values())


def plan(shape: ModelShape, job: JobShape, micro_tokens: int) -> Budget:
    """Every phase's terms with micro-batches of `micro_tokens`."""
    raise NotImplementedError


def micro_tokens(shape: ModelShape, job: JobShape, limit: int) -> int:
    """The most tokens in one forward and backward pass with which every phase stays within `limit` bytes; 0 if none."""
    raise NotImplementedError
