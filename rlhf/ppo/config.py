"""What can be chosen about a PPO run, and why the defaults are what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...kernels import Aggregation
from ..config import JobConfig


class PolicyConfig(JobConfig):
    """Which weights move. The reference is always the trunk as loaded."""

    mode: Literal["lora", "full"] = "lora"  # full: the reference is a second, frozen copy of the trunk
    critic: Literal["auto", "none", "shared", "adapter"] = "auto"  # auto: shared for gae, none for rloo and group
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False


class RewardConfig(JobConfig):
    """Where rewards come from.

    kind, by what `source` names:
    shared    an EnsembleRewardModel whose trunk is the policy's: its heads read the frozen trunk's features
    adapter   what `prudent train` with mode lora saved (adapter/): its LoRA on the policy's trunk, and its heads
    model     any EnsembleRewardModel or one-head sequence classifier, with its own tokeniser
    callable  MODULE:FUNCTION or FILE.py:FUNCTION, called with prompts and responses (lists of texts) -> numbers
    http      a URL that answers {"prompts": [...], "responses": [...]} with {"rewards": [...]}
    auto      the first of these that fits `source`
    """

    source: str = ""
    kind: Literal["auto", "shared", "adapter", "model", "callable", "http"] = "auto"
    aggregation: str = (
        "tradeoff:0.4"  # BRME's best at 800 steps; "" takes the reward model's own; one head: always mean
    )
    centre: Literal["none", "batch", "group"] = "none"
    missing_eos_penalty: float = Field(default=0.0, ge=0)  # taken off the reward of an answer that was cut off
    clip: float | None = Field(default=None, gt=0)  # bound on |reward|
    timeout: float = Field(default=60.0, gt=0)  # seconds, of an http reward

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        return str(Aggregation.parse(value)) if value else value


class RolloutConfig(JobConfig):
    """How responses are drawn."""

    prompts_per_step: int = Field(default=64, ge=1)
    samples_per_prompt: int = Field(default=1, ge=1)  # rloo and group need two at least
    max_new_tokens: int = Field(default=64, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    max_prompt_tokens: int | None = Field(default=None, ge=1)  # longer prompts are refused; None: what the model holds
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)  # 0: all; the update's probabilities are those of the whole vocabulary
    top_p: float = Field(default=1.0, gt=0, le=1)
    engine: Literal["auto", "shared_prefix", "static", "continuous"] = "auto"
    batch_rows: int = Field(default=256, ge=1)


class KLConfig(JobConfig):
    """What keeps the policy near the reference."""

    coef: float = Field(default=0.05, ge=0)
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "abs"] = "k1"  # in the loss k2: k1's gradient there has mean 0
    chi2: float = Field(default=0.0, ge=0)  # times sqrt of the chi-squared divergence, in the loss (arXiv 2403.03185)
    target: float | None = Field(default=None, gt=0)  # nats a sequence; adapts coef (arXiv 1909.08593)
    horizon: int = Field(default=10_000, ge=1)  # sequences, of the adaption

    @model_validator(mode="before")
    @classmethod
    def _estimator_of_the_place(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("place") == "loss":
            return {"estimator": "k2", **values}
        return values


class UpdateConfig(JobConfig):
    """One PPO step on what was sampled."""

    estimator: Literal["gae", "rloo", "group"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    whiten: bool | None = None  # advantages over the batch; None: yes for gae, no for rloo and group
    epochs: int = Field(default=2, ge=1)
    minibatches: int = Field(default=2, ge=1)  # a step's samples are cut into this many optimizer steps an epoch
    clip: float = Field(default=0.2, gt=0, lt=1)
    value_clip: float | None = Field(default=0.2, gt=0)
    value_coef: float = Field(default=0.5, ge=0)
    entropy_coef: float = Field(default=0.0, ge=0)
    max_kl: float | None = Field(
        default=None, gt=0
    )  # nats a token between sampling and updated policy: ends the epochs
    max_grad_norm: float = Field(default=1.0, gt=0)
    lr: float | None = Field(default=None, gt=0)  # None: 1e-4 for LoRA, 1e-6 in full
    value_lr: float | None = Field(default=None, gt=0)  # of the value head; None: ten times lr
    warmup: int = Field(default=0, ge=0)  # steps of the loop
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    micro_tokens: int | Literal["auto"] = "auto"  # tokens in one forward and backward pass
    max_bad_steps: int = Field(default=5, ge=1)  # skipped for a loss that is not finite, in a row, before the run stops


class PPOConfig(JobConfig):
    """Everything `prudent ppo` can be told."""

    model: str  # folder or hub name of a causal language model
    prompts: str  # one prompt a line, or JSON lines, Parquet or a data set with `prompt`
    output: Path  # the run folder
    reward: RewardConfig = RewardConfig()
    recipe: Literal["ppo", "pet"] = "ppo"  # pet: Bradley-Terry, PET, then best-of-n and PPO without KL on it
    data: str | None = None  # preference pairs: what recipe pet trains on, and what the watch compares std with
    steps: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**30)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the trunk; auto: bfloat16 on a GPU, float32 on a CPU
    attn: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    packed: bool | None = None  # no padding in scoring and update; None: with flash attention
    memory_budget: str | None = None  # e.g. 80GB: what the process may take on a bigger card
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    kl: KLConfig = KLConfig()
    update: UpdateConfig = UpdateConfig()
    gold: str | None = None  # vader, or MODULE:FUNCTION as a callable reward: watched, never trained on
    save_every: int = Field(default=10, ge=1)  # steps between checkpoints
    sample_every: int = Field(default=10, ge=1)  # steps between sample texts in samples.jsonl
    stop_when: tuple[str, ...] = ()  # e.g. "disagreement > 3x for 5", "kl > 20 for 3 then rollback"
    trackers: tuple[str, ...] = ()  # wandb, trackio: beside JSON lines and TensorBoard, through accelerate

    @model_validator(mode="after")
    def _fits_together(self) -> PPOConfig:
        grouped = self.update.estimator in ("rloo", "group") or self.reward.centre == "group"
        if grouped and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"rollout.samples_per_prompt: expected at least 2 with estimator {self.update.estimator} and centre "
                f"{self.reward.centre}, got {self.rollout.samples_per_prompt}"
            )
        if self.update.estimator == "gae" and self.policy.critic == "none":
            raise ValueError("policy.critic: expected shared or adapter with estimator gae, got none")
        if self.recipe == "ppo" and not self.reward.source:
            raise ValueError("reward.source: a value is needed")
        if self.recipe == "pet" and self.data is None:
            raise ValueError("data: expected preference pairs with recipe pet, got none")
        return self

    @property
    def critic(self) -> Literal["none", "shared", "adapter"]:
        """`policy.critic` with auto resolved."""
        if self.policy.critic == "auto":
            return "shared" if self.update.estimator == "gae" else "none"
        return self.policy.critic
