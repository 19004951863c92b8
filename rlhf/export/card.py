"""The card of an exported model: how to load it, what its numbers mean, and what is known of how it was made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...engine import EnsembleRewardModel
from ...engine.export import Prepared
from ..job.command import command_of
from ..job.files import read_json
from ..models.loading import model_folder
from ..report.card import card_text, parts_of, read_card
from ..report.words import accuracy_cells, count, few_prompts, markdown_table
from ..reward.card import (
    DISTANCE,
    LICENCE,
    MADE,
    NO_LICENCE,
    NUMBERS,
    REWARD,
    SCALE,
    STD,
    UNKNOWN,
    distance_section,
    reward_section,
    std_section,
    title,
    with_price,
)
from .config import ExportConfig
from .loading_text import loading_section

LOADING, FORM = "How to load it", "What this folder carries"
_FLAGS = ("model", "to", "as_", "aggregation")
_FORMS = {
    "stock": "as a stock classifier",
    "linear": "as an ordinary reward model",
    "remote-code": "with its own code",
}
_OPENING = """\
It says how good a response to a prompt is, and with it how far that can be trusted. `prudent export` wrote it in a form
that loads without prudent."""
_OPENING_LINEAR = """\
It says how good a response to a prompt is, in one number. `prudent export` wrote it as an ordinary reward model with
one label: it says nothing of how far that can be trusted, which the model that it was made from does."""


def export_card(source: Path, done: Prepared, reward: EnsembleRewardModel, config: ExportConfig) -> str:
    """The card of a folder that `done` will be written to.

    source: the folder or hub name of `reward`, whose card, if it has one, says how it was made.
    """
    old = read_card(source)
    metadata, heading, known = parts_of(old) if old is not None else ({}, "", {})
    if REWARD not in known:  # not a card of prudent's
        known, heading = {}, ""
    unknown = UNKNOWN.format("export", config.model)
    carries = done.form != "linear"
    sections = {
        LOADING: loading_section(done, reward),
        FORM: _carried(done, reward),
        REWARD: reward_section(reward.config),
        SCALE: known.get(SCALE, unknown),
        STD: std_section(reward.config.num_heads) if carries else "This form has none.",
        DISTANCE: _distance(done, reward, known.get(DISTANCE, unknown)),
        MADE: f"{known.get(MADE, unknown)}\n\nExported with prudent {__version__}:\n\n"
        + "\n".join(f"    {line}" for line in command_of("export", config, _FLAGS).splitlines()),
        NUMBERS: "\n\n".join([known.get(NUMBERS, unknown), *_evaluations(source)]),
    }
    sections |= {name: text for name, text in known.items() if name not in (*sections, LICENCE)}
    sections[LICENCE] = known.get(LICENCE, NO_LICENCE)
    return card_text(
        {
            **metadata,
            "library_name": "transformers",
            "pipeline_tag": "text-classification",
            "tags": [*dict.fromkeys([*metadata.get("tags", []), "reward-model", "rlhf"])],
        },
        f"{heading or title(reward.config, str(source))}, {_FORMS[done.form]}",
        _OPENING if carries else _OPENING_LINEAR,
        sections,
    )


def _carried(done: Prepared, reward: EnsembleRewardModel) -> str:
    lines = [_CARRIED[done.form]]
    if done.form == "stock" and reward.score.trust is not None:
        lines.append("`prudent_trust.npz` has the trust region.")
    if done.constant:
        lines.append(
            f"The model's own reward is the label plus {done.constant!r}, which no weight carries, and loaders drop a "
            "bias without a word: `config.json` has it as `prudent.constant`. It is the same for every response, so "
            "that it changes no comparison and no advantage."
        )
    if done.form != "remote-code" and reward.config.pooling == "last":
        old = ", a new one, because the old one can end a text" * done.padded
        lines.append(
            f"The classifier reads the last token that is not `{done.tokenizer.pad_token}`, the tokeniser's padding "
            f"token{old}. Pad with it, on the right, and set no other."
        )
    if done.form != "remote-code" and reward.model.dtype in (torch.bfloat16, torch.float16):
        name = str(reward.model.dtype).removeprefix("torch.")
        lines.append(f"The layer is stored in float32; a loader that casts it to {name} rounds the logits to that.")
    return " ".join(lines)


_CARRIED = {
    "stock": "Labels `mean_k` are the heads' means, calibrated, each less a constant; labels `raw_std_k` are the stds "
    "before softplus. The layer has no bias, because loaders drop one without a word: `prudent_head.json` has the "
    "constants, the scale and floor of the stds and the aggregation, and `prudent_client.py` makes the reward of them.",
    "linear": "One label, a weighted sum of the heads' means, exact.",
    "remote-code": "The weights and heads as prudent saves them, in the trunk's dtype and float32, and "
    "`modeling_prudent.py`, which needs torch and transformers alone. Padding may be on either side.",
}


def _distance(done: Prepared, reward: EnsembleRewardModel, known: str) -> str:
    if done.form == "linear":
        return "This form has none."
    if reward.score.trust is None:
        return distance_section(reward.config, None)
    known = with_price(known, reward.config)
    if done.form == "remote-code":
        return known
    return (
        f"{known}\n\nIt is quadratic in the hidden state, so that the labels alone do not give it: `finish` measures "
        "it if it gets the last hidden state too."
    )


def _evaluations(source: Path) -> Iterator[str]:
    """What `prudent eval` measured of this model, if its folder lies beside or in the model's."""
    if not source.is_dir():
        return
    for file in sorted({*source.glob("*/eval.json"), *source.parent.glob("*/eval.json")}):
        found: dict[str, Any] = read_json(file)
        model = Path(model_folder(str(found["config"]["model"])))
        if not (model.is_dir() and model.samefile(source)):
            continue
        rows = [[name, *accuracy_cells(accuracy)] for name, accuracy in found["accuracy"].items()]
        opening = (
            f"Accuracy on {count(found['pairs'], 'pair')} of {count(found['prompts'], 'prompt')} of "
            f"`{found['config']['data']}`, by `prudent eval`, with the 95 % interval from resampling prompts. "
            f"{few_prompts(found['prompts'])}"
        )
        yield "\n\n".join([opening.strip(), "\n".join(markdown_table([["reward", "accuracy, %", "interval"], *rows]))])
