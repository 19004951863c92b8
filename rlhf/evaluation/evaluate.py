"""Run `prudent eval`: evaluate a reward model on preference pairs, as a table, a JSON file and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine import Aggregation, EnsembleHead, Scorer
from ...kernels import aggregate
from ..data.pairs import (
    PairData,
    PreferencePair,
    both_sides,
    load_pairs,
    names_of_sides,
    readable_pairs,
    split_by_prompt,
)
from ..job.files import atomic_write_json
from ..models.features import compute_features, model_fingerprint
from ..models.loading import load_reward, says_append_eos
from ..report.fit import read_fit
from ..report.style import require_matplotlib
from ..report.words import plain_text, truncated_texts
from .config import EvalConfig
from .metrics import evaluate_heads, source_labels
from .report import LONGER, draw, format_metrics
from .scored_pairs import SINGLE, Pairs, Side, finite_pairs, pairs_of

__all__ = ["EvalConfig", "EvalResult", "evaluate_heads", "run_eval"]

_PICTURES = ("accuracy", "margin", "coverage", "reliability", "head_correlation", "scoring", "std", "fit")
_BLOCK_ROWS = 8192  # rows of features on the device at once


@dataclass(frozen=True)
class EvalResult:
    """folder: holds eval.json and the pictures; metrics: the content of eval.json; str() is a short table."""

    folder: Path
    metrics: dict[str, Any]
    pictures: list[Path]

    def __str__(self) -> str:
        files = ", ".join(["eval.json", *(path.name for path in self.pictures)])
        cut = self.metrics["truncated"]
        warning = truncated_texts(cut["texts"], cut["of"])
        return "\n\n".join([format_metrics(self.metrics), *([warning] if warning else []), f"{self.folder}: {files}"])


def run_eval(config: EvalConfig, *, progress: bool = True) -> EvalResult:
    """Score the pairs of `config.data` with `config.model` and write the evaluation to the folder `config.output`.

    Pairs with a reward that is not finite are left out and counted. With skip_bad_rows, so are rows that the chat
    template or the tokeniser of the model, or of `compare`, cannot read.

    Raises:
        ValueError: for data, an aggregation or a model that cannot be used.
        ImportError: before anything is scored, if pictures are requested and matplotlib is not installed.
    """
    spec = None if config.aggregation is None else Aggregation.parse(config.aggregation)
    if config.pictures:
        require_matplotlib()
    data = _load(config, "data", progress)
    foreign_data = None if config.foreign is None else _load(config, "foreign", progress)
    pairs = data.pairs
    if config.eval_fraction:
        pairs = split_by_prompt(pairs, config.eval_fraction, config.split_seed)[1]
    scorers = [_scorer(config, key, progress) for key in ("model", "compare") if getattr(config, key) is not None]
    scorer = scorers[0]
    head: EnsembleHead = scorer.model.score
    spec = (spec or head.aggregation).with_centre("none")
    spec.check_heads(head.num_heads)
    head.check_price(spec)
    pairs = _readable(config, "data", pairs, data.counts, scorers, progress)
    features, truncated = _features(scorer, pairs, config, progress)
    chosen, rejected = _outputs(head, features)
    compare = _compared(config, scorers, features, pairs, progress)
    foreign = None
    if foreign_data is not None:
        others = _readable(config, "foreign", foreign_data.pairs, foreign_data.counts, scorers[:1], progress)
        foreign = _outputs(head, _features(scorer, others, config, progress)[0])
    std_ref = head.std_ref.detach().cpu()
    unit = None if head.trust is None else head.trust.unit.cpu()
    sources = [pair.source for pair in pairs] if len({pair.source for pair in pairs}) > 1 else None
    evaluation = evaluate_heads(
        chosen,
        rejected,
        aggregation=spec,
        std_ref=std_ref,
        unit=unit,
        prompts=[pair.prompt_key for pair in pairs],
        sources=sources,
        scores=_given_scores(pairs),
        compare=compare | {LONGER: _lengths(pairs)},
        features=features,
        foreign=foreign,
        resamples=config.resamples,
        seed=config.seed,
    )
    cut = {"texts": truncated, "of": 2 * len(pairs), "max_length": scorer.max_length}
    counts = {"data": data.counts} | ({} if foreign_data is None else {"foreign_data": foreign_data.counts})
    fit = read_fit(config.model)
    how = {} if fit is None else {"fit": fit}
    metrics = {"config": config.model_dump(mode="json"), **counts, "truncated": cut, **how, **evaluation}
    atomic_write_json(config.output / "eval.json", metrics)
    pictures = []
    if config.pictures:
        finite = finite_pairs(chosen, rejected, spec, std_ref, compare)
        drawn = pairs_of(chosen, rejected, finite, spec, std_ref, unit)
        others_drawn = {name: (c[finite], r[finite]) for name, (c, r) in compare.items()}
        labels = None if sources is None else source_labels(sources, finite)
        foreign_drawn = _foreign_pairs(foreign, drawn)
        pictures = draw(config.output, metrics, drawn, others_drawn, foreign_drawn, labels)
    for path in {config.output / f"{name}.png" for name in _PICTURES} - set(pictures):
        path.unlink(missing_ok=True)  # of an earlier evaluation
    return EvalResult(config.output, metrics, pictures)


def _load(config: EvalConfig, key: str, progress: bool) -> PairData:
    return load_pairs(
        getattr(config, key),
        key=key,
        min_score_gap=config.min_score_gap,
        skip_bad_rows=config.skip_bad_rows,
        limit=config.limit,
        progress=progress,
    )


def _scorer(config: EvalConfig, key: str, progress: bool) -> Scorer:
    """Load the scorer of the model under `key`; `append_eos` applies to models whose config does not record it."""
    name, append_eos = str(getattr(config, key)), config.append_eos
    if config.compare is not None and says_append_eos(key, name):
        other = {"model": ("compare", config.compare), "compare": ("model", config.model)}[key]
        append_eos = append_eos if says_append_eos(*other) else None
    reward = load_reward(key, name, append_eos=append_eos)
    return reward.scorer(config.batch_tokens, config.max_length, progress)


def _readable(
    config: EvalConfig,
    key: str,
    pairs: Sequence[PreferencePair],
    counts: dict[str, Any],
    scorers: Sequence[Scorer],
    progress: bool,
) -> list[PreferencePair]:
    (kept,) = readable_pairs(
        [pairs],
        [scorer.encode for scorer in scorers],
        counts,
        skip_bad_rows=config.skip_bad_rows,
        progress=progress,
        key=key,
    )
    return kept


def _features(
    scorer: Scorer, pairs: Sequence[PreferencePair], config: EvalConfig, progress: bool
) -> tuple[tuple[Tensor, Tensor], int]:
    """Hidden states of the chosen and of the rejected responses, [P, F] each, on the CPU in the trunk's dtype; and the
    number of the 2P texts that lost their beginning."""
    items = both_sides(pairs)
    if config.feature_cache is None:
        names = names_of_sides(pairs)
        read = [scorer.read(item, name) for item, name in zip(items, names, strict=True)]
        features, truncated = scorer.features(read), sum(each.truncated for each in read)
    else:
        found = compute_features(scorer, items, config.feature_cache, progress, names_of_sides(pairs))
        features, truncated = found.features, int(found.truncated.sum())
    return (features[: len(pairs)], features[len(pairs) :]), truncated


@torch.no_grad()
def _outputs(head: EnsembleHead, features: tuple[Tensor, Tensor]) -> tuple[Side, Side]:
    """Compute the heads on both sides; return their outputs on the CPU."""
    sides = []
    for side in features:
        blocks = [head(block.to(head.weight.device), aggregation="mean") for block in side.split(_BLOCK_ROWS)]
        distance = [block.distance for block in blocks if block.distance is not None]
        mean, std = (torch.cat([getattr(block, name) for block in blocks]).cpu() for name in ("mean", "std"))
        sides.append(Side(mean, std, torch.cat(distance).cpu() if distance else None))
    return sides[0], sides[1]


def _compared(
    config: EvalConfig,
    scorers: Sequence[Scorer],
    features: tuple[Tensor, Tensor],
    pairs: Sequence[PreferencePair],
    progress: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> the compared model's rewards of both sides [P]; the features are reused if its trunk is the same."""
    if len(scorers) == 1:
        return {}
    scorer, other = scorers
    same_trunk = model_fingerprint(other.model) == model_fingerprint(scorer.model)
    # another tokeniser, template, append_eos or max_score_length reads other tokens
    if not same_trunk or any(other.read(item) != scorer.read(item) for item in both_sides(pairs)):
        features, _ = _features(other, pairs, config, progress)
    head: EnsembleHead = other.model.score
    spec = head.aggregation.with_centre("none")
    std_ref = head.std_ref.detach().cpu()
    unit = None if head.trust is None else head.trust.unit.cpu()
    chosen, rejected = (
        aggregate(o.mean, o.std, o.mean, spec, std_ref, o.distance, unit) for o in _outputs(head, features)
    )
    single = head.num_heads == 1 < scorer.model.score.num_heads
    return {SINGLE if single else "compared model": (chosen, rejected)}


def _given_scores(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """The annotated scores of both sides [P], NaN for a response without one."""
    return (
        torch.tensor([math.nan if pair.chosen_score is None else pair.chosen_score for pair in pairs]),
        torch.tensor([math.nan if pair.rejected_score is None else pair.rejected_score for pair in pairs]),
    )


def _lengths(pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """Characters of both responses [P]."""
    texts = [(plain_text(pair.chosen), plain_text(pair.rejected)) for pair in pairs]
    return torch.tensor([float(len(c)) for c, _ in texts]), torch.tensor([float(len(r)) for _, r in texts])


def _foreign_pairs(foreign: tuple[Side, Side] | None, own: Pairs) -> Pairs | None:
    if foreign is None:
        return None
    finite = finite_pairs(*foreign, own.spec, own.std_ref, {})
    return pairs_of(*foreign, finite, own.spec, own.std_ref, own.unit)
