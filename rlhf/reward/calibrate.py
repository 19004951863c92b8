"""Run `prudent calibrate`: refit a reward model's trust region, and the scales of its heads, on responses of a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead, Scorer, calibrate, fit_trust
from ...engine.text import Encoded, ItemError
from ...kernels import Aggregation
from ..data.pairs import name_unread
from ..data.reading import read_rows
from ..data.rows import RowError, items_of_row, object_of_row, unread_of_items
from ..evaluation.statistics import group_labels
from ..job.files import atomic_folder, atomic_write_json, refuse_mistyped
from ..models.adapter import is_reward_adapter, save_head
from ..models.features import compute_features
from ..models.loading import LoadedReward, load_reward, model_folder
from ..report.words import aligned, count, truncated_texts
from .calibrate_card import update_card
from .config import CalibrateConfig
from .region import distance_blocks

__all__ = ["CalibrateConfig", "CalibrateResult", "run_calibrate"]

_BLOCK_ROWS = 8192  # rows of features on the device at once
_WEIGHTS = shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class CalibrateResult:
    """folder: of the calibrated model. numbers: the content of calibration.json in it; str() is a short table."""

    folder: Path
    numbers: dict[str, Any]

    def __str__(self) -> str:
        n = self.numbers
        data = n["data"]
        shape = f"{count(n['directions'], 'direction')} of {n['features']} features"
        head = f"{count(data['responses'], 'response')} to {count(data['prompts'], 'prompt')}"
        rows = [["", "before", "after"]]
        rows += [[f"  {name}", *(_cell(n[when], key) for when in ("before", "after"))] for name, key in _LINES.items()]
        lines = [f"{self.folder}: trust region of {head}, {shape}", *aligned(rows).splitlines()]
        lines.append("Of responses that the fit has not seen, 5 % lie beyond distance 1.")
        if data["bad_rows"]:
            lines.append(f"broken rows skipped: {data['bad_rows']}")
        if data["truncated"]:
            lines.append(truncated_texts(data["truncated"], data["responses"]))
        return "\n".join([*lines, f"aggregation: {n['aggregation']}"])


_LINES = {
    "beyond distance 1, %": "beyond",
    "median distance": "median",
    "95 % quantile": "q95",
    "unit of the price": "unit",
    "scales of the heads": "scale",
}


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    value = numbers[key]
    if value is None:
        return "none"
    if isinstance(value, list):
        low, high = min(value), max(value)
        return f"{low:.3g}" if len(value) == 1 else f"{low:.3g} to {high:.3g}"
    return f"{100 * value:.1f}" if key == "beyond" else f"{value:.3f}"


class _Responses(NamedTuple):
    """features [N, D] on the CPU; prompts [N] int64 labels; counts of responses, prompts, bad_rows, truncated."""

    features: Tensor
    prompts: Tensor
    counts: dict[str, Any]


def run_calibrate(config: CalibrateConfig, *, progress: bool = True) -> CalibrateResult:
    """Refit the model's trust region to the responses in `config.data`, and write the model.

    A row is one that `prudent score` takes: a prompt with a response, messages, or a pair, both sides of which count.
    `cut` says how a response ends that `prudent sample` cut off (`"stopped": false`).
    With `scale_data`, the heads' shift, scale and std_ref are measured on those responses first (BRME, arXiv
    2409.15360, appendix F, takes a fixed set for all models); the region's unit follows. The weights stay. The model's
    folder is exchanged for the new one in a single step; it gets calibration.json, and the adapter/ beside it, from
    `prudent train` in mode lora, gets the same heads.

    Raises:
        ValueError: for a broken row, naming file and line (unless skip_bad_rows), fewer than 20 responses, a model or
            an aggregation that cannot be used, or an output that exists.
    """
    target = _target(config)
    reward = load_reward("model", config.model, append_eos=config.append_eos)
    scorer = reward.scorer(config.batch_tokens, config.max_length, progress)
    head: EnsembleHead = scorer.model.score
    spec = head.aggregation if config.aggregation is None else Aggregation.parse(config.aggregation)
    spec.check_heads(head.num_heads)
    data = _read(config, "data", scorer, progress)
    before = _measured(head, data.features)
    scale_counts = None
    if config.scale_data is not None:
        other = data if config.scale_data == config.data else _read(config, "scale_data", scorer, progress)
        scale_counts = other.counts
        _named("scale_data", config.scale_data, calibrate, head, other.features)
    options: dict[str, Any] = {"directions": config.directions, "shrinkage": config.shrinkage}
    options["blocks"] = distance_blocks(scorer.model.config)
    region = _named("data", config.data, fit_trust, data.features, prompts=data.prompts, head=head, **options)
    head.set_trust(region)
    head.aggregation = spec
    numbers = {
        "config": config.model_dump(mode="json"),
        "data": data.counts,
        "scale_data": scale_counts,
        "features": head.hidden_size,
        "directions": len(region.weights),
        "aggregation": str(spec),
        "before": before,
        "after": _measured(head, data.features),
    }
    _write(reward, target, numbers, config)
    return CalibrateResult(target, numbers)


def _target(config: CalibrateConfig) -> Path:
    """The folder to write; refuse one that holds something else, before anything is computed."""
    refuse_mistyped("model", config.model)
    source = Path(model_folder(config.model))
    if config.output is None:
        if not (source / "config.json").is_file():
            raise ValueError(f"output: expected a folder, because {config.model} is no folder to replace, got none")
        kinds = json.loads((source / "config.json").read_text(encoding="utf-8")).get("architectures") or []
        if "EnsembleRewardModel" not in kinds:
            raise ValueError(
                f"output: expected a folder, because {config.model} is a {', '.join(kinds)}, which stays as it is, "
                "got none"
            )
        return source
    same = source.is_dir() and config.output.is_dir() and source.samefile(config.output)
    if config.output.exists() and not same:
        raise ValueError(f"output: expected a new folder, got {config.output}, which exists")
    return config.output


def _named(key: str, name: str, function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a function of the engine; its error gets the config key and the file in place of its own argument."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"{key}: {name}: {str(error).rpartition('features: ')[2]}") from error


def _read(config: CalibrateConfig, key: str, scorer: Scorer, progress: bool) -> _Responses:
    """Read a file's responses and compute what the heads read of them."""
    name = getattr(config, key)
    texts: list[Encoded] = []
    names, prompts, bad = [], [], 0
    unread: dict[str, None] = {}
    for row in _rows(config, key, name, scorer):
        bad += not row.texts
        texts += row.texts
        names += [row.where] * len(row.texts)
        prompts += row.prompts
        unread |= dict.fromkeys(row.unread)
    name_unread(key, name, unread)
    if not texts:
        raise ValueError(f"{key}: {name}: expected responses, got none" + f" ({bad} broken rows)" * (bad > 0))
    if config.feature_cache is None:
        features = scorer.features(texts)
    else:
        features = compute_features(scorer, texts, config.feature_cache, progress, names).features
    labels, truncated = group_labels(prompts), sum(text.truncated for text in texts)
    counts = {"responses": len(texts), "prompts": int(labels.max()) + 1, "bad_rows": bad, "truncated": truncated}
    return _Responses(features, labels, counts)


