"""What can be chosen about training the trunk."""

from __future__ import annotations

from pydantic import Field

from .config import JobConfig


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
