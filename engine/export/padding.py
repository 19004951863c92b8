"""A padding token that no text ends with, because the heads of stock classifiers skip it at the end of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PADDING = "<|prudent_pad|>"


def set_padding(tokenizer: Any, skipped: int | None) -> tuple[int, bool]:
    """(padding id, whether the tokeniser had to be given another padding token than its own).

    A stock decoder's head reads the last token that is not `pad_token_id`, ours the last attended token other than
    `skipped`. They are the same if the padding token is `skipped`, or else one that no text holds. Many tokenisers pad
    with the EOS token, which closes a text: they get a token of their own.
    """
    own = tokenizer.pad_token_id
    if skipped is not None:
        if own == skipped:
            return skipped, False
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(skipped)
        return skipped, True
    others = ("eos_token_id", "bos_token_id", "unk_token_id", "sep_token_id", "cls_token_id")
    template = tokenizer.chat_template
    written = own is not None and template is not None and tokenizer.pad_token in str(template)
    if own is not None and not written and all(getattr(tokenizer, name) != own for name in others):
        return int(own), False
    tokenizer.add_special_tokens({"pad_token": PADDING})
    return int(tokenizer.pad_token_id), True


def with_rows(state: dict[str, Tensor], embeddings: Tensor, rows: int) -> dict[str, Tensor]:
    """`state` with zero rows added to the embeddings [V, D], which it holds under any name, up to `rows`."""
    more = embeddings.new_zeros(rows - len(embeddings), embeddings.shape[1])
    return {
        name: torch.cat([tensor, more]) if tensor.data_ptr() == embeddings.data_ptr() else tensor
        for name, tensor in state.items()
    }
