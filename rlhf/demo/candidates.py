"""What the demo's rewards choose from: the model's own responses to held-out prompts, and foreign ones among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sampling.foreign import AGAIN, ATTACKS, OTHERS, ForeignText, foreign_texts
from ..sampling.read_texts import read_texts
from ..sampling.stored import Rollout

OWN, MIXTURE = "own", "mixture"
# reward -> P rollouts of the policy that PPO trained on it; their features [S, D] are the untrained language model's
Policies = dict[str, list[Rollout]]
SPREAD = 16  # tokens by which the prompts of a batch may differ, so that the short prompts share few batches
CHUNK = 128  # texts whose features are read at once and kept
OTHER_PROMPTS = 16  # that get one text of each kind that only the distance is measured on


class Candidates(NamedTuple):
    """N own responses to each of P held-out prompts, then A foreign texts.

    prompts    [P]   texts  [P][N + A]   kinds  [P][N + A], "" of the model's own
    features   [P, N + A, F], in the trunk's dtype
    pools      name -> [N] numbers of the candidates that a reward chooses from
    others     kind -> features [n, F] of foreign texts of other kinds, and of responses of the model read again, the
               first to prompt 0, the next to prompt 1, and so on
    """

    prompts: list[str]
    texts: list[list[str]]
    kinds: list[list[str]]
    features: Tensor
    pools: dict[str, Tensor]
    others: dict[str, Tensor]


def read_candidates(
    model: Any,
    tokenizer: Any,
    rollouts: Sequence[Rollout],
    foreign: float,
    taps: Sequence[str],
    folder: Path,
    *,
    seed: int,
    progress: bool,
) -> Candidates:
    """Make foreign texts from the responses, read them, and put them among the responses; `folder` keeps what is read.

    foreign: the share of foreign candidates in the mixture, of which the kinds of `ATTACKS` have about equal parts.
    """
    prompts, own = [str(rollout.prompt) for rollout in rollouts], [rollout.responses for rollout in rollouts]
    count, number = len(own[0]), max(1, round(foreign * len(own[0])))
    made = foreign_texts(prompts, own, tokenizer, number, 1, seed)
    attacks = [text for text in made if text.kind in ATTACKS]
    others = [text for text in made if text.kind not in ATTACKS and text.prompt < OTHER_PROMPTS]
    read = read_texts(
        model,
        tokenizer,
        [(prompts[text.prompt], text.text) for text in (*attacks, *others)],
        taps,
        folder,
        chunk=CHUNK,
        progress=progress,
    )
    features = torch.stack([rollout.features for rollout in rollouts])
    among = read[: len(attacks)].view(len(prompts), number, -1)
    rows: list[list[ForeignText]] = [[text for text in attacks if text.prompt == p] for p in range(len(prompts))]
    every = torch.arange(count + number)
    return Candidates(
        prompts,
        [said + [text.text for text in row] for said, row in zip(own, rows, strict=True)],
        [[""] * count + [text.kind for text in row] for row in rows],
        torch.cat([features, among], dim=1),
        {OWN: every[:count], MIXTURE: torch.cat([every[: count - number], every[count:]])},
        {
            kind: read[[len(attacks) + i for i, text in enumerate(others) if text.kind == kind]]
            for kind in (*OTHERS, AGAIN)
        },
    )
