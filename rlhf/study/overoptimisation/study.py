"""Run `prudent study overoptimisation`: which reward survives optimisation, and where a price on distance loses.

A reference policy's responses, ordered by a gold scorer, train every kind of reward on features of the frozen trunk.
Best-of-n then optimises each reward over the policy's candidates, and over mixtures with a share of foreign ones, and
the gold scorer judges the picks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..result import StudyResult, command, run_study
from . import pictures, report
from .cells import fill_cells, ns_of
from .config import OveroptimisationConfig
from .policy import policy_gradient
from .summary import CHOICE_RULE, attack_names, summary_of_view
from .world import prepare, read_auroc

# keys that may differ from those of the results in the folder: no stored cell depends on them
RESUMABLE_CHANGES = (
    *("output", "samples.folder", "seeds", "tuning_seeds", "golds", "tuning_golds", "pairs", "noise", "views"),
    *("policy_gradient", "resamples", "processes"),
)


def run_overoptimisation(config: OveroptimisationConfig, *, progress: bool = True) -> StudyResult:
    """Sample, fit and attack whatever is missing; write overoptimisation.json, .md and .png.

    The folder: samples/ (unless another is given), foreign/, prepared/ (features, distances, golds), cells/ (one file
    for
    each setting), auroc.json.

    Raises:
        ValueError: for a model or prompts that cannot be used, or a folder that holds other files or results of another
            config; seeds, golds, pairs, noise and views may be added.
        ImportError: naming the extra to install.
    """
    return run_study(
        "overoptimisation",
        config,
        lambda: _measure(config, progress),
        report.markdown,
        pictures.picture,
        resumable_changes=RESUMABLE_CHANGES,
    )


def _measure(config: OveroptimisationConfig, progress: bool) -> dict[str, Any]:
    """The content of overoptimisation.json."""
    prepare(config, progress=progress)
    fill_cells(config, progress=progress)
    named = config.model_copy(
        update={
            "model": None if config.model is None else Path(config.model).name,
            "samples": config.samples.model_copy(update={"folder": None}),
        }
    )
    views = {view: summary_of_view(view, config) for view in config.views}
    runs = policy_gradient(config, views, progress=progress) if config.policy_gradient.steps else None
    return {
        "command": command("overoptimisation", named),
        "config": named.model_dump(mode="json", exclude={"output"}),
        "n": ns_of(config),
        "attacks": attack_names(config),
        "choice": CHOICE_RULE,
        "auroc": read_auroc(config.output),
        "views": views,
        "policy_gradient": runs,
        "torch": torch.__version__,
    }
