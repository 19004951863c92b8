"""KL-shaped rewards, GAE and masked whitening in one op. README.md has maths, conventions and limits."""

from .contract import AdvantageOutput, AdvantageStats, advantage_convention
from .op import advantages

__all__ = ["AdvantageOutput", "AdvantageStats", "advantage_convention", "advantages"]
