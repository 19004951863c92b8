"""Run `prudent ppo --recipe pet`: PET's three steps (arXiv 2505.20556) as one command with one folder.

1. a Bradley-Terry reward model; 2. PET on it, against the policy's own samples; 3. the policy optimised against the
pessimistic reward without KL: by best-of-n, compared with the reward before PET, and by PPO.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...engine import EnsembleRewardConfig
from ..job.files import atomic_write_json, atomic_write_text
from ..job.folder import has_run_files, locked_folder, open_run_folder
from ..models.loading import load_reward_config
from ..reward.config import BRMEConfig
from ..reward.config import refuse_unread as refuse_unread_by_train
from ..reward.outcome import RUN_FILES as TRAIN_RUN_FILES
from ..reward.pet.config import PETConfig
from ..reward.start import check_given
from ..reward.train import TrainConfig, run_train
from . import loop
from .config import RESUMABLE_CHANGES, PPOConfig, RewardConfig, refuse_unread
from .outcome import RUN_FILES as PPO_RUN_FILES
from .pet_best_of_n import compare_best_of_n, prepare
from .set_up import unmeasured
from .stop import StopRules
from .watch.monitor import require_trackers

__all__ = ["PPOConfig", "RecipeResult", "run_recipe"]

# keys that only the last step reads: a resumed run may change them until that step has started
_OF_PPO = (
    "policy",
    "update",
    "sample_every",
    "attn",
    "packed",
    "reward.centre",
    "reward.missing_eos_penalty",
    "reward.clip",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.min_new_tokens",
    "rollout.engine",
)
_SAMPLED_LIKE_THE_POLICY = ("max_new_tokens", "temperature", "top_k", "top_p", "batch_rows")


@dataclass(frozen=True)
class RecipeResult:
    """folder: the run folder. metrics: the content of recipe.json. summaries: of the three steps."""

    folder: Path
    metrics: dict[str, Any]
    summaries: tuple[str, str, str]

    def __str__(self) -> str:
        titles = ("1. reward model and PET", "2. best of n", "3. PPO without KL")
        return "\n\n".join(f"{title}\n{text}" for title, text in zip(titles, self.summaries, strict=True))


def run_recipe(config: PPOConfig, *, resume: bool = False, progress: bool = True) -> Any:
    """Run `prudent ppo`: `run_ppo`, or PET's three steps if config.recipe is pet.

    PET's run folder (`config.output`): config.yaml (resolved), reward/ (of `run_train` at stage pet), best_of_n/
    (samples), best_of_n.json, best_of_n.jsonl (the picks), ppo/ (of `run_ppo`), recipe.json (written last). Every step
    can be resumed.

    Raises:
        ValueError: for a config that cannot be used or an output folder that holds another run, before any work.
    """
    if config.recipe == "ppo":
        return loop.run_ppo(config, resume=resume, progress=progress)
    config = resolved(config)
    refuse_early(config)
    run_files = tuple(f"reward/{name}" for name in TRAIN_RUN_FILES)
    with locked_folder(config.output):
        if open_run_folder(config, run_files, resumable_changes=_resumable_changes(config.output), resume=resume):
            atomic_write_text(config.output / "config.yaml", config.to_yaml())
        return _three_steps(config, progress)


def refuse_early(config: PPOConfig) -> None:
    """Raise now the errors that a later step would raise after hours of work; `config` as `resolved`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reward, ppo = reward_config(config), ppo_config(config)
    refuse_unread(ppo, device)
    refuse_unread_by_train(reward, "head")
    check_given(reward, "head")
    require_trackers(ppo)
    StopRules(ppo.stop_when).refuse(unmeasured(ppo, _heads(config.pet.start)))


def _heads(start: str) -> int:
    """K of the reward that PET starts from, which PET keeps."""
    if start in ("bt", "brme"):
        return 1 if start == "bt" else BRMEConfig().num_heads
    found = load_reward_config("pet.start", start)
    return found.num_heads if isinstance(found, EnsembleRewardConfig) else 1


