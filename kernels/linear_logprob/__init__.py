"""Log-probabilities, entropies and lse of targets from hidden states, without the logits. Maths: README.md here."""

from .contract import LogprobOutput
from .op import linear_logprob

__all__ = ["LogprobOutput", "linear_logprob"]
