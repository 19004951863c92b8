"""Read given responses with the trunk that samples, and store their features: an interrupted reading continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ...engine.taps import Tap, num_layers, parse_taps
from ...engine.weights import reading_weights
from ..data.rows import Prompt
from ..job.files import atomic_file
from .stored import read_again
from .turn import Turn

_ROWS = 64  # texts in one forward pass


def read_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[Prompt, str]],
    taps: Sequence[str | Tap],
    folder: Path,
    *,
    chunk: int = 1024,
    progress: bool = True,
) -> Tensor:
    """Return the taps' states [N, F] of N (prompt, response), in the trunk's dtype, as `stored.sample` gives them.

    Args:
        chunk: number of texts in a file of `folder`, which are read again after an interruption.

    Raises:
        ValueError: if `folder` holds the features of other texts or taps.
    """
    turn = Turn(tokenizer, model)
    parsed = parse_taps(taps, num_layers(model))
    starts = {json.dumps(prompt): len(turn.prompt(prompt)) for prompt, _ in texts}
    parts = []
    with tqdm(total=len(texts), desc="texts read", unit="text", disable=not progress) as bar:
        for number, first in enumerate(range(0, len(texts), chunk)):
            part = texts[first : first + chunk]
            file = folder / f"{number:05d}.safetensors"
            asked = json.dumps([list(text) for text in part])
            label = {"taps": " ".join(map(str, parsed)), "texts": hashlib.sha256(asked.encode()).hexdigest()}
            if not file.is_file():
                ids = [turn.read(prompt, text) for prompt, text in part]
                begins = [min(starts[json.dumps(prompt)], len(i) - 1) for (prompt, _), i in zip(part, ids, strict=True)]
                with atomic_file(file) as temporary:
                    save_file({"features": forward(model, ids, begins, parsed, turn.special)}, temporary, label)
            with reading_weights(file), safe_open(file, "pt") as stored:
                if (stored.metadata() or {}) != label:
                    raise ValueError(f"{file}: expected the features of the present texts; name another output folder")
                parts.append(stored.get_tensor("features"))
            bar.update(len(part))
    return torch.cat(parts)


def forward(
    model: Any, ids: Sequence[list[int]], begins: Sequence[int], taps: Sequence[Tap], skips: Sequence[int] = ()
) -> Tensor:
    """[len(ids), F], the taps of whole sequences whose responses begin at `begins`, one length at a time; `skips` as in
    `shared_prefix.sample_batch`."""
    features: dict[int, Tensor] = {}
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for _, group in groupby(order, key=lambda row: len(ids[row])):
        same = list(group)
        for rows in (same[i : i + _ROWS] for i in range(0, len(same), _ROWS)):
            batch = torch.tensor([ids[row] for row in rows])
            read = read_again(model, batch, torch.tensor([begins[row] for row in rows]), taps, skips)
            features.update(zip(rows, read, strict=True))
    return torch.stack([features[row] for row in range(len(ids))])
