"""The config of `prudent train`, its run folder, and what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ...kernels import STD_FLOOR, Aggregation
from ..job.config import JobConfig


class FitConfig(JobConfig):
    """How reward heads are trained, in either stage.

    lr, epochs and batch_size are for heads on standardised features: the features' own scale plays no part in them.
    """

    stage: Literal["bt", "brme"] = "brme"
    num_heads: int = Field(default=5, ge=1)
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)  # ends training inside an epoch if the epochs have more
    batch_size: int = Field(default=64, ge=1)  # pairs
    lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)  # share of the steps
    alpha: float = Field(default=4.0, gt=0)
    noise: Literal["closed", "sampled"] = "closed"
    std_floor: float = Field(default=STD_FLOOR, ge=0)
    bsr: float = Field(default=0.0, ge=0)  # lambda of batch-sum regularisation; the paper uses 1e-3
    bsr_scope: Literal["micro", "global"] = "micro"  # on cached features the batch is whole and the two are the same
    seed: int = Field(default=0, ge=0, lt=2**31)


class BradleyTerryConfig(FitConfig):
    """Stage 1: one head, Bradley-Terry."""

    stage: Literal["bt"] = "bt"
    num_heads: Literal[1] = 1


class BRMEConfig(FitConfig):
    """Stage 2: K Gaussian heads, eq. 8, each starting fresh: copies of stage 1's head would differ by their data alone.

    alpha sets the width of the targets, +-alpha / 2, against the fresh heads' outputs of about N(0, 1), which outlive
    training where data is scarce; at 4 the targets are wider than that start.

    max_steps keeps std alive: under eq. 8 and Adam its bias falls by about the learning rate at every step. With the
    linear decay that is lr * steps / 2 = 3 over 2000 steps, a std of 0.03; 10 epochs of 60,000 pairs end at the floor.
    """

    stage: Literal["brme"] = "brme"
    max_steps: int | None = Field(default=2000, ge=1)


class TrunkConfig(JobConfig):
    """How the trunk is trained with its heads; what the loss is stands in the stage's FitConfig (alpha, noise, bsr)."""

    lr: float | None = Field(default=None, gt=0)  # None: 1e-4 for LoRA, 5e-6 in full (BSR's for 1B)
    epochs: float = Field(default=1.0, gt=0)  # reward models overfit in the second
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)  # pairs in a micro-batch, per device
    accumulation: int = Field(default=1, ge=1)  # micro-batches in a step
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    save_every: int = Field(default=100, ge=1)  # steps between evaluations and checkpoints
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False


class PETConfig(JobConfig):
    """PET (arXiv 2505.20556): pessimism against the best of n reference samples. beta and n are the paper's.

    The sources differ in three things, and none of them is settled by what could be read of the paper:

    reference  what the best sample is compared with. chosen: the pair's preferred response. dataset: the preferred or
               the rejected one, each half the time. sample: one more response of the reference policy for each prompt,
               not among the n, as the expectation over pi_ref says.
    hinge      none: best - reference as it is. all: its positive part, which is the same as letting the reference
               response take part in the max. active: the mean over the prompts where it is positive, and over no other.
    detach_reference  the reference's reward is a constant in the gradient.

    Without a hinge, chosen and dataset leave the objective without a lower bound wherever some reward tells the data's
    responses from the policy's own; few steps at a falling rate are then what ends it, and a warning says so.

    lr, epochs and batch_size are for heads on standardised features: the trunk stands. To have it trained, train it
    with stage bt or brme in mode lora or full, and give that model as `start`.
    """

    start: str = "bt"  # the reward to make pessimistic: this run's bt or brme, or a reward model's folder or hub name
    samples: int = Field(default=64, ge=1)  # n, responses of the reference policy to a prompt
    beta: float = Field(default=10.0, ge=0)  # weight of the Bradley-Terry loss
    reference: Literal["chosen", "dataset", "sample"] = "chosen"
    hinge: Literal["none", "all", "active"] = "none"
    detach_reference: bool = False
    prompts: int | None = Field(default=None, ge=1)  # how many of the training prompts are sampled for; None: all
    epochs: int = Field(default=10, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)  # pairs
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)  # share of the steps
    seed: int = Field(default=0, ge=0, lt=2**31)
    # how the reference policy is sampled; these defaults draw from the policy itself
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)  # 0: all
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_rows: int = Field(default=256, ge=1)  # responses sampled at once
    cache: Path | None = None  # a folder of samples that several runs share; None: reference/ in the run folder


