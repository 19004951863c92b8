"""The card of a model that `prudent calibrate` writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine import EnsembleRewardConfig
from ..job.command import command_of
from ..report.card import is_untouched, read_card, with_sections, write_card
from ..report.words import count
from .card import DISTANCE, REWARD, SCALE, UNKNOWN, Facts, Region, distance_section, reward_card, reward_section
from .config import CalibrateConfig

logger = logging.getLogger(__name__)

_FLAGS = ("model", "data", "output", "scale_data", "aggregation")


def update_card(
    folder: Path, name: Path, model: EnsembleRewardConfig, numbers: Mapping[str, Any], config: CalibrateConfig
) -> None:
    """Bring the card in `folder` up to date; a model without one gets one, and one that was edited stays.

    name: of the folder when it is complete, for the warning.   model: as it was saved.   numbers: of calibration.json.
    """
    data = numbers["data"]
    region = Region(data["responses"], data["prompts"], command_of("calibrate", config, _FLAGS))
    sections = {REWARD: reward_section(model), DISTANCE: distance_section(model, region)}
    scale = UNKNOWN.format("calibrate", config.model)
    if numbers["scale_data"] is not None:
        found = numbers["scale_data"]
        scale = (
            f"Each head has mean 0 and standard deviation 1 on {count(found['responses'], 'response')} to "
            f"{count(found['prompts'], 'prompt')} of `{config.scale_data}`."
        )
        sections[SCALE] = f"{scale} The numbers on held-out pairs, if there are any, are of the scale before."
    card = read_card(folder)
    if card is None:
        unknown = UNKNOWN.format("calibrate", config.model)
        write_card(folder, reward_card(Facts(config.model, model, scale, region, unknown, unknown)))
    elif is_untouched(card):
        write_card(folder, with_sections(card, sections))
    else:
        logger.warning("model: %s: its README.md was not written by prudent or was edited, and stays as it is", name)