def _resumable_changes(folder: Path) -> tuple[str, ...]:
    """The keys that a resumed run may change."""
    return RESUMABLE_CHANGES if has_run_files(folder / "ppo", PPO_RUN_FILES) else (*RESUMABLE_CHANGES, *_OF_PPO)


def _three_steps(config: PPOConfig, progress: bool) -> RecipeResult:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = prepare(config, progress)  # refuses bad prompts and gold scorers before the long work
    _say(progress, "[1/3] reward model and PET")
    trained = run_train(reward_config(config), resume=True, progress=progress)
    _say(progress, "[2/3] best of n")
    rewards = _rewards(config)
    compared = compare_best_of_n(config, source, rewards, device, progress)
    del source  # free the memory of one policy
    _say(progress, "[3/3] PPO without KL")
    learned = loop.run_ppo(ppo_config(config), resume=True, progress=progress)
    metrics = {"reward": trained.metrics, "best_of_n": compared.metrics, "ppo": learned.metrics}
    atomic_write_json(config.output / "recipe.json", metrics)
    return RecipeResult(config.output, metrics, (str(trained), str(compared), str(learned)))


def resolved(config: PPOConfig) -> PPOConfig:
    """The recipe's config with KL off. ValueError for a key that the recipe sets itself or does not read."""
    kl = config.kl
    if (kl.coef and "coef" in kl.model_fields_set) or kl.chi2 or kl.target is not None:
        raise ValueError(
            "kl: expected none with recipe pet, whose reward is trained for PPO without KL, got "
            f"coef {kl.coef:g}, chi2 {kl.chi2:g}, target {kl.target}"
        )
    if config.reward.source or config.reward.kind != "auto":
        got = config.reward.source or config.reward.kind
        raise ValueError(
            "reward.source, reward.kind: expected none with recipe pet, which trains the reward (to start from a "
            f"given one, set pet.start), got {got}"
        )
    for key in _SAMPLED_LIKE_THE_POLICY:
        if getattr(config.pet, key) != PETConfig.model_fields[key].default:
            raise ValueError(f"pet.{key}: has no effect with recipe pet, which samples as PPO does: set rollout.{key}")
    return config.model_copy(update={"kl": kl.model_copy(update={"coef": 0.0})})


def reward_config(config: PPOConfig) -> TrainConfig:
    """Config of steps 1 and 2: `prudent train` up to stage pet, its samples drawn like the policy's rollouts."""
    sampling = {key: getattr(config.rollout, key) for key in _SAMPLED_LIKE_THE_POLICY}
    return TrainConfig(
        model=config.model,
        data=str(config.data),
        output=config.output / "reward",
        stage="pet",
        mode="head",
        seed=config.seed,
        dtype=config.dtype,
        skip_bad_rows=config.skip_bad_rows,
        pet=config.pet.model_copy(update=sampling),
        aggregation=config.reward.aggregation or TrainConfig.model_fields["aggregation"].default,
    )


def ppo_config(config: PPOConfig) -> PPOConfig:
    """Config of step 3: PPO against the pessimistic reward."""
    reward = RewardConfig.model_validate({**config.reward.model_dump(), "source": str(config.output / "reward/model")})
    changed = {"recipe": "ppo", "output": config.output / "ppo", "reward": reward, "pet": PETConfig()}
    changed["best_of_prompts"] = PPOConfig.model_fields["best_of_prompts"].default
    return PPOConfig.model_validate({**dict(config), **changed})


def _rewards(config: PPOConfig) -> dict[str, Path | str]:
    """Name -> reward model to compare by best of n: PET's start first, the pessimistic reward last."""
    folder, start = config.output / "reward", config.pet.start
    before: dict[str, Path | str] = {"single head": folder / "stage1"} if start in ("bt", "brme") else {"start": start}
    if start == "brme":
        before["ensemble"] = folder / "start"
    return {**before, "PET": folder / "model"}


def _say(progress: bool, line: str) -> None:
    if progress:
        tqdm.write(f"prudent ppo: {line}", file=sys.stderr)
