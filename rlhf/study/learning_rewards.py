"""Train the rewards of the learning study on the model's own samples: a single head, an ensemble, and PET on both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine import EnsembleHead, EnsembleRewardModel, calibrate
from ..data.gold import VaderGold
from ..evaluation.best_of_n import best_of_n_curve
from ..evaluation.statistics import pair_correct
from ..job.files import atomic_folder, atomic_write_json, atomic_write_text
from ..models.loading import load_language_model, load_tokenizer
from ..reward.fit import PairFeatures
from ..reward.pet.fit import PETFeatures, fit_pet
from ..reward.two_stage import fit_two_stages, seeded
from ..sampling.labelled_pairs import GoldPairs, make_pairs
from ..sampling.prompts import read_prompts
from ..sampling.stored import Request, Rollout, sample
from ..sampling.tokens import Sampling
from .config import RewardsConfig
from .openings import openings

OPENINGS = tuple(openings(8, 8))


def prepare(model: str, folder: Path, config: RewardsConfig, seed: int, aggregation: str) -> dict[str, Any]:
    """Sample, label and train; if the rewards are finished, only return their numbers.

    Writes into `folder`: samples.jsonl, features/, prompts.txt (the prompts of PPO), pairs.jsonl, the reward models
    single/, ensemble/, pet_single/ and pet_ensemble/, and rewards.json (last).

    Args:
        aggregation: of the ensemble that PET makes pessimistic.

    Returns:
        gold_reference: mean gold reward of the model's samples for the prompts of PPO; gold_best_of_16: the same for
        the best of 16 by gold; accuracy: reward -> its accuracy on the held-out prompts' pairs (true labels); counts.
    """
    done = folder / "rewards.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    trunk = load_language_model("model", model, torch.float32)
    tokenizer = load_tokenizer("model", model)
    prompts = _prompts(config)
    every = config.samples_per_prompt + config.pet.samples + 1
    sampling = Sampling(config.max_new_tokens, 1.0, trunk.get_input_embeddings().num_embeddings, 1.0)
    requests = [Request(prompt, every) for prompt in prompts]
    rollouts = sample(trunk.eval(), tokenizer, requests, folder, sampling, seed=seed, progress=False)
    scorer = VaderGold()
    gold = [torch.tensor(scorer(rollout.responses), dtype=torch.float64) for rollout in rollouts]
    training = list(range(len(prompts) - config.held_out_prompts))
    held_out = list(range(len(training), len(prompts)))
    labelled = [values[: config.samples_per_prompt] for values in gold]
    pairs = make_pairs(labelled, training, config.pairs_per_prompt, config.label_noise, seed)
    test = make_pairs(labelled, held_out, config.pairs_per_prompt, 0.0, seed)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pairs.rows(rollouts, gold, True)]
    atomic_write_text(folder / "pairs.jsonl", "".join(lines))
    atomic_write_text(folder / "prompts.txt", "".join(prompts[i] + "\n" for i in training))
    heads = _train(config, pairs, rollouts, training, seed, aggregation)
    sides = test.features(rollouts, False)
    for name, head in heads.items():
        with atomic_folder(folder / name) as target:
            EnsembleRewardModel.from_trunk(trunk, head=head).save_pretrained(target)
            tokenizer.save_pretrained(target)
    training_gold = torch.stack([gold[i] for i in training])
    numbers = {
        "gold_reference": float(training_gold.mean()),
        "gold_best_of_16": float(
            best_of_n_curve(training_gold, training_gold, [min(16, training_gold.shape[1])]).gold[0]
        ),
        "accuracy": {name: _accuracy(head, sides) for name, head in heads.items()},
        "pairs": len(pairs.better),
        "held_out_pairs": len(test.better),
    }
    atomic_write_json(done, numbers)
    return numbers


def _prompts(config: RewardsConfig) -> list[str]:
    prompts = list(OPENINGS) if config.prompts is None else read_prompts(config.prompts, config.held_out_prompts)
    # the last prompts are held out; neighbouring openings share a hero, so spread them
    return prompts if config.prompts is not None else [prompts[(i * 13) % len(prompts)] for i in range(len(prompts))]


def _train(
    config: RewardsConfig, pairs: GoldPairs, rollouts: Sequence[Rollout], training: list[int], seed: int, spec: str
) -> dict[str, EnsembleHead]:
    """The four rewards; the heads of single and ensemble have mean 0 and std 1 on the training prompts' samples."""
    chosen, rejected = pairs.features(rollouts, True)
    reference = torch.cat([rollouts[i].features for i in training]).float()
    single, ensemble = fit_two_stages(
        PairFeatures(chosen, rejected, prompts=torch.tensor(pairs.prompt)),
        config.bt,
        config.brme,
        seed=seed,
        aggregation=spec,
        progress=False,
    )
    for head in (single, ensemble):
        calibrate(head, reference)
    position = {prompt: row for row, prompt in enumerate(training)}
    first = config.samples_per_prompt
    data = PETFeatures(
        chosen.float(),
        rejected.float(),
        torch.tensor([position[prompt] for prompt in pairs.prompt]),
        torch.stack([rollouts[i].features[first : first + config.pet.samples] for i in training]).float(),
        torch.stack([rollouts[i].features[-1] for i in training]).float(),
    )
    pet = seeded(config.pet, seed)
    heads = {"single": single, "ensemble": ensemble}
    for name, start in list(heads.items()):
        head = fit_pet(start, data, pet, aggregation=start.aggregation, progress=False).head
        heads[f"pet_{name}"] = _as_wide(head, start, reference)
    return heads


@torch.no_grad()
def _as_wide(head: EnsembleHead, start: EnsembleHead, features: Tensor) -> EnsembleHead:
    """Scale `head` so that its reward has the same std on `features` as that of `start`.

    PET shrinks rewards, so that the same KL coefficient would weigh more. One factor scales all heads, which keeps
    their relative scale.
    """
    factor = head(features).reward.double().std() / start(features).reward.double().std()
    head.scale.mul_(float(factor))
    head.std_ref.div_(float(factor))
    return head


@torch.no_grad()
def _accuracy(head: EnsembleHead, sides: tuple[Tensor, Tensor]) -> float:
    better, worse = (head(side.float()).reward for side in sides)
    return float(pair_correct(better, worse).double().mean())
