"""Hidden states to log-probabilities, entropies and log-sum-exps, without storing the logits. Maths: README.md here."""

from .contract import LogprobOutput
from .op import linear_logprob

__all__ = ["LogprobOutput", "linear_logprob"]
