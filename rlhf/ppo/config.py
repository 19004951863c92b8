"""The config of `prudent ppo`, and the check that a run reads every key that was set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ...kernels import Aggregation
from ..job.config import JobConfig
from ..reward.pet.config import PETConfig
from ..sampling.config import RolloutConfig
from .budget import parse_size
from .stop import parse_rule

TRACKERS = ("wandb", "trackio")
KL_ERROR_BOUND = 0.2  # bound on the proportional error of the KL controller (arXiv 1909.08593, section 2.2)
Kind = Literal["shared", "adapter", "model", "callable", "http"]
_CALLABLE = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")


class PolicyConfig(JobConfig):
    """Which weights are trained. The reference is always the trunk with its loaded weights."""

    mode: Literal["lora", "full"] = Field(
        default="lora", description="Train a LoRA adapter, or all weights beside a frozen copy as the reference."
    )
    critic: Literal["auto", "none", "shared", "adapter"] = Field(
        default="auto",
        description="Value head: none, on the policy's trunk, or with an adapter; auto: shared for gae, else none.",
    )
    critic_init: Literal["zero", "reward"] = Field(
        default="zero",
        description="Where the value head starts: at zero, or at the mean of the reward's heads (with kind shared).",
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the LoRA adapter.")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the LoRA adapter, divided by lora_rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability before the LoRA adapter.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, which saves memory and costs time."
    )


class RewardConfig(JobConfig):
    """Where rewards come from.

    The kind depends on `source`:
    shared    an EnsembleRewardModel whose trunk is the policy's: its heads read the frozen trunk's features
    adapter   the folder adapter/ of `prudent train` with mode lora: its LoRA on the policy's trunk, and its heads
    model     any EnsembleRewardModel or one-head sequence classifier, with its own tokeniser
    callable  MODULE:FUNCTION or FILE.py:FUNCTION, called with prompts and responses (lists of texts) -> numbers
    http      a URL that answers {"prompts": [...], "responses": [...]} with {"rewards": [...]}, or one of
              `prudent serve` or vLLM that ends with /score, /classify or /pooling
    auto      the first of these that fits `source`
    """

    source: str = Field(
        default="",
        description="Reward model (folder or hub name), function (MODULE:FUNCTION or FILE.py:FUNCTION), or URL.",
    )
    kind: Literal["auto", "shared", "adapter", "model", "callable", "http"] = Field(
        default="auto",
        description="What source is: heads on the policy's trunk (with an adapter), a model, a function or a URL.",
    )
    aggregation: str = Field(
        default="tradeoff:0.4",
        description="How K heads become one reward, e.g. tradeoff:0.4, min or lcb:1, each head sampled (mean + std x "
        'noise, by seed and step) unless it says source=mean; "": the model\'s own.',
    )
    centre: Literal["none", "batch", "group"] = Field(
        default="none", description="Mean to subtract from rewards: none, of the step, or of the prompt's samples."
    )
    missing_eos_penalty: float = Field(
        default=0.0, ge=0, description="Penalty subtracted from the reward of a response that was cut off."
    )
    clip: float | None = Field(default=None, gt=0, description="Bound on the absolute reward; null: none.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds to wait for the answer of an http reward.")
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere (kind model) read EOS after texts; null: yes for decoders.",
    )

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        return str(Aggregation.parse(value)) if value else value


class KLConfig(JobConfig):
    """The KL and chi-squared penalties, which keep the policy near the reference."""

    coef: float = Field(default=0.05, ge=0, description="Weight of the KL divergence from the reference; 0: none.")
    place: Literal["reward", "loss"] = Field(default="reward", description="Where the KL divergence is added.")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        default="k1", description="Estimator of the KL divergence; with place loss the default is k2."
    )
    chi2: float = Field(
        default=0.0,
        ge=0,
        description="Weight in the loss of the root of the chi-squared divergence (arXiv 2403.03185); 0: none.",
    )
    target: float | None = Field(
        default=None,
        gt=0,
        description="KL per sequence, in nats, to which coef adapts (arXiv 1909.08593); null: coef is fixed.",
    )
    horizon: int = Field(
        default=10_000, ge=1, description="Sequences over which coef adapts, more than a fifth of those of a step."
    )

    @model_validator(mode="before")
    @classmethod
    def _estimator_of_the_place(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("place") == "loss":
            return {"estimator": "k2", **values}
        return values


class UpdateConfig(JobConfig):
    """The update on one step's samples."""

    estimator: Literal["gae", "rloo", "group"] = Field(
        default="gae",
        description="Advantages: GAE with a critic, leave-one-out over a prompt's samples, or normalised over them.",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(default=0.95, ge=0, le=1, description="Lambda of GAE.")
    whiten: bool | None = Field(
        default=None,
        description="Scale a step's advantages to mean 0 and std 1; null: for gae, not for rloo and group.",
    )
    epochs: int = Field(default=2, ge=1, description="Passes over a step's samples.")
    minibatches: int = Field(
        default=2, ge=1, description="Optimizer steps in an epoch, among which a step's samples are divided."
    )
    clip: float = Field(
        default=0.2, gt=0, lt=1, description="PPO's bound on the change of a token's probability ratio."
    )
    value_clip: float | None = Field(
        default=0.2, gt=0, description="Bound on the change of a value in an update; null: none."
    )
    value_coef: float = Field(default=0.5, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(default=0.0, ge=0, description="Weight of the entropy bonus.")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="KL divergence per token, in nats, from the sampling policy that ends the epochs; null: no bound.",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Norm to which gradients are clipped.")
    lr: float | None = Field(
        default=None, gt=0, description="Learning rate of the policy; null: 1e-4 in mode lora, 1e-6 in mode full."
    )
    value_lr: float | None = Field(
        default=None, gt=0, description="Learning rate of the value head; null: ten times lr."
    )
    warmup: int = Field(default=0, ge=0, description="Steps of the loop in which the learning rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw", description="Optimizer; the 8-bit ones need bitsandbytes."
    )
    micro_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="Tokens in one forward and backward pass; auto: as many as fit the memory."
    )
    max_bad_steps: int = Field(
        default=5,
        ge=1,
        description="Steps in a row skipped because of a loss that is not finite, before the run stops.",
    )


class PPOConfig(JobConfig):
    """The config of `prudent ppo`."""

    model: str = Field(description="Policy, a causal language model: local folder or hub name.")
    prompts: str = Field(
        description="Prompts: a text file (one per line), JSON lines, Parquet or a data set with the column prompt."
    )
    output: Path = Field(description="Run folder.")
    reward: RewardConfig = Field(default=RewardConfig(), description="Where rewards come from.")
    recipe: Literal["ppo", "pet"] = Field(
        default="ppo",
        description="PPO on a given reward, or first make one pessimistic (PET, on data), then PPO on it without KL.",
    )
    data: str | None = Field(
        default=None,
        description="Preference pairs: training data of recipe pet, and the baseline of the heads' std on samples.",
    )
    skip_bad_rows: bool = Field(
        default=False,
        description="Count broken rows of prompts and data and continue instead of stopping at the first.",
    )
    steps: int = Field(default=100, ge=1, description="Steps of the loop.")
    seed: int = Field(default=0, ge=0, lt=2**30, description="Seed of the run.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Number type of the trunk; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    attn: Literal["auto", "flash", "sdpa", "eager"] = Field(
        default="auto", description="Attention; auto: flash-attn if it can run here, else torch's SDPA."
    )
    packed: bool | None = Field(
        default=None, description="Score and update sequences without padding; null: with flash attention."
    )
    memory_budget: str | None = Field(
        default=None, description="Memory that the process may use of the GPU's, e.g. 80GB; null: all."
    )
    policy: PolicyConfig = Field(default=PolicyConfig(), description="Which weights are trained.")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="How responses are sampled.")
    kl: KLConfig = Field(default=KLConfig(), description="Penalties that keep the policy near the reference.")
    update: UpdateConfig = Field(default=UpdateConfig(), description="The PPO update.")
    pet: PETConfig = Field(default=PETConfig(), description="The reward's training in recipe pet.")
    best_of_prompts: int = Field(
        default=64, ge=2, description="Number of prompts on which recipe pet compares best-of-n of its rewards."
    )
    gold: str | None = Field(
        default=None,
        description="Second reward, never trained on: vader, MODULE:FUNCTION, FILE.py:FUNCTION or a URL; null: none.",
    )
    save_every: int = Field(default=10, ge=1, description="Steps between checkpoints.")
    sample_every: int = Field(default=10, ge=1, description="Steps between sample texts in samples.jsonl.")
    stop_when: tuple[str, ...] = Field(
        default=(),
        description='Rules that end the run, e.g. "kl > 20 for 3" or "foreign > 0.2 for 3 then rollback".',
    )
    trackers: tuple[str, ...] = Field(
        default=(), description="Trackers beside JSON lines and TensorBoard, any of wandb and trackio."
    )

    @field_validator("memory_budget")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

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
        if self.policy.critic_init == "reward" and self.reward.centre != "none":
            raise ValueError(
                f"policy.critic_init: expected zero with reward.centre {self.reward.centre}, because the heads' reward "
                "is the one before a mean is subtracted, got reward"
            )
        if self.recipe == "ppo" and not self.reward.source:
            raise ValueError("reward.source: a value is needed")
        if self.recipe == "ppo" and self.pet != PETConfig():
            raise ValueError("pet: has no effect with recipe ppo: set recipe to pet")
        if self.recipe == "pet" and self.reward.timeout != RewardConfig().timeout:
            raise ValueError("reward.timeout: has no effect with recipe pet, whose reward is a model: http reads it")
        if self.recipe == "pet" and self.data is None:
            raise ValueError("data: expected preference pairs with recipe pet, got none")
        if self.kl.target is not None and not self.kl.coef:
            raise ValueError(f"kl.coef: expected above 0 with kl.target {self.kl.target:g}, which multiplies it, got 0")
        if self.rollout.min_new_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: expected at most max_new_tokens {self.rollout.max_new_tokens}, "
                f"got {self.rollout.min_new_tokens}"
            )
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.kl.target is not None and self.kl.horizon <= KL_ERROR_BOUND * samples:
            raise ValueError(
                f"kl.horizon: expected at least {int(KL_ERROR_BOUND * samples) + 1} with {samples} samples a step, so "
                f"that kl.coef stays above 0 (a step multiplies it by 1 - {KL_ERROR_BOUND:g} x samples / horizon at "
                f"least), got {self.kl.horizon}"
            )
        if self.update.minibatches > samples:
            raise ValueError(
                f"update.minibatches: expected at most {samples}, the number of a step's samples, "
                f"got {self.update.minibatches}"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(f"trackers: expected any of {', '.join(TRACKERS)}, got {name!r}")
        for rule in self.stop_when:
            parse_rule(rule)
        return self

    @property
    def critic(self) -> Literal["none", "shared", "adapter"]:
        """`policy.critic` with auto resolved."""
        if self.policy.critic == "auto":
            return "shared" if self.update.estimator == "gae" else "none"
        return self.policy.critic

    @property
    def micro_tokens(self) -> int:
        """`update.micro_tokens` as a number; ValueError for auto, which `memory.resolve_micro_tokens` resolves."""
        if self.update.micro_tokens == "auto":
            raise ValueError("update.micro_tokens: expected a number, got auto, which must be resolved first")
        return self.update.micro_tokens


# keys that a resumed run may change: none that the policy depends on, except the number of steps
RESUMABLE_CHANGES = ("output", "steps", "save_every", "memory_budget", "trackers", "stop_when", "gold")


def kind_by_name(config: RewardConfig) -> Kind | None:
    """Return the kind by `config.kind` or the source's name; None if the source's files must be inspected."""
    source = config.source
    if config.kind != "auto":
        return config.kind
    if source.startswith(("http://", "https://")):
        return "http"
    named = source == "vader" or _CALLABLE.fullmatch(source)
    return "callable" if named and not Path(source).exists() else None


def refuse_unread(config: PPOConfig, device: str) -> None:
    """Raise ValueError for a key that was set but that nothing in this combination reads; say what would read it.

    Keys that depend on the kind of the reward are checked here if the source's name shows the kind; otherwise
    `refuse_unread_by_reward` checks them once the source has been inspected.
    """
    full, critic, estimator = config.policy.mode == "full", config.critic, config.update.estimator
    for keys, unread, why in (
        (("policy.lora_rank", "policy.lora_alpha", "policy.lora_dropout"), full, "policy.mode full: lora reads it"),
        (
            ("policy.critic_init", "update.value_clip", "update.value_coef", "update.value_lr"),
            critic == "none",
            "critic none: estimator gae has one",
        ),
        (
            ("policy.critic",),
            critic != "none" and estimator != "gae",
            f"estimator {estimator}, which uses no critic: gae does",
        ),
        (("update.lam",), estimator != "gae", f"estimator {estimator}: gae reads it"),
        (("kl.place", "kl.estimator"), not config.kl.coef, "kl.coef 0: set one above 0"),
        (("kl.horizon",), config.kl.target is None, "a fixed kl.coef: set kl.target"),
        (("best_of_prompts",), config.recipe == "ppo", "recipe ppo: pet compares best of n"),
    ):
        _refuse_set(config, keys if unread else (), why)
    kind = kind_by_name(config.reward)
    if kind is not None:
        refuse_unread_by_reward(config, kind)
    if config.memory_budget is not None and device == "cpu":
        raise ValueError("memory_budget: has no effect on a CPU: it limits the GPU memory of the process")


def refuse_unread_by_reward(config: PPOConfig, kind: Kind) -> None:
    """Raise ValueError for a key that was set but that nothing reads with a reward of this kind."""
    if kind != "http":
        _refuse_set(config, ["reward.timeout"], f"reward.kind {kind}: http reads it")
    if kind != "shared" and config.policy.critic_init == "reward":
        raise ValueError(
            f"policy.critic_init: expected zero with reward.kind {kind}, because only heads of kind shared read the "
            "critic's states, got reward"
        )
    if kind in ("callable", "http"):
        _refuse_set(config, ["reward.aggregation"], f"reward.kind {kind}: the heads of a model read it")
        _refuse_set(config, ["data"], f"reward.kind {kind}: a reward without heads has no uncertainty to compare")


def _refuse_set(config: PPOConfig, keys: Iterable[str], why: str) -> None:
    for key in keys:
        group, _, name = key.rpartition(".")
        values = getattr(config, group) if group else config
        if getattr(values, name) != type(values).model_fields[name].default:
            raise ValueError(f"{key}: has no effect with {why}")
