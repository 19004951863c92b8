"""The configs of `prudent train`: both stages, the trunk and PET."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from ...kernels import STD_FLOOR, TRUST_DIRECTIONS, Aggregation
from ..job.config import JobConfig
from .pet.config import PETConfig

# in units of the mean square of a pair's difference in standardised features: one grid serves every trunk
L2_GRID = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


def _checked_taps(value: Any) -> Any:
    from ...engine.taps import check_taps  # the engine imports transformers, which --help does without

    try:
        if value != "auto":
            check_taps(value)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("taps: ")) from None
    return value


# last, wide or a list of taps; see `engine.taps`
Features = Annotated[Literal["last", "wide"] | list[str], AfterValidator(_checked_taps)]
FeaturesOrAuto = Annotated[Literal["auto", "last", "wide"] | list[str], AfterValidator(_checked_taps)]


class FitConfig(JobConfig):
    """How reward heads are trained, in either stage.

    lr, epochs and batch_size apply to heads on standardised features, so they do not depend on the features' scale.
    """

    stage: Literal["bt", "brme"] = Field(
        default="brme", description="The loss: Bradley-Terry (bt), or eq. 8 of arXiv 2409.15360 (brme)."
    )
    num_heads: int = Field(default=5, ge=1, description="Number of heads, K.")
    epochs: int = Field(default=10, ge=1, description="Passes over the training pairs.")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of optimizer steps, which may end an epoch early; null: no limit.",
    )
    batch_size: int = Field(default=64, ge=1, description="Number of pairs in an optimizer step.")
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.01, ge=0, description="Weight decay of AdamW.")
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises to its peak."
    )
    alpha: float = Field(default=4.0, gt=0, description="Width of the targets of eq. 8, which lie within +-alpha / 2.")
    noise: Literal["closed", "sampled"] = Field(
        default="closed",
        description="Compute eq. 8 as its exact expectation (closed) or with noise drawn at each step (sampled).",
    )
    std_floor: float = Field(default=STD_FLOOR, ge=0, description="Smallest standard deviation of a head.")
    bsr: float = Field(
        default=0.0, ge=0, description="Weight of batch-sum regularisation (arXiv 2505.07271 uses 1e-3); 0: none."
    )
    bsr_scope: Literal["micro", "global"] = Field(
        default="micro",
        description="Batch whose reward sum bsr squares: a micro-batch, or the whole step (the same in mode head).",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of initial weights, order and noise.")


class BradleyTerryConfig(FitConfig):
    """Stage 1: one head, Bradley-Terry.

    On a frozen trunk this is a convex problem. Solver newton solves it exactly (convex.py) with the L2 penalty of the
    least held-out log-loss; nothing then depends on a learning rate, an order or a number of steps.
    """

    stage: Literal["bt"] = Field(default="bt", description="The loss of this stage, Bradley-Terry.")
    num_heads: Literal[1] = Field(default=1, description="Number of heads of this stage, one.")
    solver: Literal["newton", "adamw"] = Field(
        default="newton",
        description="Fit the head on a frozen trunk exactly, its L2 chosen by held-out log-loss (newton), or by AdamW.",
    )
    l2: tuple[float, ...] = Field(
        default=L2_GRID, description="L2 penalties that solver newton chooses from; one is used without a choice."
    )
    folds: int = Field(default=5, ge=2, description="Parts of the prompts, each held out once by solver newton.")

    @field_validator("l2")
    @classmethod
    def _penalties(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(math.isfinite(l2) and l2 > 0 for l2 in value):
            raise ValueError(f"l2: expected penalties above 0, got {list(value)}")
        return value


class BRMEConfig(FitConfig):
    """Stage 2: K Gaussian heads, eq. 8, from fresh weights: copies of stage 1's head would differ by their data alone.

    alpha sets the width of the targets, +-alpha / 2. Fresh heads give outputs of about N(0, 1), which survive training
    where data is scarce; at 4 the targets are wider than these outputs.

    max_steps keeps std from collapsing: under eq. 8 and Adam, the bias of std falls by about the learning rate at every
    step. With the linear decay that is lr * steps / 2 = 3 over 2000 steps, a std of 0.03; 10 epochs of 60,000 pairs end
    at the floor.
    """

    stage: Literal["brme"] = Field(default="brme", description="The loss of this stage, eq. 8 of arXiv 2409.15360.")
    max_steps: int | None = Field(
        default=2000,
        ge=1,
        description="Largest number of optimizer steps, because long training collapses std; null: no limit.",
    )


class TrunkConfig(JobConfig):
    """How the trunk is trained with its heads. The loss is set by the stage's FitConfig (alpha, noise, bsr)."""

    lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate of AdamW; null: 1e-4 in mode lora, 5e-6 in mode full."
    )
    epochs: float = Field(
        default=1.0, gt=0, description="Passes over the training pairs; reward models tend to overfit in the second."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Largest number of optimizer steps; null: no limit.")
    batch_size: int = Field(default=8, ge=1, description="Number of pairs in a micro-batch on each device.")
    accumulation: int = Field(default=1, ge=1, description="Number of micro-batches in an optimizer step.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises to its peak."
    )
    save_every: int = Field(default=100, ge=1, description="Steps between evaluations, each saved as a checkpoint.")
    stage2_from: Literal["base", "stage1"] = Field(
        default="base", description="Trunk that stage brme starts from: that of model, or stage bt's trained one."
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank of the LoRA adapter in mode lora.")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the LoRA adapter, divided by lora_rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout probability before the LoRA adapter.")
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass, which saves memory and costs time."
    )


