"""Loss and gradients of a reward head on cached features, from one read of them. Maths: README.md here."""

from .contract import StepOutput
from .op import preference_step

__all__ = ["StepOutput", "preference_step"]
