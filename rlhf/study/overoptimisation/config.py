"""The configs of `prudent study overoptimisation` and `prudent study warning`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from ...job.config import JobConfig
from ...reward.config import BradleyTerryConfig, BRMEConfig
from ...reward.pet.config import PETConfig

GOLDS = ("sentiment", "careful", "lexicon")
TUNING_GOLDS = ("variety", "linear")


class SamplesConfig(JobConfig):
    """The prompts and the reference policy's responses to them, which all golds and seeds share.

    The defaults are those of the demo: SmolLM2-135M-Instruct and its prompts.
    """

    folder: Path | None = Field(
        default=None, description="Folder of samples that several studies share; null: samples/ in the output folder."
    )
    prompts: str | None = Field(
        default=None, description="File with one prompt per line, or openings: 320 of a story; null: the demo's 240."
    )
    held_out: int = Field(default=64, ge=2, description="Prompts held out, whose candidates are optimised over.")
    candidates: int = Field(default=1024, ge=4, description="Responses to each held-out prompt.")
    training: int = Field(default=16, ge=2, description="Responses to each other prompt, of which pairs are made.")
    max_new_tokens: int = Field(default=16, ge=1, description="Largest number of tokens in a response.")
    temperature: float = Field(default=0.8, gt=0, description="Temperature of sampling.")
    top_k: int = Field(default=50, ge=0, description="Number of most likely tokens to sample from; 0: all.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Probability mass to sample from; 1: all.")
    batch_rows: int = Field(default=1024, ge=1, description="Number of responses sampled in one batch.")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Number type of the model.")
    seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the responses and of the held-out prompts.")


class View(NamedTuple):
    """Which taps the heads read, and which the distance."""

    heads: tuple[str, ...]
    distance: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> View:
        """Parse "last:-1 | mean:2/3".

        Raises:
            ValueError: for another form.
        """
        sides = [tuple(side.split()) for side in text.split("|")]
        if len(sides) != 2 or not all(sides):
            raise ValueError(f"views: expected the heads' taps | the distance's taps, got {text!r}")
        return cls(*sides)


class PolicyGradientConfig(JobConfig):
    """PPO against some arms, of heads fitted on one number of pairs and share of noise.

    Every reward is divided by its sd within a prompt, so that one KL coefficient means the same for all.
    """

    steps: int = Field(default=0, ge=0, description="Steps of each PPO run; 0: no PPO.")
    view: str | None = Field(default=None, description="The view whose heads and distance are used; null: the last.")
    arms: tuple[str, ...] = Field(
        default=("single, tuned", "single, shipped before", "BRME tradeoff:0.4", "trust quad", "trust hinge"),
        description="Rewards to maximise, those with a constant at the chosen one; not posterior LCB.",
    )
    golds: tuple[str, ...] = Field(
        default=("sentiment", "careful"), description="Gold scorers, each with its own runs."
    )
    kl: tuple[float, ...] = Field(default=(0.0, 0.05, 0.2), description="KL coefficients.")
    seeds: int = Field(default=5, ge=2, description="Repetitions, each with its own pairs.")
    pairs: int = Field(default=300, ge=50, description="Number of preference pairs.")
    noise: float = Field(default=0.25, ge=0, lt=0.5, description="Share of labels that are flipped.")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts in a step.")
    samples_per_prompt: int = Field(default=8, ge=2, description="Responses to each prompt.")
    mode: Literal["lora", "full"] = Field(default="lora", description="Train a LoRA adapter, or all weights.")
    lr: float = Field(default=1e-3, gt=0, description="Learning rate of the policy.")
    window: int = Field(default=10, ge=1, description="Steps over which the final gold is averaged.")


class OveroptimisationConfig(JobConfig):
    """The configs of `prudent study overoptimisation` and `prudent study warning`."""

    model: str | None = Field(
        default=None, description="Language model, folder or hub name; null: the embedded SmolLM2-135M-Instruct."
    )
    output: Path = Field(default=Path("runs/study/overoptimisation"), description="Folder for the results.")
    samples: SamplesConfig = Field(default=SamplesConfig(), description="The prompts and responses.")
    seeds: int = Field(default=5, ge=1, description="Draws of pairs, label noise, folds and resamples.")
    first_seed: int = Field(default=0, ge=0, lt=2**20, description="Seed of the first draw.")
    golds: tuple[str, ...] = Field(default=GOLDS, description="Gold scorers that stand for the true reward.")
    tuning_golds: tuple[str, ...] = Field(
        default=TUNING_GOLDS, description="Gold scorers that choose the constants and are not reported."
    )
    tuning_seeds: int = Field(default=3, ge=1, description="Draws for choosing the constants, none of the reported.")
    pairs: tuple[int, ...] = Field(default=(100, 300, 1000, 5000), description="Numbers of preference pairs.")
    noise: tuple[float, ...] = Field(default=(0.0, 0.25), description="Shares of labels that are flipped.")
    taps: tuple[str, ...] = Field(
        default=("last:-1", "last:2/3", "mean:1/3", "mean:2/3", "mean:-1", "logprob"),
        description="Hidden states to keep, a fraction being a share of the trunk's layers.",
    )
    views: tuple[str, ...] = Field(
        default=("last:-1 | last:-1", "last:-1 | mean:2/3", "last:-1 mean:2/3 | mean:2/3"),
        description="What the heads read | what the distance reads, with one table for each.",
    )
    directions: int = Field(default=32, ge=0, description="Directions of the trust region in the arms.")
    measured_directions: tuple[int, ...] = Field(
        default=(0, 8, 32, 128), description="Directions of the trust regions in the table of AUROCs."
    )
    shares: tuple[float, ...] = Field(default=(0.1, 0.01), description="Shares of foreign candidates in the mixtures.")
    others: int = Field(default=8, ge=1, description="Texts of each other foreign kind to a held-out prompt.")
    ensemble: int = Field(default=5, ge=2, description="Heads of the deep ensemble.")
    bt: BradleyTerryConfig = Field(
        default=BradleyTerryConfig(solver="adamw"), description="AdamW's Bradley-Terry head."
    )
    bsr: float = Field(default=1e-3, gt=0, description="Weight of batch-sum regularisation in the arm BSR.")
    brme: BRMEConfig = Field(default=BRMEConfig(), description="BRME's ensemble of Gaussian heads.")
    pet: PETConfig = Field(default=PETConfig(), description="PET on AdamW's head, with at most pet.samples responses.")
    policy_gradient: PolicyGradientConfig = Field(
        default=PolicyGradientConfig(), description="PPO against the rewards, after best-of-n."
    )
    resamples: int = Field(default=2000, ge=100, description="Resamples of each interval.")
    processes: int = Field(default=1, ge=1, description="Number of settings fitted at a time, with one thread each.")

    @model_validator(mode="after")
    def _views_of_taps(self) -> OveroptimisationConfig:
        for text in self.views:
            for tap in [tap for side in View.parse(text) for tap in side]:
                if tap not in self.taps:
                    raise ValueError(f"views: expected taps of the key taps ({', '.join(self.taps)}), got {tap}")
        every = GOLDS + TUNING_GOLDS
        for key in ("golds", "tuning_golds"):
            names = getattr(self, key)
            if not names or len({*names}) != len(names) or not {*names} <= {*every}:
                raise ValueError(
                    f"{key}: expected different ones of {', '.join(every)}, got {', '.join(names) or 'none'}"
                )
        if {*self.golds} & {*self.tuning_golds}:
            raise ValueError("tuning_golds: expected golds that are not reported, got one of the key golds")
        if self.policy_gradient.view not in (None, *self.views):
            raise ValueError(f"policy_gradient.view: expected one of the key views, got {self.policy_gradient.view}")
        if not {*self.policy_gradient.golds} <= {*GOLDS, "variety"}:
            raise ValueError(
                f"policy_gradient.golds: expected golds that read texts, {', '.join((*GOLDS, 'variety'))}, got "
                f"{', '.join(self.policy_gradient.golds)}"
            )
        for key in ("noise", "shares"):
            if not all(0 <= value < 0.5 for value in getattr(self, key)):
                raise ValueError(f"{key}: expected values from 0 to below 0.5, got {list(getattr(self, key))}")
        if min(self.pairs) < 10 * self.ensemble:
            raise ValueError(f"pairs: expected at least {10 * self.ensemble}, got {min(self.pairs)}")
        return self


class WarningConfig(JobConfig):
    """The config of `prudent study warning`."""

    runs: Path = Field(description="Folder of PPO runs with a gold scorer, at any depth.")
    output: Path = Field(default=Path("runs/study/warning"), description="Folder for the results.")
    window: int = Field(default=5, ge=1, description="Steps over which gold and signals are averaged, the latest last.")
    fall: float = Field(
        default=0.25, gt=0, description="A run's gold has fallen when it stays this much below its maximum to the end."
    )
    false_alarms: tuple[float, ...] = Field(
        default=(0.05, 0.1), description="Shares of the other runs whose gold stays that may cross a threshold."
    )
    hold_out: Literal["seed", "gold"] = Field(
        default="seed", description="A run's thresholds come from the runs with another seed, or another gold."
    )
    resamples: int = Field(default=2000, ge=100, description="Resamples of each interval.")