class TrainConfig(JobConfig):
    """The config of `prudent train`."""

    model: str = Field(description="Trunk, a language model: local folder or hub name.")
    data: str = Field(description="Preference pairs: JSON lines, Parquet, or a data set name (NAME:SPLIT).")
    output: Path = Field(description="Run folder.")
    stage1: str | None = Field(
        default=None,
        description="One-head reward model to use in place of stage 1 (in mode head also as model); null: none.",
    )
    mode: Literal["auto", "head", "lora", "full"] = Field(
        default="auto",
        description="Train heads alone, with a LoRA adapter or with the trunk; auto: head on a CPU, lora on a GPU.",
    )
    stage: Literal["bt", "brme", "pet"] = Field(
        default="brme",
        description="Last stage: bt (Bradley-Terry), brme (then the ensemble), or pet (pet.start made pessimistic).",
    )
    aggregation: str = Field(
        default="tradeoff:0.4",
        description="How the saved model combines K heads into one reward, e.g. tradeoff:0.4, min, mean or lcb:1.",
    )
    min_score_gap: float = Field(
        default=2.0,
        gt=0,
        description="Smallest score difference of two responses that make a pair, if data has scores.",
    )
    skip_bad_rows: bool = Field(
        default=False, description="Count broken rows and continue instead of stopping at the first."
    )
    limit: int | None = Field(default=None, ge=1, description="Rows of data to read; null: all.")
    eval_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of the prompts held out for evaluation.")
    seed: int = Field(
        default=0, ge=0, lt=2**30, description="Seed of the run, to which bt.seed, brme.seed and pet.seed are added."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Number type of the trunk; auto: the checkpoint's, but float32 in mode full."
    )
    append_eos: bool | None = Field(
        default=None,
        description="End plain-text responses with the EOS token; null: for decoders, not for encoders.",
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens in one forward pass, padding included.")
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="Tokens kept, from the end, of a longer text, also by the saved model; null: the trunk's limit.",
    )
    features: FeaturesOrAuto = Field(
        default="auto",
        description="Read by heads: last, wide or taps; auto: [last:-1, mean:2/3, logprob] on a frozen decoder.",
    )
    feature_cache: Path | None = Field(
        default=None, description="Folder of cached features that several runs share; null: in the run folder."
    )
    bt: BradleyTerryConfig = Field(default=BradleyTerryConfig(), description="Stage 1, one Bradley-Terry head.")
    brme: BRMEConfig = Field(default=BRMEConfig(), description="Stage 2, the ensemble of Gaussian heads.")
    pet: PETConfig = Field(default=PETConfig(), description="Stage pet, pessimism against the best of n samples.")
    trunk: TrunkConfig = Field(default=TrunkConfig(), description="Training of the trunk, in modes lora and full.")

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        spec = Aggregation.parse(value)
        if spec.of_batch:
            raise ValueError(
                f"expected one that gives a text the same reward in every batch, got {value!r}: reward.aggregation of "
                "prudent ppo takes the worst head of a step"
            )
        return str(spec)

    @property
    def start(self) -> str | None:
        """The given reward model that stage pet starts from; None if this run trains it."""
        return self.pet.start if self.stage == "pet" and self.pet.start not in ("bt", "brme") else None

    @property
    def supervised(self) -> Literal["bt", "brme"] | None:
        """The last stage that is trained on the pairs alone."""
        last = self.pet.start if self.stage == "pet" else self.stage
        return None if self.start is not None else "brme" if last == "brme" else "bt"


