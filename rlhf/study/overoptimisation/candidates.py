"""Sample the reference policy, read foreign texts with the same taps, and keep both."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ....engine.taps import Tap, num_layers, parse_taps
from ....engine.weights import reading_weights
from ...job.files import atomic_file
from ...models.embedded import embedded_model
from ...models.loading import load_language_model, load_tokenizer
from ...sampling.prompts import read_prompts
from ...sampling.stored import Request, read_again, sample
from ...sampling.tokens import Sampling
from ...sampling.turn import Turn
from ..openings import openings
from .config import OveroptimisationConfig, resolved
from .foreign import AGAIN, ATTACKS, OTHERS, ForeignText, foreign_texts

_CHUNK = 1024  # texts in a file
_ROWS = 64  # texts in one forward pass


class Candidates(NamedTuple):
    """Texts and features, in the trunk's dtype, with the taps' columns one after another.

    training        prompt -> its S responses; features [T, S, F]
    held_out        prompt -> its N responses; features [P, N, F]
    attacks         [P][A] foreign texts of the kinds `ATTACKS` in turn; features [P, A, F]
    others          kind -> [P, n, F]
    columns         tap -> its columns of F
    """

    training: dict[str, list[str]]
    training_features: Tensor
    held_out: dict[str, list[str]]
    held_out_features: Tensor
    attacks: list[list[str]]
    attack_features: Tensor
    others: dict[str, Tensor]
    columns: dict[str, slice]

    def columns_of(self, taps: Sequence[str], features: Tensor) -> Tensor:
        """[..., F] -> [..., D], the columns of `taps`."""
        return torch.cat([features[..., self.columns[tap]] for tap in taps], dim=-1)


def attack_count(config: OveroptimisationConfig) -> int:
    """Foreign candidates that the mixture with the most of them takes, an even number."""
    return 2 * -(-round(max(config.shares) * config.samples.candidates) // 2)


def load_candidates(config: OveroptimisationConfig, *, progress: bool = True) -> Candidates:
    """Sample and read, or return what the folders hold.

    Raises:
        ValueError: for a model or prompts that cannot be used, or folders of another request.
    """
    given = config.samples
    name = config.model or str(embedded_model())
    model = load_language_model("model", name, getattr(torch, given.dtype)).eval()
    tokenizer = load_tokenizer("model", name)
    prompts = _prompts(given.prompts, given.held_out)
    held_out = set(random.Random(given.seed).sample(range(len(prompts)), given.held_out))
    requests = [Request(p, given.candidates if i in held_out else given.training) for i, p in enumerate(prompts)]
    layers = num_layers(model)
    taps = parse_taps([resolved(tap, layers) for tap in config.taps], layers)
    rollouts = sample(
        model,
        tokenizer,
        requests,
        given.folder or config.output / "samples",
        Sampling(given.max_new_tokens, given.temperature, given.top_k, given.top_p),
        seed=given.seed,
        batch_rows=given.batch_rows,
        taps=taps,
        progress=progress,
    )
    training, judged = ([r for i, r in enumerate(rollouts) if (i in held_out) == held] for held in (False, True))
    asked, said = [str(r.prompt) for r in judged], [r.responses for r in judged]
    texts = foreign_texts(asked, said, tokenizer, attack_count(config), config.others, given.seed)
    read = _read(model, tokenizer, asked, texts, taps, config.output / "foreign", progress)
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault("attack" if text.kind in ATTACKS else text.kind, []).append(row)
    count, width = len(asked), model.get_input_embeddings().embedding_dim
    attacks = [texts[row].text for row in rows["attack"]]
    each = len(attacks) // count
    return Candidates(
        training={str(r.prompt): r.responses for r in training},
        training_features=torch.stack([r.features for r in training]),
        held_out=dict(zip(asked, said, strict=True)),
        held_out_features=torch.stack([r.features for r in judged]),
        attacks=[attacks[i : i + each] for i in range(0, len(attacks), each)],
        attack_features=read[rows["attack"]].view(count, each, -1),
        others={kind: read[rows[kind]].view(count, config.others, -1) for kind in (*OTHERS, AGAIN)},
        columns={tap: slice(i * width, (i + 1) * width) for i, tap in enumerate(config.taps)},
    )


def _prompts(source: str | None, held_out: int) -> list[str]:
    found = openings() if source == "openings" else read_prompts(None if source is None else Path(source), held_out)
    if len(found) < held_out + 10:
        raise ValueError(f"samples.prompts: expected at least {held_out + 10} different prompts, got {len(found)}")
    return found


def _read(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[ForeignText],
    taps: Sequence[Tap],
    folder: Path,
    progress: bool,
) -> Tensor:
    """[len(texts), F], one file for each chunk of texts, so that an interrupted reading continues."""
    turn = Turn(tokenizer, model)
    starts = [len(turn.prompt(prompt)) for prompt in prompts]
    parts = []
    with tqdm(total=len(texts), desc="foreign texts", unit="text", disable=not progress) as bar:
        for number, first in enumerate(range(0, len(texts), _CHUNK)):
            chunk = texts[first : first + _CHUNK]
            file = folder / f"{number:05d}.safetensors"
            asked = json.dumps([[prompts[text.prompt], text.text] for text in chunk])
            label = {"taps": " ".join(map(str, taps)), "texts": hashlib.sha256(asked.encode()).hexdigest()}
            if not file.is_file():
                ids = [turn.read(prompts[text.prompt], text.text) for text in chunk]
                begins = [min(starts[text.prompt], len(i) - 1) for text, i in zip(chunk, ids, strict=True)]
                with atomic_file(file) as temporary:
                    save_file({"features": forward(model, ids, begins, taps)}, temporary, label)
            with reading_weights(file), safe_open(file, "pt") as stored:
                if (stored.metadata() or {}) != label:
                    raise ValueError(f"{file}: expected the features of the present texts; name another output folder")
                parts.append(stored.get_tensor("features"))
            bar.update(len(chunk))
    return torch.cat(parts)


def forward(model: Any, ids: Sequence[list[int]], begins: Sequence[int], taps: Sequence[Tap]) -> Tensor:
    """[len(ids), F] by forward passes over texts of one length each."""
    features: dict[int, Tensor] = {}
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for _, group in groupby(order, key=lambda row: len(ids[row])):
        same = list(group)
        for rows in (same[i : i + _ROWS] for i in range(0, len(same), _ROWS)):
            batch = torch.tensor([ids[row] for row in rows])
            read = read_again(model, batch, torch.tensor([begins[row] for row in rows]), taps)
            features.update(zip(rows, read, strict=True))
    return torch.stack([features[row] for row in range(len(ids))])
