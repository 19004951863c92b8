"""What all settings of the study share: features that heads read, distances and golds, computed once and kept in
files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....engine.trust import fit_trust
from ....engine.weights import reading_weights
from ....kernels import TrustRegion
from ...job.files import atomic_file, atomic_write_json
from ...reward.fit import Scaling, standardise
from . import golds
from .candidates import Candidates, load_candidates
from .config import OveroptimisationConfig, View
from .detection import auroc_table, less_prompt_mean

_WIDEST = 768  # columns that heads read as they are; of more, they read a rotation of the first principal directions
_PROJECTED = 512  # a power of two, for the Hadamard matrix
_ROWS = 8192  # of features in fp64 at once


class Both(NamedTuple):
    """training [T, S, ...] of the responses that pairs are made of, and candidates [P, N + A, ...]: the reference
    policy's N responses to each held-out prompt, then A foreign texts."""

    training: Tensor
    candidates: Tensor


class World:
    """Read what `prepare` has written into `config.output`."""

    def __init__(self, config: OveroptimisationConfig) -> None:
        self._folder = config.output / "prepared"

    def features(self, taps: Sequence[str]) -> Both:
        """fp32, standardised; more than 768 columns are projected on 512."""
        return self._read(f"heads-{slug(taps)}")

    def distance(self, taps: Sequence[str]) -> Both:
        """fp32; 1 is the edge of the reference responses."""
        return self._read(f"distance-{slug(taps)}")

    def gold(self, name: str) -> Both:
        """fp64, in standard deviations of the training responses, whose mean is 0."""
        return self._read(f"gold-{name}")

    def _read(self, name: str) -> Both:
        file = self._folder / f"{name}.safetensors"
        with reading_weights(file), safe_open(file, "pt") as stored:
            return Both(stored.get_tensor("training"), stored.get_tensor("candidates"))


def slug(taps: Sequence[str]) -> str:
    """A file name of some taps."""
    return "_".join(taps).replace(":", ".").replace("/", "of")


def prepare(config: OveroptimisationConfig, *, progress: bool = True) -> None:
    """Write what is missing of `World`, and auroc.json: what each distance sees of each foreign kind."""
    views = [View.parse(text) for text in config.views]
    makers: dict[str, Callable[[Candidates], Both]] = {}
    for view in views:
        makers[f"heads-{slug(view.heads)}"] = partial(_features, view.heads)
        makers[f"distance-{slug(view.distance)}"] = partial(_distance, view.distance, config.directions)
    for name in (*config.golds, *config.tuning_golds):
        makers[f"gold-{name}"] = partial(_gold, name, config.taps[0])
    folder = config.output / "prepared"
    missing = {name: make for name, make in makers.items() if not (folder / f"{name}.safetensors").is_file()}
    table = config.output / "auroc.json"
    sets = list({(tap,): None for tap in config.taps} | {view.distance: None for view in views})
    measured = table.is_file() and [*dict.fromkeys(tuple(row["taps"]) for row in read_auroc(config.output))] == sets
    if not missing and measured:
        return
    found = load_candidates(config, progress=progress)
    for name, make in missing.items():
        both = make(found)
        with atomic_file(folder / f"{name}.safetensors") as temporary:
            save_file({key: value.contiguous() for key, value in both._asdict().items()}, temporary)
    if not measured:
        atomic_write_json(table, auroc_table(found, sets, config.measured_directions, trust_region, distances))


def read_auroc(folder: Path) -> list[dict[str, Any]]:
    """The rows of auroc.json."""
    rows: list[dict[str, Any]] = json.loads((folder / "auroc.json").read_text(encoding="utf-8"))
    return rows


def _joined(found: Candidates, taps: Sequence[str]) -> Both:
    parts = [found.columns_of(taps, features) for features in (found.held_out_features, found.attack_features)]
    return Both(found.columns_of(taps, found.training_features), torch.cat(parts, dim=1))


