"""KL-shaped rewards, GAE and masked whitening in one op. Maths, trainers' conventions and limits: README.md here."""

from .contract import AdvantageOutput, AdvantageStats, advantage_convention
from .op import advantages

__all__ = ["AdvantageOutput", "AdvantageStats", "advantage_convention", "advantages"]
