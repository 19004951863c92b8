"""What a distance sees: its AUROC for each kind of foreign text against reference responses to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels import TRUST_DIRECTIONS, TrustRegion
from ...evaluation.statistics import auroc_interval
from ...sampling.foreign import ATTACKS
from .candidates import Candidates

_REFERENCE = 64  # responses to each prompt
_FOREIGN = 8  # texts of each attack kind to each prompt
_RESAMPLES = 200


def auroc_table(
    found: Candidates,
    tap_sets: Sequence[Sequence[str]],
    directions: Sequence[int],
    region_of: Callable[[Candidates, Sequence[str], int, bool], TrustRegion],
    distances: Callable[[TrustRegion, Tensor], Tensor],
) -> list[dict[str, Any]]:
    """A row for each set of taps and number of directions: the foreign kinds with (AUROC, low, high) over prompts.

    `degenerate` are both attack kinds together; `beyond` is the share of held-out responses beyond distance 1,
    about .05 if the region carries over to new prompts. The last row of each set, `by_prompt`, has the number of
    directions nearest to the op's default; its features count from the mean of the reference responses to the same
    prompt (`less_prompt_mean`).
    """
    usual = min(directions, key=lambda count: abs(count - TRUST_DIRECTIONS))
    rows = []
    texts = {kind: found.attack_features[:, i :: len(ATTACKS)][:, :_FOREIGN] for i, kind in enumerate(ATTACKS)}
    texts |= found.others
    for taps in tap_sets:
        reference = found.columns_of(taps, found.held_out_features[:, :_REFERENCE])
        foreign = {kind: found.columns_of(taps, features) for kind, features in texts.items()}
        for count, by_prompt in [*((count, False) for count in directions), (usual, True)]:
            region = region_of(found, taps, count, by_prompt)
            known = distances(region, less_prompt_mean(reference) if by_prompt else reference)
            centre = reference.float().mean(dim=1, keepdim=True) if by_prompt else 0
            seen = {kind: distances(region, features - centre) for kind, features in foreign.items()}
            seen["degenerate"] = torch.cat([seen[kind] for kind in ATTACKS], dim=1)
            rows.append(
                {
                    "taps": list(taps),
                    "directions": count,
                    "by_prompt": by_prompt,
                    "beyond": float((known > 1).double().mean()),
                    "kinds": {kind: _auroc(known, values) for kind, values in seen.items()},
                }
            )
    return rows


def less_prompt_mean(features: Tensor) -> Tensor:
    """[P, S, D] -> the same in fp32, each row less the mean of the S - 1 others of its prompt."""
    rows = features.float()
    return (rows - rows.mean(dim=1, keepdim=True)) * (rows.shape[1] / (rows.shape[1] - 1))


def _auroc(known: Tensor, foreign: Tensor) -> list[float | None]:
    """[P, N] and [P, n] -> (AUROC, low, high) with whole prompts resampled."""
    both = torch.cat([known, foreign], dim=1)
    positive = torch.arange(both.shape[1]).expand_as(both) >= known.shape[1]
    prompts = torch.arange(len(both))[:, None].expand_as(both)
    return list(auroc_interval(both.flatten(), positive.flatten(), prompts.flatten(), resamples=_RESAMPLES))
