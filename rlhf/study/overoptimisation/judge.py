"""Rewards and golds as functions of prompts and responses, for policy gradient: a fitted setting read again from files.

A run of `prudent ppo` names them as FILE.py:reward and FILE.py:gold, so heads and distance may read any taps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....engine import EnsembleHead
from ....engine.taps import num_layers, parse_taps
from ....kernels import TrustRegion
from ...job.files import atomic_file, atomic_write_json
from ...models.embedded import embedded_model
from ...models.loading import load_language_model, load_tokenizer
from ...reward.fit import Scaling
from ...sampling.read_texts import forward
from ...sampling.turn import Turn
from . import golds
from .candidates import Candidates
from .config import OveroptimisationConfig, View
from .heads import Fitted
from .rewards import Arm, Scored, reward, unit_of
from .world import Reader, distances, reader, trust_region


class GoldJudge:
    """A gold scorer of texts in standard deviations of the training responses, as `World.gold`."""

    def __init__(self, name: str, training: dict[str, list[str]]) -> None:
        self._score = golds.scorer(name, training)
        values = torch.tensor(
            [value for prompt, texts in training.items() for value in self._score(prompt, texts)], dtype=torch.float64
        )
        self._mean, self._sd = float(values.mean()), float(values.std(correction=0))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        return [(self._score(prompt, [text])[0] - self._mean) / self._sd for prompt, text in pairs]


class RewardJudge:
    """One arm's reward, in units of its sd within a prompt, so that one KL coefficient means the same for every arm.

    Beside it every call measures, for PPO's metrics, the distance and BRME's heads.
    """

    def __init__(self, folder: Path, arm: Arm) -> None:
        given = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        name = given["model"] or str(embedded_model())
        self._model = load_language_model("model", name, getattr(torch, given["dtype"])).eval()
        self._turn = Turn(load_tokenizer("model", name), self._model)
        self._taps = parse_taps(given["taps"], num_layers(self._model))
        tensors = load_file(folder / "judge.safetensors")
        self._columns = {side: tensors[f"columns/{side}"] for side in ("heads", "distance")}
        scaling = Scaling(tensors["scaling/shift"], tensors["scaling/inverse"])
        self._reader = Reader(scaling, tensors.get("rotation"))
        self._region = TrustRegion(*(tensors[f"trust/{name}"] for name in TrustRegion._fields))
        self._heads = {name: _head(name, tensors) for name in given["heads"]}
        self._unit, self._arm = given["unit"], arm

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Any]:
        ids = [self._turn.read(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]
        starts = [min(len(self._turn.prompt(prompt)), len(row) - 1) for prompt, row in zip(prompts, ids, strict=True)]
        features = forward(self._model, ids, starts, self._taps, self._turn.special)[None]
        x = self._reader(features[..., self._columns["heads"]])
        outputs = {name: head(x[0], aggregation="mean") for name, head in self._heads.items()}
        mean, std = {name: out.mean[None] for name, out in outputs.items()}, outputs["brme"].std[None]
        distance = distances(self._region, features[..., self._columns["distance"]])
        scored = Scored(mean, std, torch.zeros_like(distance), self._unit)
        value = reward(self._arm, scored, distance)[0] / unit_of(self._arm, self._unit)
        heads = mean["brme"][0]
        return {
            "rewards": value.tolist(),
            "nominal": reward(Arm("BRME nominal"), scored)[0].tolist(),
            "worst": heads.amin(dim=1).tolist(),
            "mean": heads.tolist(),
            "std": std[0].tolist(),
            "distance": distance[0].tolist(),
        }


def _head(name: str, tensors: dict[str, Tensor]) -> EnsembleHead:
    state = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    rows, width = state["weight"].shape
    head = EnsembleHead(width, rows // 2, aggregation="mean")
    head.load_state_dict(state)
    return head


def save_judge(
    folder: Path, found: Candidates, view: View, fitted: Fitted, unit: dict[str, float], config: OveroptimisationConfig
) -> None:
    """Write judge.json and judge.safetensors: what `RewardJudge` reads."""
    read = reader(found, view.heads)
    region = trust_region(found, view.distance, config.directions)
    places = {
        side: torch.cat([torch.arange(found.columns[tap].start, found.columns[tap].stop) for tap in taps])
        for side, taps in view._asdict().items()
    }
    tensors = {
        **{f"columns/{side}": rows for side, rows in places.items()},
        "scaling/shift": read.scaling.shift,
        "scaling/inverse": read.scaling.inverse,
        **({} if read.rotation is None else {"rotation": read.rotation}),
        **{f"trust/{name}": tensor for name, tensor in region._asdict().items()},
        **{f"{name}/{key}": value for name, head in fitted.heads.items() for key, value in head.state_dict().items()},
    }
    with atomic_file(folder / "judge.safetensors") as temporary:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary)
    model = {"model": config.model, "dtype": config.samples.dtype, "taps": config.taps}
    atomic_write_json(folder / "judge.json", {**model, "heads": list(fitted.heads), "unit": unit})


def load_gold(folder: Path, name: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """The gold `name` for texts; `folder` holds training.json."""
    return GoldJudge(name, json.loads((folder / "training.json").read_text(encoding="utf-8")))
