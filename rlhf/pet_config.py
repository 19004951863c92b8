"""What can be chosen about pessimistic fine-tuning (PET), and why the defaults are what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from .config import JobConfig


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
