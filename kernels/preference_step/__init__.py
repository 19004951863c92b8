"""Loss and gradients of reward heads from one read of cached features. README.md has the maths."""

from .contract import StepOutput
from .op import preference_step

__all__ = ["StepOutput", "preference_step"]