class _Row(NamedTuple):
    """A row's responses, none if it is broken; the key of each one's prompt; the columns that nothing reads."""

    where: str
    texts: list[Encoded]
    prompts: list[str]
    unread: list[str]


def _rows(config: CalibrateConfig, key: str, name: str, scorer: Scorer) -> Iterator[_Row]:
    for number, (where, row) in enumerate(read_rows(key, name)):
        if config.limit is not None and number >= config.limit:
            return
        try:
            value = object_of_row(row)
            items = items_of_row(value)
            if config.cut == "open" and value.get("stopped") is False:
                items = [{"complete": False, **item} for item in items]
            yield _Row(where, [scorer.read(item) for item in items], [*map(_prompt_key, items)], unread_of_items(value))
        except (RowError, ItemError) as error:
            if not config.skip_bad_rows:
                reason = error.reason if isinstance(error, ItemError) else str(error)
                raise ValueError(f"{key}: {where}: {reason}") from None
            yield _Row(where, [], [], [])


def _prompt_key(item: Mapping[str, Any]) -> str:
    """A string that is equal for equal prompts only; of messages, all but the last are the prompt."""
    prompt = item["prompt"] if "prompt" in item else [*item["messages"][:-1]]
    return json.dumps([prompt, item.get("tools")], sort_keys=True, ensure_ascii=False)


@torch.no_grad()
def _measured(head: EnsembleHead, features: Tensor) -> dict[str, Any]:
    """beyond, median, q95: of the distances of `features`, None without a trust region; unit; shift and scale [K]."""
    region = head.trust
    found: dict[str, Any] = dict.fromkeys(("beyond", "median", "q95", "unit"))
    if region is not None:
        blocks = [head(block.to(head.weight.device), aggregation="mean") for block in features.split(_BLOCK_ROWS)]
        distance = torch.cat([block.distance for block in blocks if block.distance is not None]).double().cpu()
        found = {
            "beyond": float((distance > 1).double().mean()),
            "median": float(distance.median()),
            "q95": float(distance.sort().values[round(0.95 * (len(distance) - 1))]),
            "unit": float(region.unit),
        }
    return {**found, "shift": head.shift.tolist(), "scale": head.scale.tolist()}


def _write(reward: LoadedReward, target: Path, numbers: dict[str, Any], config: CalibrateConfig) -> None:
    """Write the model and its card, with every other file of its folder, and its heads in the adapter/ beside it."""
    model, source = reward.model, Path(reward.source)
    with atomic_folder(target) as folder:
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True, ignore=_WEIGHTS)
        else:
            reward.tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        atomic_write_json(folder / "calibration.json", numbers)
        update_card(folder, target, model.config, numbers, config)
    adapter = target.parent / "adapter"
    if source.is_dir() and source.samefile(target) and is_reward_adapter(adapter):
        reading = {name: getattr(model.config, name) for name in ("append_eos", "max_score_length", "taps")}
        with atomic_folder(adapter) as folder:
            shutil.copytree(adapter, folder, dirs_exist_ok=True)
            save_head(model.score, folder, **reading)
            update_card(folder, adapter, model.config, numbers, config)
