"""What can be chosen about training reward heads, and why the defaults are what they are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..kernels import STD_FLOOR
from .config import JobConfig


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
