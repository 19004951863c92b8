"""The job behind `prudent study toy`: BRME's figure 1 (arXiv 2409.15360, section 4) over many seeds.

8 prompts, 8 responses, the best response of prompt i is response i. The preference data has, for every prompt, its best
response against two random others: 16 pairs, which leave 40 of the 64 cells without a label. One reward model trained
on them is the nominal one; `models` others of one shape and other initial weights are the uncertainty set. A 3-layer
MLP policy is trained by PPO on each arm's reward, with the exact value of the policy as its critic. An actor is optimal
when its likeliest response is the right one for all 8 prompts.

The paper gives neither widths nor rates nor steps nor a KL coefficient, nor whether the nominal model is in the set:
the first are keys of the config, with a table of what hangs on them, and of the last both readings are arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..config import JobConfig


class ToyRewardConfig(JobConfig):
    """The reward models: MLPs on one-hot prompt and response, trained with the Bradley-Terry loss.

    scale is what makes the paper's picture appear at all: with torch's own initial weights (1) an MLP is close to linear
    in prompt and response, sees all 8 responses preferred to others, and no model errs in the same cells as the rest.
    """

    width: int = Field(64, ge=1)
    layers: int = Field(2, ge=1)  # hidden ones
    activation: Literal["tanh", "relu"] = "tanh"
    scale: float = Field(3.0, gt=0)  # times torch.nn.Linear's initial weights
    steps: int = Field(1000, ge=1)
    lr: float = Field(1e-3, gt=0)
    normalise: Literal["none", "model", "prompt"] = "none"  # z-scores a model; or each prompt's mean taken off


class ToyPolicyConfig(JobConfig):
    """The policy and its PPO."""

    width: int = Field(64, ge=1)
    steps: int = Field(200, ge=1)  # of sampling
    epochs: int = Field(4, ge=1)
    samples: int = Field(16, ge=1)  # a prompt and step
    clip: float = Field(0.2, gt=0, lt=1)
    lr: float = Field(3e-3, gt=0)
    kl: float = Field(0.0, ge=0)  # times log(policy / initial policy), taken off the reward


class ToyConfig(JobConfig):
    """Everything `prudent study toy` can be told."""

    output: Path = Path("runs/study/toy")
    seeds: int = Field(20, ge=2)
    first_seed: int = Field(0, ge=0, lt=2**30)
    lam: float = Field(0.4, ge=0, le=1)  # the paper's
    models: int = Field(3, ge=1)  # of the uncertainty set, beside the nominal one
    reward: ToyRewardConfig = ToyRewardConfig()
    policy: ToyPolicyConfig = ToyPolicyConfig()
    sensitivity: bool = True  # also the table of other settings


@dataclass(frozen=True)
class ToyResult:
    """folder: where toy.json, toy.md and toy.png are. text: the table."""

    folder: Path
    text: str
    metrics: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.text}\n{self.folder / 'toy.png'}"


def run_toy(config: ToyConfig, *, progress: bool = True) -> ToyResult:
    """Train every arm's policies and write toy.json, toy.md and toy.png.

    Raises ImportError naming the extra if matplotlib is not installed.
    """
    raise ValueError("study toy: not finished")
