"""Write a reward model for loaders that do not know prudent: as a stock classifier, one label, or with its own code."""

from __future__ import annotations

from .form import FORMS, Prepared, prepare
from .linear import linear_weights
from .refusals import Form, check_form

__all__ = ["FORMS", "Form", "Prepared", "check_form", "linear_weights", "prepare"]
