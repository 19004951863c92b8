"""The configs of the studies."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ..job.config import JobConfig
from ..reward.config import BradleyTerryConfig, BRMEConfig, refuse_unread_by_solver
from ..reward.pet.config import PETConfig


class ToyRewardConfig(JobConfig):
    """The reward models: MLPs on one-hot prompt and response, trained with the Bradley-Terry loss.

    `scale` determines how much the models differ on cells without a label; the table of settings also has scale 1.
    """

    width: int = Field(default=64, ge=1, description="Units in a hidden layer.")
    layers: int = Field(default=2, ge=1, description="Hidden layers.")
    activation: Literal["tanh", "relu"] = Field(default="tanh", description="Activation of the hidden layers.")
    scale: float = Field(default=3.0, gt=0, description="Factor on the initial weights of torch.nn.Linear.")
    steps: int = Field(default=1000, ge=1, description="Training steps, each on all pairs.")
    lr: float = Field(default=1e-3, gt=0, description="Learning rate of Adam.")
    normalise: Literal["none", "model", "prompt"] = Field(
        default="none", description="Leave rewards unchanged, z-score each model, or subtract each prompt's mean."
    )


class ToyPolicyConfig(JobConfig):
    """The policy, a 3-layer MLP from a one-hot prompt to 8 logits, and its PPO.

    kl is large enough for PPO to find the best response of any reward (toy.md says how often). Without it, policies
    settle early on a response that is good for many prompts, which is an error of PPO and not of the reward.
    """

    width: int = Field(default=64, ge=1, description="Units in a hidden layer.")
    steps: int = Field(default=200, ge=1, description="Sampling steps.")
    epochs: int = Field(default=4, ge=1, description="Passes over a step's samples.")
    samples: int = Field(default=16, ge=1, description="Responses to each prompt in a step.")
    clip: float = Field(default=0.2, gt=0, lt=1, description="PPO's bound on the change of a probability ratio.")
    lr: float = Field(default=3e-3, gt=0, description="Learning rate of the policy.")
    kl: float = Field(
        default=0.3,
        ge=0,
        description="Weight of log(policy / initial policy), in standard deviations of the nominal reward.",
    )
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="Optimizer of the policy.")
    whiten: bool = Field(default=False, description="Scale each policy's advantages of a step to mean 0 and std 1.")


class ToyConfig(JobConfig):
    """The config of `prudent study toy`."""

    output: Path = Field(default=Path("runs/study/toy"), description="Folder for the results.")
    seeds: int = Field(default=20, ge=2, description="Independent repetitions.")
    first_seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the first repetition.")
    lam: float = Field(default=0.4, ge=0, le=1, description="Lambda of the trade-off, 0.4 in the paper.")
    models: int = Field(default=3, ge=1, description="Reward models of the uncertainty set, beside the nominal one.")
    reward: ToyRewardConfig = Field(default=ToyRewardConfig(), description="The reward models.")
    policy: ToyPolicyConfig = Field(default=ToyPolicyConfig(), description="The policy and its PPO.")
    sensitivity: bool = Field(default=True, description="Also run other settings, for a second table.")


class StochasticConfig(JobConfig):
    """The config of `prudent study stochastic`."""

    output: Path = Field(default=Path("runs/study/stochastic"), description="Folder for the results.")
    seeds: int = Field(default=100, ge=2, description="Independent repetitions.")
    first_seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the first repetition.")
    heads: int = Field(default=5, ge=2, description="Number of random rewards of which the minimum is taken, K.")
    steps: int = Field(default=200, ge=1, description="PPO steps on a meaningless reward, 200 in the paper.")
    samples: int = Field(default=16, ge=1, description="Responses to each prompt in a step.")
    epochs: int = Field(default=4, ge=2, description="Passes over a step's samples in the settings with more than one.")
    clip: float = Field(default=0.2, gt=0, lt=1, description="PPO's bound on the change of a probability ratio.")
    width: int = Field(default=64, ge=1, description="Units in a hidden layer of the policy.")
    start: float = Field(
        default=0.9, gt=0.125, lt=1, description="Gold reward of the policies before training on meaningless rewards."
    )
    adam_lr: float = Field(default=1e-3, gt=0, description="Learning rate of Adam.")
    sgd_lr: float = Field(default=0.1, gt=0, description="Learning rate of SGD.")
    kl: float = Field(default=0.1, gt=0, description="KL coefficient in the settings with a KL penalty.")


class RewardsConfig(JobConfig):
    """Preference data and reward heads of one seed.

    The samples are drawn from the model's own distribution (temperature 1, no top-k or top-p), as in PPO's first step.
    """

    prompts: Path | None = Field(
        default=None, description="File with one prompt per line; null: 64 openings of a story."
    )
    held_out_prompts: int = Field(
        default=16, ge=2, description="Prompts held out to measure the heads' accuracy; PPO samples the others."
    )
    samples_per_prompt: int = Field(default=64, ge=2, description="Responses to each prompt.")
    pairs_per_prompt: int = Field(default=200, ge=1, description="Preference pairs of each prompt.")
    label_noise: float = Field(default=0.25, ge=0, le=0.5, description="Share of the labels that are flipped.")
    max_new_tokens: int = Field(default=24, ge=1, description="Largest number of tokens in a response.")
    bt: BradleyTerryConfig = Field(
        default=BradleyTerryConfig(solver="adamw"), description="The single Bradley-Terry head."
    )
    brme: BRMEConfig = Field(default=BRMEConfig(), description="The ensemble of Gaussian heads.")
    pet: PETConfig = Field(default=PETConfig(), description="PET on both.")

    @model_validator(mode="after")
    def _keys_that_the_solver_reads(self) -> RewardsConfig:
        refuse_unread_by_solver(self.bt)
        return self

    @model_validator(mode="after")
    def _pet_keys_that_are_read(self) -> RewardsConfig:
        for name in ("start", "prompts", "max_new_tokens", "temperature", "top_k", "top_p", "batch_rows"):
            if getattr(self.pet, name) != PETConfig.model_fields[name].default:
                raise ValueError(f"pet.{name}: expected no value, because this study sets PET's start and sampling")
        return self


class LearningPPOConfig(JobConfig):
    """PPO settings of all runs, which differ only in the reward, the seed and the KL coefficient."""

    steps: int = Field(default=50, ge=2, description="Steps of each run.")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts in a step.")
    samples_per_prompt: int = Field(default=4, ge=2, description="Responses to each prompt.")
    estimator: Literal["gae", "rloo", "group"] = Field(
        default="rloo",
        description="Advantages: GAE with a critic, leave-one-out over a prompt's samples, or normalised over them.",
    )
    mode: Literal["lora", "full"] = Field(
        default="lora", description="Train a LoRA adapter, or all weights beside a frozen copy as the reference."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over a step's samples.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps in an epoch.")
    lr: float = Field(default=2e-3, gt=0, description="Learning rate of the policy.")


class LearningConfig(JobConfig):
    """The config of `prudent study learning`."""

    model: str = Field(description="Small causal language model: local folder or hub name.")
    output: Path = Field(default=Path("runs/study/learning"), description="Folder for results and runs.")
    seeds: int = Field(default=3, ge=1, description="Repetitions, each with its own samples, labels and heads.")
    first_seed: int = Field(default=0, ge=0, lt=2**20, description="Seed of the first repetition.")
    kl: tuple[float, ...] = Field(default=(0.0, 0.05), description="KL coefficients, with one table for each.")
    lambdas: tuple[float, ...] = Field(
        default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), description="Lambdas of the trade-off, with one reward for each."
    )
    pet_lambda: float = Field(default=0.4, ge=0, le=1, description="Lambda of the ensemble that PET makes pessimistic.")
    processes: int = Field(default=2, ge=1, description="Number of runs at a time, with one thread each if several.")
    window: int = Field(default=10, ge=1, description="Steps over which a final or a peak value is averaged.")
    rewards: RewardsConfig = Field(default=RewardsConfig(), description="Preference data and reward heads.")
    ppo: LearningPPOConfig = Field(default=LearningPPOConfig(), description="The PPO runs.")
