"""The config of stage pet of `prudent train`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ...job.config import JobConfig


class PETConfig(JobConfig):
    """PET (arXiv 2505.20556): pessimism against the best of n reference samples. beta and n are the paper's.

    Public sources describe PET in three different ways, and the paper does not decide between them:

    reference  what the best sample is compared with. chosen: the pair's preferred response. dataset: the preferred or
               the rejected one, each half the time. sample: one more response of the reference policy to each prompt,
               outside the n, as the expectation over pi_ref says.
    hinge      none: best - reference unchanged. all: its positive part, which is the same as including the reference
               response in the max. active: the mean over the prompts where it is positive.
    detach_reference  the reference's reward is a constant in the gradient.

    Without a hinge, the objective with reference chosen or dataset has no lower bound if some reward separates the
    data's responses from the policy's own. Only the number of steps and the falling rate limit it then; a warning
    reports this.

    Mode head: lr, epochs and batch_size apply to heads on standardised features; the trunk is frozen. Mode lora: the
    heads and a LoRA on the trunk go on from those of stage bt or brme, by the keys of `trunk`. Every step then reads
    all n samples of its pairs' prompts, so that a smaller n than the paper's may be needed.
    """

    start: str = Field(
        default="bt",
        description="Reward to make pessimistic: bt or brme of this run, or a reward model's folder or hub name.",
    )
    samples: int = Field(default=64, ge=1, description="Responses of the reference policy to each prompt, n.")
    beta: float = Field(default=10.0, ge=0, description="Weight of the Bradley-Terry loss.")
    reference: Literal["chosen", "dataset", "sample"] = Field(
        default="chosen",
        description="What the best of n is compared with: the chosen response, either of the pair, or one more sample.",
    )
    hinge: Literal["none", "all", "active"] = Field(
        default="none",
        description="Lower best - reference (none), its positive part (all), or only positive prompts (active).",
    )
    detach_reference: bool = Field(
        default=False, description="Treat the reference's reward as a constant in the gradient."
    )
    prompts: int | None = Field(
        default=None, ge=1, description="Number of training prompts to sample responses for; null: all."
    )
    epochs: int = Field(default=10, ge=1, description="Passes over the training pairs.")
    max_steps: int | None = Field(default=None, ge=1, description="Largest number of optimizer steps; null: no limit.")
    batch_size: int = Field(default=64, ge=1, description="Number of pairs in an optimizer step.")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    warmup: float = Field(
        default=0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises to its peak."
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of samples, order and references.")
    # how the reference policy is sampled; these defaults draw from the policy itself
    max_new_tokens: int = Field(default=128, ge=1, description="Largest number of tokens in a sampled response.")
    temperature: float = Field(
        default=1.0, gt=0, description="Temperature of sampling; 1: the policy's own distribution."
    )
    top_k: int = Field(default=0, ge=0, description="Number of most likely tokens to sample from; 0: all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Probability mass of the most likely tokens to sample from; 1: all."
    )
    batch_rows: int = Field(default=256, ge=1, description="Number of responses sampled in one batch.")
    cache: Path | None = Field(
        default=None, description="Folder of samples that several runs share; null: reference/ in the run folder."
    )
