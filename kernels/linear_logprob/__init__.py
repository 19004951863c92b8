"""Hidden states to log-probabilities, entropies and log-sum-exps without storing logits. README.md has the maths."""

from .contract import LogprobOutput
from .op import linear_logprob

__all__ = ["LogprobOutput", "linear_logprob"]