_NEWTON_KEYS = ("solver", "l2", "folds")  # of BradleyTerryConfig, for a frozen trunk
_LOOP_KEYS = ("lr", "epochs", "max_steps", "batch_size", "weight_decay", "warmup")  # of FitConfig and of TrunkConfig


def refuse_unread(config: TrainConfig, mode: str) -> None:
    """Raise ValueError for a key that was set but is not read in this mode or with a given stage 1; say what to set."""
    where = f"mode {mode}" + (" (chosen by auto on this machine)" if config.mode == "auto" else "")
    if config.stage != "pet":
        for key in _changed(config.pet):
            raise ValueError(f"pet.{key}: has no effect with stage {config.stage}: set stage to pet")
    if config.stage == "pet" and mode == "full":
        raise ValueError(
            "mode: expected head or lora with stage pet (train the trunk in full with stage bt or brme, and give the "
            "model as pet.start), got full"
        )
    given = config.start if config.stage == "pet" else config.stage1 if mode == "head" else None
    if given is not None and config.features != "auto":
        raise ValueError(
            f"features: has no effect beside {'stage1' if config.stage1 else 'pet.start'} {given}, whose heads read "
            f"what they were trained on, got {config.features}"
        )
    if mode != "head" and "logprob" in config.features:
        raise ValueError(
            f"features: expected states alone in {where}, because a trunk that learns to judge forgets how likely a "
            f"text is, got {', '.join(config.features)}"
        )
    if config.start is not None:
        for group in ("bt", "brme"):
            for key in _changed(getattr(config, group)):
                raise ValueError(
                    f"{group}.{key}: has no effect beside pet.start {config.start}, which is trained already"
                )
    if config.stage1 is not None:
        if config.stage == "pet":
            raise ValueError(
                "stage1: expected none with stage pet, whose model is the language model that is sampled: give the "
                f"reward as pet.start, got {config.stage1}"
            )
        if config.stage == "bt":
            raise ValueError("stage: expected brme with stage1, which takes the place of stage bt, got bt")
        for key in _changed(config.bt):
            raise ValueError(f"bt.{key}: has no effect beside stage1, which is trained already: leave one of them out")
    if config.trunk.stage2_from == "stage1" and mode != "head":
        if config.stage1 is not None:
            raise ValueError(
                "trunk.stage2_from: has no effect beside stage1, which is trained already: to start from its trunk, "
                "give it as model too"
            )
        if config.supervised != "brme":
            raise ValueError("trunk.stage2_from: has no effect without stage brme: set stage to brme")
    groups = ["bt", "brme", *(["pet"] if config.stage == "pet" else [])]
    for group in groups if mode != "head" else ():
        for key in _changed(getattr(config, group)):
            if key in _LOOP_KEYS:
                raise ValueError(f"{group}.{key}: has no effect in {where}: set trunk.{key}")
            if key in _NEWTON_KEYS:
                raise ValueError(f"{group}.{key}: has no effect in {where}, whose trunk AdamW trains: leave it out")
    if mode == "head":
        refuse_unread_by_solver(config.bt)
    for key in _changed(config.trunk):
        if mode == "head":
            use = " and ".join(f"{group}.{key}" for group in groups)
            use = f"set {use}" if key in _LOOP_KEYS else "set mode to lora or full"
            raise ValueError(f"trunk.{key}: has no effect in {where}: {use}")
        if mode == "full" and key.startswith("lora_"):
            raise ValueError(f"trunk.{key}: has no effect in {where}: set mode to lora")


