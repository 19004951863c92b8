"""The stage `pet` of `prudent train`: sample the reference policy once, then make a trained reward pessimistic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....engine import EnsembleHead, EnsembleRewardModel, Scorer
from ....engine.config import max_positions
from ...data.pairs import PreferencePair
from ...job.files import atomic_write_json, read_json
from ...job.log import RunLog
from ...models.features import compute_features, model_fingerprint
from ...models.loading import load_language_model, load_tokenizer
from ...sampling.stored import Request, Rollout, sample
from ...sampling.tokens import Sampling
from ...sampling.turn import Turn
from ..config import TrainConfig
from .fit import PETFeatures, fit_pet
from .objective import PETConfig


class References(NamedTuple):
    """Responses of the reference policy: rollouts, n (or n + 1) each; row: prompt_key -> its number in `rollouts`;
    skipped: prompts too long for a response. own: whether the rollouts' features are those that the reward reads."""

    rollouts: list[Rollout]
    row: dict[str, int]
    skipped: int
    own: bool


@dataclass(frozen=True)
class PETStage:
    """What the stage is about. seed: the run's with pet.seed added; aggregation: what is made pessimistic."""

    config: TrainConfig
    seed: int
    aggregation: str
    train: list[PreferencePair]
    held_out: list[PreferencePair]
    log: RunLog
    progress: bool
    device: str

    @property
    def pet(self) -> PETConfig:
        """The config, with the run's seed in it."""
        return self.config.pet.model_copy(update={"seed": self.seed})

    def heads(
        self,
        scorer: Scorer,
        start: EnsembleHead,
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor] | None,
        margins: tuple[Tensor | None, Tensor | None],
    ) -> tuple[EnsembleHead, dict[str, Any]]:
        """Mode head: (the pessimistic head, what train.json says of it).

        scorer: reads texts as the reward does.   train, held_out: features [P, D] of chosen and rejected.
        """
        references = self.references(scorer)
        features = self._features(scorer, references)
        data = self._data(train, self.train, margins[0], features, references)
        evaluation = None if held_out is None else self._data(held_out, self.held_out, margins[1], features, references)
        fit = fit_pet(
            start,
            data,
            self.pet,
            aggregation=self.aggregation,
            evaluation=evaluation,
            log=self.log,
            progress=self.progress,
            checkpoint=self.config.output / "checkpoints" / "pet.pt",
        )
        fit.head.aggregation = self.aggregation
        return fit.head, self.summary(references, fit.before, fit.after)

    def references(self, scorer: Scorer) -> References:
        """The reference policy's responses to the prompts of the training pairs, and to those of the held-out ones,
        which only measure; sampled, or read from an earlier start of the run."""
        config, pet = self.config, self.config.pet
        tokenizer = load_tokenizer("model", config.model)
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        model = load_language_model("model", config.model, dtype).to(self.device).eval()
        turn = Turn(tokenizer, model)
        room = pet.max_new_tokens + len(turn.closing)
        limit = max_positions(model.config)
        prompts, skipped = {}, 0
        for pairs in (self.train, self.held_out):
            chosen = _distinct(pairs, pet.prompts, self.seed)
            fits = {k: p for k, p in chosen.items() if limit is None or len(turn.prompt(p)) + room <= limit}
            skipped += len(chosen) - len(fits)
            prompts.update(fits)
        if not any(pair.prompt_key in prompts for pair in self.train):
            raise ValueError(
                f"pet.max_new_tokens: expected room for {room} tokens behind some prompt in the model's {limit}, "
                "got none"
            )
        count = pet.samples + (pet.reference == "sample")
        sampling = Sampling(pet.max_new_tokens, pet.temperature, pet.top_k or len(tokenizer), pet.top_p)
        folder = pet.cache or config.output / "reference"
        _claim(folder, {"model": model_fingerprint(model), "seed": self.seed, **sampling._asdict()})
        requests = [Request(prompt, count) for prompt in prompts.values()]
        options: dict[str, Any] = {"seed": self.seed, "batch_rows": pet.batch_rows, "progress": self.progress}
        rollouts = sample(model, tokenizer, requests, folder, sampling, **options)
        longest = room + max(len(turn.prompt(prompt)) for prompt in prompts.values())
        own = _reads_alike(model, turn, scorer, longest)
        return References(rollouts, {key: row for row, key in enumerate(prompts)}, skipped, own)

    def _features(self, scorer: Scorer, references: References) -> Tensor:
        """[X, S, D] on the CPU: what one fit reads of them goes to the device once."""
        if references.own:
            return torch.stack([rollout.features for rollout in references.rollouts])
        items = [{"prompt": r.prompt, "response": text} for r in references.rollouts for text in r.responses]
        names = [f"sample {s} of {r.prompt!r:.60}" for r in references.rollouts for s in range(len(r.responses))]
        folder = self.config.features or self.config.output / "features"
        flat = compute_features(scorer, items, folder, self.progress, names).features
        return flat.view(len(references.rollouts), -1, flat.shape[1])

    def _data(
        self,
        sides: tuple[Tensor, Tensor],
        pairs: list[PreferencePair],
        margin: Tensor | None,
        features: Tensor,
        references: References,
    ) -> PETFeatures:
        """Pairs with the samples of their own prompts, renumbered."""
        rows = sorted({references.row[p.prompt_key] for p in pairs if p.prompt_key in references.row})
        place = {row: i for i, row in enumerate(rows)}
        prompt = [place[references.row[p.prompt_key]] if p.prompt_key in references.row else -1 for p in pairs]
        own = features[rows].to(self.device)
        n = self.config.pet.samples
        extra = own[:, n] if self.config.pet.reference == "sample" else None
        return PETFeatures(*sides, torch.tensor(prompt, device=self.device), own[:, :n], extra, margin)

    def summary(self, references: References, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
        """What train.json says of the stage."""
        pet = self.config.pet
        return {
            "start": pet.start,
            "aggregation": self.aggregation,
            "samples": pet.samples,
            "beta": pet.beta,
            "prompts": len(references.rollouts),
            "prompts_too_long": references.skipped,
            "before": before,
            "after": after,
        }


def _distinct(pairs: Sequence[PreferencePair], limit: int | None, seed: int) -> dict[str, Any]:
    """prompt_key -> prompt, in the pairs' order; a random `limit` of them if there are more."""
    prompts = {pair.prompt_key: pair.prompt for pair in pairs}
    if limit is None or limit >= len(prompts):
        return prompts
    kept = set(random.Random(seed).sample(list(prompts), limit))
    return {key: prompt for key, prompt in prompts.items() if key in kept}


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder of samples that were drawn otherwise."""
    file = folder / "sampling.json"
    if not file.exists():
        atomic_write_json(file, identity)
        return
    before = read_json(file)
    changed = [
        f"{key} ({before.get(key)} there, {value} here)" for key, value in identity.items() if before.get(key) != value
    ]
    if changed:
        raise ValueError(f"pet.cache: {folder} holds samples with another {', '.join(changed)}: name another folder")


def _reads_alike(model: Any, turn: Turn, scorer: Scorer, longest: int) -> bool:
    """Whether the features kept while sampling are what the reward reads: the same trunk, tokens and closing."""
    if scorer.max_length is not None and scorer.max_length < longest:
        return False
    probe = {"prompt": "a", "response": "b"}
    if scorer.encode(probe) != turn.whole("a", "b"):
        return False
    return model_fingerprint(EnsembleRewardModel.from_trunk(model)) == model_fingerprint(scorer.model)
