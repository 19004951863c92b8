"""Prepare an export, with every refusal, then write it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ...kernels import Aggregation
from ..config import max_positions
from ..model import EnsembleRewardModel
from .classifier import check_logits, classifier, fold, head_numbers, region_bytes
from .padding import set_padding, with_rows
from .refusals import Form, check_form
from .remote import AUTO_MAP, MODELLING, check_remote

FORMS: tuple[Form, ...] = get_args(Form)
CLIENT = "prudent_client.py"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Prepared:
    """An export that only needs to be written.

    model       what `save_pretrained` is called on
    tokenizer   a copy of the model's, which pads as the form needs and truncates on the left, as `Scorer` does
    rows        of the embeddings, more than the model's where the tokeniser got a token of its own for padding
    padded      whether the tokeniser got another padding token
    constant    what must be added to a `linear` reward to get `Scorer`'s; 0 where the layer's bias carries it
    note        how texts are read and heads combined, and the constant; a classifier's config.json has it as `prudent`
    files       name -> content of the files beside the weights
    """

    model: Any
    tokenizer: Any
    form: Form
    rows: int
    padded: bool
    constant: float
    note: Mapping[str, Any]
    files: Mapping[str, bytes]

    def write(self, folder: Path, max_shard_size: str = "5GB") -> None:
        """Write weights, configuration, tokeniser and the files beside them into an existing folder."""
        embeddings = self.model.get_input_embeddings().weight
        state = None
        if self.rows > len(embeddings):
            state = with_rows(self.model.state_dict(), embeddings, self.rows)
        self.model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        self.tokenizer.save_pretrained(folder)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if self.form == "remote-code":
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings["auto_map"] = AUTO_MAP
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def prepare(
    reward: EnsembleRewardModel, tokenizer: Any, form: Form, aggregation: str | Aggregation | None = None
) -> Prepared:
    """Put a reward model into a form, and compare it with the model on a few tokens.

    Args:
        reward: its trunk is used by reference and does not change; `aggregation`, if given, becomes its own.
        tokenizer: the model's; it is copied.
        form: stock, linear or remote-code; the room's README.md says what each carries.
        aggregation: how the heads become one reward; None: the head's own.

    Raises:
        ValueError: for a model that the form cannot carry, naming what.
    """
    head = reward.score
    spec = head.aggregation if aggregation is None else Aggregation.parse(aggregation)
    spec.check_heads(head.num_heads)
    head.check_price(spec)
    check_form(reward.config, form, spec)
    if not type(reward.model).__module__.startswith("transformers."):
        raise ValueError(
            f"model: expected a trunk of transformers, got {type(reward.model).__name__} with its own code"
        )
    head.aggregation, reward.config.aggregation = spec, str(spec)
    tokenizer = _reading(copy.deepcopy(tokenizer), reward.config)
    if form == "remote-code":
        check_remote(reward)
        if tokenizer.pad_token is None:  # any token may pad: the mask says where
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        files = {MODELLING: (_HERE / MODELLING).read_bytes()}
        return Prepared(reward, tokenizer, form, 0, False, 0.0, _note(reward, form), files)
    return _classifier(reward, tokenizer, form)


def _note(reward: Any, form: Form) -> dict[str, Any]:
    config = reward.config
    kept = {name: getattr(config, name) for name in ("aggregation", "append_eos", "max_score_length")}
    return {"form": form, **kept}


def _reading(tokenizer: Any, config: Any) -> Any:
    """A tokeniser that pads on the right, and keeps the end of a long text, as `Scorer` does, if asked to truncate."""
    limits = (config.max_score_length, max_positions(config.text_config))
    longest = min((n for n in limits if n is not None), default=None)
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    tokenizer.init_kwargs |= {"padding_side": "right", "truncation_side": "left"}  # what it saves
    if longest is not None:
        tokenizer.model_max_length = longest
    return tokenizer


def _classifier(reward: Any, tokenizer: Any, form: Form) -> Prepared:
    config, head = reward.config, reward.score
    folded = fold(head, form)
    padding, padded = None, False
    if config.pooling == "last":
        padding, padded = set_padding(tokenizer, config.skip_token_id)
    rows = max(reward.get_input_embeddings().num_embeddings, 0 if padding is None else padding + 1)
    model, carries = classifier(reward, folded, padding, rows)
    check_logits(reward, model, folded, config.skip_token_id)
    constant = 0.0 if carries or form == "stock" else float(folded.constant[0])
    note = _note(reward, form)
    names = ["reward"]
    files: dict[str, bytes] = {}
    if form == "linear":
        note["constant"] = constant
    else:
        numbers = head_numbers(head, folded)
        files = {CLIENT: (_HERE / CLIENT).read_bytes(), "prudent_head.json": _json(numbers | note)}
        region = region_bytes(head)
        if region is not None:
            files["prudent_trust.npz"] = region
        names = [f"{part}_{k}" for part in ("mean", "raw_std") for k in range(head.num_heads)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: label for label, name in enumerate(names)}
    model.config.prudent = note
    return Prepared(model, tokenizer, form, rows, padded, constant, note, files)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
