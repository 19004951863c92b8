"""One training step of the reward head on cached features: loss and gradients from one read. README.md: the maths."""

from .contract import StepOutput
from .op import preference_step

__all__ = ["StepOutput", "preference_step"]