class Reader(NamedTuple):
    """What heads read of raw features: standardised, and rotated if there are more than 768 columns."""

    scaling: Scaling
    rotation: Tensor | None

    def __call__(self, features: Tensor) -> Tensor:
        """[A, B, D] -> [A, B, D or 512] fp32."""
        blocks = [self.scaling(block) for block in features.flatten(0, 1).split(_ROWS)]
        rows = torch.cat([block if self.rotation is None else block @ self.rotation for block in blocks])
        return rows.view(*features.shape[:2], -1)


def reader(found: Candidates, taps: Sequence[str]) -> Reader:
    """Measured on the training responses."""
    rows = found.columns_of(taps, found.training_features).flatten(0, 1)
    scaling = standardise(rows)
    return Reader(scaling, _rotation(scaling(rows)) if rows.shape[1] > _WIDEST else None)


def _features(taps: Sequence[str], found: Candidates) -> Both:
    read = reader(found, taps)
    return Both(*(read(features) for features in _joined(found, taps)))


def _rotation(rows: Tensor) -> Tensor:
    """[D, 512] fp32: the first principal directions, turned so that every column has the same variance.

    Every fit standardises its columns, which would blow up the principal directions with little variance. After a
    Hadamard rotation each column is a sum of all directions with signs, so that standardising changes nothing.
    """
    from scipy.linalg import hadamard

    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in rows.split(_ROWS):
        covariance += block.double().T @ block.double()
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -_PROJECTED:]
    mixing = torch.from_numpy(hadamard(_PROJECTED)).double() / _PROJECTED**0.5
    rotation: Tensor = (directions @ mixing).float()
    return rotation


def trust_region(found: Candidates, taps: Sequence[str], directions: int, by_prompt: bool = False) -> TrustRegion:
    """Fitted on the training prompts' responses; `by_prompt`: less the mean of the others of their prompt."""
    features = found.columns_of(taps, found.training_features)
    if by_prompt:
        features = less_prompt_mean(features)
    prompts = torch.arange(features.shape[0]).repeat_interleave(features.shape[1])
    blocks = None
    if "logprob" in taps:
        sizes = [found.columns[tap].stop - found.columns[tap].start for tap in taps]
        blocks = torch.tensor([tap == "logprob" for tap in taps]).long().repeat_interleave(torch.tensor(sizes))
    return fit_trust(features.flatten(0, 1), directions=directions, prompts=prompts, blocks=blocks)


def distances(region: TrustRegion, features: Tensor) -> Tensor:
    """[..., D] -> [...] fp32, by the definition in `TrustRegion`, in fp64."""
    mean, precision, directions, weights = (tensor.double() for tensor in region[:4])
    parts = []
    for block in features.flatten(0, -2).split(_ROWS):
        centred = block.double() - mean
        square = centred.square() @ precision + (centred @ directions.T).square() @ weights
        parts.append(square.clamp_min(0).sqrt().float())
    return torch.cat(parts).view(features.shape[:-1])


def _distance(taps: Sequence[str], directions: int, found: Candidates) -> Both:
    region = trust_region(found, taps, directions)
    return Both(*(distances(region, features) for features in _joined(found, taps)))


def _gold(name: str, tap: str, found: Candidates) -> Both:
    """Standardised on the training responses."""
    groups = [
        [*found.training.items()],
        [
            (prompt, [*own, *foreign])
            for (prompt, own), foreign in zip(found.held_out.items(), found.attacks, strict=True)
        ],
    ]
    if name == "linear":
        both = _joined(found, [tap])
        scale = standardise(both.training.flatten(0, 1))
        values = [golds.linear(scale(side.flatten(0, 1))).view(side.shape[:2]) for side in both]
    else:
        judge = golds.scorer(name, found.training)
        values = [torch.tensor([judge(*row) for row in rows], dtype=torch.float64) for rows in groups]
    mean, sd = values[0].mean(), values[0].std(correction=0)
    return Both(*((value - mean) / sd for value in values))