class TrainConfig(JobConfig):
    """Everything `prudent train` can be told."""

    model: str  # folder or hub name of a language model
    data: str  # file or dataset name, see load_pairs
    output: Path  # the run folder
    # folder or hub name of a one-head reward model (EnsembleRewardModel, or what from_sequence_classifier takes) to use
    # instead of training stage 1; in mode head its trunk is the trunk, and `model` must name it too
    stage1: str | None = None
    # head: the trunk frozen, its features cached; lora, full: the trunk trained too; auto: head on a CPU, lora on a GPU
    mode: Literal["auto", "head", "lora", "full"] = "auto"
    # the last stage: bt stops after Bradley-Terry; pet makes what pet.start names pessimistic against best-of-n
    stage: Literal["bt", "brme", "pet"] = "brme"
    aggregation: str = "tradeoff:0.4"  # what the saved model answers with
    min_score_gap: float = Field(default=2.0, gt=0)
    skip_bad_rows: bool = False
    limit: int | None = Field(default=None, ge=1)  # rows of data
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)  # of the prompts
    seed: int = Field(default=0, ge=0, lt=2**30)  # of everything; bt.seed, brme.seed and pet.seed are added to it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the trunk; auto: the checkpoint's, float32 in mode full
    append_eos: bool | None = None  # see EnsembleRewardConfig
    batch_tokens: int = Field(default=4096, ge=1)
    max_length: int | None = Field(
        default=None, ge=1
    )  # tokens; a longer text loses its beginning; saved with the model
    features: Path | None = None  # a cache folder that several runs share; None: in the run folder
    bt: BradleyTerryConfig = BradleyTerryConfig()
    brme: BRMEConfig = BRMEConfig()
    pet: PETConfig = PETConfig()
    trunk: TrunkConfig = TrunkConfig()

    @field_validator("aggregation")
    @classmethod
    def _known_aggregation(cls, value: str) -> str:
        return str(Aggregation.parse(value))

    @property
    def start(self) -> str | None:
        """The reward model that stage pet starts from where it is given; None: it is trained in this run."""
        return self.pet.start if self.stage == "pet" and self.pet.start not in ("bt", "brme") else None

    @property
    def supervised(self) -> Literal["bt", "brme"] | None:
        """The last stage that is trained on the pairs alone."""
        last = self.pet.start if self.stage == "pet" else self.stage
        return None if self.start is not None else "brme" if last == "brme" else "bt"


_LOOP_KEYS = ("lr", "epochs", "max_steps", "batch_size", "weight_decay", "warmup")  # of FitConfig and of TrunkConfig


def refuse_unread(config: TrainConfig, mode: str) -> None:
    """Raise ValueError for a key that was set and that this mode, or a given stage 1, leaves unread; say what works."""
    where = f"mode {mode}" + (" (what auto is on this machine)" if config.mode == "auto" else "")
    if config.stage != "pet":
        for key in _changed(config.pet):
            raise ValueError(f"pet.{key}: has no effect with stage {config.stage}: set stage to pet")
    if config.stage == "pet" and mode != "head":
        raise ValueError(
            "mode: expected head with stage pet, which trains heads on a trunk that stands (train that with stage bt "
            f"or brme and give it as pet.start), got {mode}"
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
            raise ValueError("stage: expected brme beside stage1, which leaves nothing to do for bt, got bt")
        for key in _changed(config.bt):
            raise ValueError(f"bt.{key}: has no effect beside stage1, which is trained already: leave one of them out")
    for group in ("bt", "brme") if mode != "head" else ():
        for key in _changed(getattr(config, group)):
            if key in _LOOP_KEYS:
                raise ValueError(f"{group}.{key}: has no effect in {where}: set trunk.{key}")
    groups = ["bt", "brme", *(["pet"] if config.stage == "pet" else [])]
    for key in _changed(config.trunk):
        if mode == "head":
            use = " and ".join(f"{group}.{key}" for group in groups)
            use = f"set {use}" if key in _LOOP_KEYS else "set mode to lora or full"
            raise ValueError(f"trunk.{key}: has no effect in {where}: {use}")
        if mode == "full" and key.startswith("lora_"):
            raise ValueError(f"trunk.{key}: has no effect in {where}: set mode to lora")


def _changed(config: JobConfig) -> list[str]:
    return [name for name, field in type(config).model_fields.items() if getattr(config, name) != field.default]
