"""Sample the reference policy, read foreign texts with the same taps, and keep both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....engine.taps import columns_of, num_layers, parse_taps
from ...models.embedded import embedded_model
from ...models.loading import load_language_model, load_tokenizer
from ...sampling.foreign import AGAIN, ATTACKS, OTHERS, foreign_texts
from ...sampling.prompts import read_prompts
from ...sampling.read_texts import read_texts
from ...sampling.stored import Request, sample
from ...sampling.tokens import Sampling
from ..openings import openings
from .config import OveroptimisationConfig


class Candidates(NamedTuple):
    """Texts and features, in the trunk's dtype, with the taps' columns one after another.

    training        prompt -> its S responses; features [T, S, F]
    held_out        prompt -> its N responses; features [P, N, F]
    attacks         [P][A] foreign texts of the kinds `ATTACKS` in turn; features [P, A, F]
    others          kind -> [P, n, F]
    columns         tap -> its columns of F
    """

    training: dict[str, list[str]]
    training_features: Tensor
    held_out: dict[str, list[str]]
    held_out_features: Tensor
    attacks: list[list[str]]
    attack_features: Tensor
    others: dict[str, Tensor]
    columns: dict[str, slice]

    def columns_of(self, taps: Sequence[str], features: Tensor) -> Tensor:
        """[..., F] -> [..., D], the columns of `taps`."""
        return torch.cat([features[..., self.columns[tap]] for tap in taps], dim=-1)


def attack_count(config: OveroptimisationConfig) -> int:
    """Foreign candidates that the mixture with the most of them takes, an even number."""
    return 2 * -(-round(max(config.shares) * config.samples.candidates) // 2)


def load_candidates(config: OveroptimisationConfig, *, progress: bool = True) -> Candidates:
    """Sample and read, or return what the folders hold.

    Raises:
        ValueError: for a model or prompts that cannot be used, or folders of another request.
    """
    given = config.samples
    name = config.model or str(embedded_model())
    model = load_language_model("model", name, getattr(torch, given.dtype)).eval()
    tokenizer = load_tokenizer("model", name)
    prompts = _prompts(given.prompts, given.held_out)
    held_out = set(random.Random(given.seed).sample(range(len(prompts)), given.held_out))
    requests = [Request(p, given.candidates if i in held_out else given.training) for i, p in enumerate(prompts)]
    taps = parse_taps(config.taps, num_layers(model))
    rollouts = sample(
        model,
        tokenizer,
        requests,
        given.folder or config.output / "samples",
        Sampling(given.max_new_tokens, given.temperature, given.top_k, given.top_p),
        seed=given.seed,
        batch_rows=given.batch_rows,
        taps=taps,
        progress=progress,
    )
    training, judged = ([r for i, r in enumerate(rollouts) if (i in held_out) == held] for held in (False, True))
    asked, said = [str(r.prompt) for r in judged], [r.responses for r in judged]
    texts = foreign_texts(asked, said, tokenizer, attack_count(config), config.others, given.seed)
    items = [(asked[text.prompt], text.text) for text in texts]
    read = read_texts(model, tokenizer, items, taps, config.output / "foreign", progress=progress)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault("attack" if text.kind in ATTACKS else text.kind, []).append(row)
    count = len(asked)
    attacks = [texts[row].text for row in rows["attack"]]
    each = len(attacks) // count
    return Candidates(
        training={str(r.prompt): r.responses for r in training},
        training_features=torch.stack([r.features for r in training]),
        held_out=dict(zip(asked, said, strict=True)),
        held_out_features=torch.stack([r.features for r in judged]),
        attacks=[attacks[i : i + each] for i in range(0, len(attacks), each)],
        attack_features=read[rows["attack"]].view(count, each, -1),
        others={kind: read[rows[kind]].view(count, config.others, -1) for kind in (*OTHERS, AGAIN)},
        columns=dict(zip(config.taps, columns_of(taps, model.get_input_embeddings().embedding_dim), strict=True)),
    )


def _prompts(source: str | None, held_out: int) -> list[str]:
    found = openings() if source == "openings" else read_prompts(None if source is None else Path(source), held_out)
    if len(found) < held_out + 10:
        raise ValueError(f"samples.prompts: expected at least {held_out + 10} different prompts, got {len(found)}")
    return found
