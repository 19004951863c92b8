"""Stage pet of `prudent train`: sample the reference policy once, then make a trained reward pessimistic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....engine import EnsembleHead, EnsembleRewardModel, Scorer
from ....engine.config import longest_in_company
from ....engine.taps import layers_of
from ....kernels import Aggregation
from ...data.pairs import PreferencePair
from ...job.files import atomic_write_json, read_json
from ...models.features import compute_features, model_fingerprint
from ...sampling.stored import Request, Rollout, sample
from ...sampling.tokens import Sampling
from ...sampling.turn import Turn
from ..config import TrainConfig
from ..region import without_price
from ..run import Run, Sides, with_head
from ..two_stage import seeded
from .config import PETConfig
from .fit import PETFeatures, fit_pet, measure_pet
from .trunk import PETTexts, train_pet_trunk


class References(NamedTuple):
    """Responses of the reference policy.

    rollouts: n (or n + 1) responses to each prompt. row: prompt_key -> index in `rollouts`. skipped: number of prompts
    too long for a response. own: whether the reward can use the features that were stored while sampling.
    """

    rollouts: list[Rollout]
    row: dict[str, int]
    skipped: int
    own: bool


@dataclass(frozen=True)
class PETStage:
    """The stage of one run. policy: the language model to sample; aggregation: the reward to make pessimistic."""

    run: Run
    policy: Any
    aggregation: str

    @property
    def pet(self) -> PETConfig:
        """The stage's config, with the run's seed added to its own."""
        return seeded(self.run.config.pet, self.run.config.seed)

    def heads(
        self, scorer: Scorer, start: EnsembleHead, train: Sides, held_out: Sides | None
    ) -> tuple[EnsembleHead, dict[str, Any]]:
        """Train the pessimistic head from `start`; return it, and the stage's entry in train.json.

        scorer: reads texts as the reward does.   train, held_out: features of the run's pairs.
        """
        run = self.run
        references = self.references(scorer)
        features = self._features(scorer, references)
        data = self._data(train, run.train, features, references)
        evaluation = None if held_out is None else self._data(held_out, run.held_out, features, references)
        fit = fit_pet(
            start,
            data,
            self.pet,
            aggregation=self.aggregation,
            evaluation=evaluation,
            log=run.log,
            progress=run.progress,
            checkpoint=run.folder / "checkpoints" / "pet.pt",
        )
        fit.head.aggregation = self.aggregation
        return fit.head, self.summary(references, fit.before, fit.after)

    def model(
        self, start: EnsembleRewardModel, lora: Path | None, finished: EnsembleRewardModel | None
    ) -> tuple[EnsembleRewardModel, dict[str, Any]]:
        """Train trunk and heads from `start`; return the pessimistic model, and the stage's entry in train.json.

        lora: of the stage that trained `start`, which is trained on; None: a fresh one on `start`'s own trunk.
        finished: the model of an earlier start of the run, which is only measured.
        """
        run = self.run
        references = self.references(run.scorer("model", start))
        before = self._measured(start, references)
        model = self._train(start, lora, references) if finished is None else finished
        after = self._measured(model, references._replace(own=False))
        return model, self.summary(references, before, after)

    def _train(self, start: EnsembleRewardModel, lora: Path | None, references: References) -> EnsembleRewardModel:
        run, head = self.run, _own_outputs(start.score)
        head.aggregation = Aggregation.parse(self.aggregation).with_centre("none")
        scorer = run.scorer("model", start)
        trained = train_pet_trunk(
            with_head(start, head, self.policy if lora is not None else None),
            self._texts(scorer, run.train, references),
            self._texts(scorer, run.held_out, references),
            self.pet,
            run.config.trunk,
            run.folder / "checkpoints" / "pet",
            batch_tokens=run.config.batch_tokens,
            lora=lora,
            log=run.log,
            resume=run.resume,
            progress=run.progress,
        )
        result = start.score.frozen_copy()  # with the calibration from before PET
        result.load_state_dict({**result.state_dict(), **dict(trained.score.named_parameters())})
        result.aggregation = self.aggregation
        return with_head(trained, result)

    def _measured(self, model: EnsembleRewardModel, references: References) -> dict[str, float]:
        """`measure_pet` of a model on the training pairs and, as eval_*, on the held-out pairs."""
        run, head, spec = self.run, _own_outputs(model.score), Aggregation.parse(self.aggregation).with_centre("none")
        features = self._features(run.scorer("model", model), references)

        def reward(rows: Tensor) -> Tensor:
            rewards: Tensor = head(rows, aggregation=spec).reward
            return rewards

        found: dict[str, float] = {}
        for prefix, pairs in (("", run.train), ("eval_", run.held_out)):
            if pairs:
                data = self._data(run.features("model", model, pairs), pairs, features, references)
                found |= {prefix + name: value for name, value in measure_pet(reward, data, self.pet).items()}
        return found

    def _texts(self, scorer: Scorer, pairs: list[PreferencePair], references: References) -> PETTexts:
        """What the model reads of pairs and of their prompts' samples, with prompts renumbered from 0."""
        rows, prompt = _renumbered(pairs, references)
        sides = [[scorer.read(item) for item in pair.items()] for pair in pairs]
        drawn = [references.rollouts[row] for row in rows]
        texts = [[scorer.read({"prompt": r.prompt, "response": text}) for text in r.responses] for r in drawn]
        count, margins = self.pet.samples, self.run.margins(pairs)
        return PETTexts(
            [chosen for chosen, _ in sides],
            [rejected for _, rejected in sides],
            prompt,
            [own[:count] for own in texts],
            [own[count] for own in texts] if self.pet.reference == "sample" else None,
            None if margins is None else margins.tolist(),
        )

    def references(self, scorer: Scorer) -> References:
        """Sample the policy for the prompts of the training pairs, and of the held-out pairs, which are only evaluated.

        Samples of an earlier start of the run are read from its folder.
        """
        run, pet, model, tokenizer = self.run, self.pet, self.policy, self.run.tokenizers["policy"]
        turn = Turn(tokenizer, model)
        room = pet.max_new_tokens + len(turn.closing)
        limit = longest_in_company(model.config)
        prompts, skipped = {}, 0
        for pairs in (run.train, run.held_out):
            chosen = _distinct(pairs, pet.prompts, pet.seed)
            fits = {k: p for k, p in chosen.items() if limit is None or len(turn.prompt(p)) + room <= limit}
            skipped += len(chosen) - len(fits)
            prompts.update(fits)
        if not any(pair.prompt_key in prompts for pair in run.train):
            raise ValueError(
                f"pet.max_new_tokens: expected room for {room} tokens after some prompt in the model's {limit} "
                "positions, got none"
            )
        count = pet.samples + (pet.reference == "sample")
        sampling = Sampling(pet.max_new_tokens, pet.temperature, pet.top_k or len(tokenizer), pet.top_p)
        folder = pet.cache or run.folder / "reference"
        _claim(folder, {"model": model_fingerprint(model), "seed": pet.seed, **sampling._asdict()})
        requests = [Request(prompt, count) for prompt in prompts.values()]
        longest = room + max(len(turn.prompt(prompt)) for prompt in prompts.values())
        own = _reads_alike(model, turn, scorer, longest)
        options: dict[str, Any] = {"seed": pet.seed, "batch_rows": pet.batch_rows, "progress": run.progress}
        # the features are of use to the run's own trunk alone
        options["taps"] = scorer.model.config.taps if own and scorer.model.config.taps else "last"
        rollouts = sample(model, tokenizer, requests, folder, sampling, **options)
        return References(rollouts, {key: row for row, key in enumerate(prompts)}, skipped, own)

    def _features(self, scorer: Scorer, references: References) -> Tensor:
        """[X, S, D] on the CPU; `_data` moves what one fit needs to the device."""
        if references.own:
            return torch.stack([rollout.features for rollout in references.rollouts])
        items = [{"prompt": r.prompt, "response": text} for r in references.rollouts for text in r.responses]
        names = [f"sample {s} of {r.prompt!r:.60}" for r in references.rollouts for s in range(len(r.responses))]
        flat = compute_features(scorer, items, self.run.feature_folder, self.run.progress, names).features
        return flat.view(len(references.rollouts), -1, flat.shape[1])

    def _data(self, sides: Sides, pairs: list[PreferencePair], features: Tensor, references: References) -> PETFeatures:
        """The features of pairs and of their prompts' samples, with prompts renumbered from 0."""
        rows, prompt = _renumbered(pairs, references)
        device, pet = self.run.device, self.pet
        own = features[rows].to(device)
        extra = own[:, pet.samples] if pet.reference == "sample" else None
        numbers = torch.tensor(prompt, device=device)
        return PETFeatures(*sides, numbers, own[:, : pet.samples], extra, self.run.margins(pairs))

    def summary(self, references: References, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
        """The stage's entry in train.json."""
        pet = self.pet
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


def pessimistic_aggregation(config: TrainConfig, start: EnsembleHead) -> str:
    """The aggregation that PET makes pessimistic, without a price of distance."""
    aggregation = "mean" if start.num_heads == 1 else without_price(config.aggregation)
    Aggregation.parse(aggregation).check_heads(start.num_heads)
    return aggregation


def _renumbered(pairs: list[PreferencePair], references: References) -> tuple[list[int], list[int]]:
    """The rows of `references` that the pairs need, and each pair's position among them; -1 without samples."""
    rows = sorted({references.row[p.prompt_key] for p in pairs if p.prompt_key in references.row})
    position = {row: i for i, row in enumerate(rows)}
    return rows, [position[references.row[p.prompt_key]] if p.prompt_key in references.row else -1 for p in pairs]


def _own_outputs(head: EnsembleHead) -> EnsembleHead:
    """A copy of the head whose outputs PET compares: of a single head without calibration, Bradley-Terry's logits."""
    copy = head.frozen_copy()
    if copy.num_heads == 1:
        copy.reset_calibration()
    return copy


def _distinct(pairs: Sequence[PreferencePair], limit: int | None, seed: int) -> dict[str, Any]:
    """prompt_key -> prompt, in the order of the pairs; if there are more than `limit`, a random choice of them."""
    prompts = {pair.prompt_key: pair.prompt for pair in pairs}
    if limit is None or limit >= len(prompts):
        return prompts
    kept = set(random.Random(seed).sample(list(prompts), limit))
    return {key: prompt for key, prompt in prompts.items() if key in kept}


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Record how the folder's samples are drawn; refuse a folder whose samples were drawn in another way."""
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
    """Whether the reward can use the features stored while sampling: same trunk, same tokens, same ending."""
    if scorer.max_length is not None and scorer.max_length < longest:
        return False
    probe = {"prompt": "a", "response": "b"}
    if scorer.encode(probe) != turn.whole("a", "b"):
        return False
    own = EnsembleRewardModel.from_trunk(model, taps=_taps_of(scorer, model), logprob_skips=turn.special)
    return model_fingerprint(own) == model_fingerprint(scorer.model)


def _taps_of(scorer: Scorer, model: Any) -> list[str] | None:
    """The taps of the reward, if the language model has as many layers."""
    config = scorer.model.config
    same = config.taps is not None and layers_of(config.text_config) == layers_of(model.config)
    return config.taps if same else None
