"""A `Scorer` without a trunk: it reads items and combines what the heads say; vLLM runs the model between the two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from ....engine import EnsembleHead, EnsembleRewardConfig, HeadScores, Scorer
from ....engine.config import max_positions
from ...job.files import read_json
from ...models.loading import load_tokenizer
from . import contract

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class HeadsOnly:
    """What `Scorer` asks of a model, except the forward pass: `config`, `score` and the size of the vocabulary."""

    def __init__(self, config: EnsembleRewardConfig, head: EnsembleHead) -> None:
        self.config, self.score = config, head

    def get_input_embeddings(self) -> SimpleNamespace:
        """An object with `num_embeddings`."""
        return SimpleNamespace(num_embeddings=self.config.text_config.vocab_size)


def open_scorer(model_config: Any) -> Scorer:
    """The scorer of a served model, without its trunk's weights.

    Args:
        model_config: vLLM's: `hf_config`, `model` (folder or hub name), `revision`, `tokenizer`, and `max_model_len`,
            to which longer sequences are cut as `Scorer` cuts them.

    Raises:
        ValueError: for files that cannot be read.
    """
    config: EnsembleRewardConfig = model_config.hf_config
    head = contract.new_head(config)
    contract.load_head(head, read_tensors(model_config.model, contract.HEAD, model_config.revision))
    limits = (config.max_score_length, max_positions(config.text_config), model_config.max_model_len)
    longest = min(limit for limit in limits if limit is not None)
    tokenizer = load_tokenizer("tokenizer", model_config.tokenizer)
    return Scorer(HeadsOnly(config, head), tokenizer, max_length=longest, progress=False)


def read_tensors(model: str, prefix: str, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors checkpoint whose names begin with `prefix`, without it; no other is read."""
    index = cached_file(model, _INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    names = {_ONE}
    if index is not None:
        names = {file for name, file in read_json(Path(index))["weight_map"].items() if name.startswith(prefix)}
    found = {}
    for name in sorted(names):
        with safe_open(cached_file(model, name, revision=revision), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a dict
                if key.startswith(prefix):
                    found[key.removeprefix(prefix)] = file.get_tensor(key)
    return found


def heads_of(rows: Sequence[Tensor], num_heads: int, *, measures: bool) -> HeadScores:
    """`contract.vectors` [2K + 1 or 2K + 2] an item, as `Scorer.combine` takes them; without the reward."""
    table = torch.stack([row.float() for row in rows])
    mean, std, rest = table.split((num_heads, num_heads, table.shape[1] - 2 * num_heads), dim=1)
    return HeadScores(mean.contiguous(), std.contiguous(), rest[:, 0].contiguous() if measures else None)


def served_ids(scorer: Scorer, ids: list[int]) -> list[int]:
    """The token ids that vLLM gets for an item that `scorer` has read."""
    return contract.without_skipped(ids, scorer.model.config.skip_token_id)


def is_ours(model: str, revision: str | None) -> bool:
    """Whether `model` is an ensemble reward model, by its config.json alone."""
    found = EnsembleRewardConfig.get_config_dict(model, revision=revision)[0]
    return bool(found.get("model_type") == EnsembleRewardConfig.model_type)