def refuse_unread_by_solver(bt: BradleyTerryConfig) -> None:
    """Raise ValueError for a key of stage 1 on a frozen trunk that was set but that its solver does not read."""
    changed = _changed(bt)
    if bt.solver == "newton" and bt.bsr:
        raise ValueError(
            f"bt.bsr: expected 0 with bt.solver newton, because batch-sum regularisation depends on the batches and is "
            f"not part of the convex problem, got {bt.bsr:g}: set bt.solver to adamw"
        )
    unread = (*_LOOP_KEYS, "bsr_scope") if bt.solver == "newton" else ("l2", "folds")
    other = "adamw" if bt.solver == "newton" else "newton"
    for key in changed:
        if key in unread:
            raise ValueError(f"bt.{key}: has no effect with bt.solver {bt.solver}: set bt.solver to {other}")


def _changed(config: JobConfig) -> list[str]:
    return [name for name, field in type(config).model_fields.items() if getattr(config, name) != field.default]


class CalibrateConfig(JobConfig):
    """The config of `prudent calibrate`."""

    model: str = Field(description="Reward model, an ensemble or any one-head sequence classifier: folder or hub name.")
    data: str = Field(
        description="Responses of the policy that the reward shall trust: JSON lines, Parquet, or a data set name."
    )
    output: Path | None = Field(
        default=None, description="Folder for the calibrated model; null: it replaces the model's own folder."
    )
    scale_data: str | None = Field(
        default=None,
        description="Responses whose rewards get mean 0 and standard deviation 1 in each head; null: scales stay.",
    )
    aggregation: str | None = Field(
        default=None,
        description="How the saved model combines K heads into one reward, e.g. trust:1 or lcb:1; null: as before.",
    )
    cut: Literal["closed", "open"] = Field(
        default="closed",
        description="How a response with stopped=false, cut off at its greatest length, ends: closed, as in `prudent "
        "ppo`, or open, as trl_reward and `prudent serve` read it.",
    )
    directions: int = Field(
        default=TRUST_DIRECTIONS,
        ge=0,
        description="Directions in which the region has a width of its own; 0: none.",
    )
    shrinkage: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share by which the widths are drawn towards their mean; null: what suits the number of rows.",
    )
    limit: int | None = Field(default=None, ge=1, description="Rows to read of each data file; null: all.")
    skip_bad_rows: bool = Field(
        default=False, description="Count broken rows and continue instead of stopping at the first."
    )
    append_eos: bool | None = Field(
        default=None,
        description="Whether a classifier trained elsewhere read EOS after plain texts; null: yes for decoders.",
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens in one forward pass, padding included.")
    max_length: int | None = Field(
        default=None, ge=1, description="Tokens kept, from the end, of a longer text; null: the model's limit."
    )
    feature_cache: Path | None = Field(
        default=None, description="Folder of cached features, such as a training run's, to read and add to; null: none."
    )
