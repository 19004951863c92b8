"""Sample responses to many prompts and store each batch at once, so that an interrupted run can continue.

A folder holds samples.jsonl, one line per prompt, and features/, one safetensors file per batch with the trunk's hidden
states of the same responses. The batches depend on the prompts alone, and every prompt has its own random numbers; so
the same request gives the same file however often it was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ...engine.config import longest_in_company
from ...engine.likelihood import LanguageHead, response_logprob
from ...engine.taps import Tap, capturing, num_layers, parse_taps, read_taps, reads_logprob
from ...engine.weights import reading_weights
from ..data.rows import Prompt
from ..job.files import atomic_file, repaired_json_lines, writing
from .checks import takes_padding
from .shared_prefix import Sampled, sample_batch
from .tokens import Rule, Sampling, keyed_uniforms
from .turn import Turn

_REREAD_ROWS = 32  # texts in one forward pass


class Request(NamedTuple):
    """One prompt (see `data.columns.Prompt`) and how many responses it gets."""

    prompt: Prompt
    samples: int


class Rollout(NamedTuple):
    """The responses to one prompt: texts, whether each ended by itself, and features [S, F] in the trunk's dtype.

    Features are the taps' states on the ids that `Turn.read` gives for prompt and text, as in a `Scorer`.
    """

    prompt: Prompt
    responses: list[str]
    stopped: list[bool]
    features: Tensor


def plan(lengths: Sequence[int], samples: Sequence[int], batch_rows: int, spread: int = 0) -> list[list[int]]:
    """Batch request numbers by prompt length and number of samples, at most `batch_rows` rows (or one prompt) each.

    spread: by how many tokens the prompts of a batch may differ.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (length, count) in enumerate(zip(lengths, samples, strict=True)):
        groups.setdefault(((length - min(lengths)) // (spread + 1), count), []).append(index)
    batches = []
    for (_, count), members in sorted(groups.items()):
        step = max(1, batch_rows // count)
        batches += [members[i : i + step] for i in range(0, len(members), step)]
    return batches


def uniforms(request: Request, sampling: Sampling, seed: int) -> Tensor:
    """[S, max_new_tokens] numbers in [0, 1) that depend on this prompt and seed alone."""
    return keyed_uniforms(f"{seed}\n{request.prompt}", request.samples, sampling.max_new_tokens)


def sample(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    folder: Path | str,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_rows: int = 256,
    spread: int = 0,
    taps: str | Sequence[str | Tap] = "last",
    progress: bool = True,
) -> list[Rollout]:
    """Return the responses to every request, sampled or read from `folder`, in the requests' order.

    Args:
        spread: by how many tokens the prompts of a batch may differ. A padded batch is rounded otherwise than an even
            one, but with few samples of each prompt there are far fewer batches.
        taps: the features [F] (see `engine.taps`).

    Raises:
        ValueError: if `folder` holds responses to other prompts or features of other taps, two requests have the same
            prompt, or a prompt is too long for a response to fit the model.
    """
    folder = Path(folder)
    if len({json.dumps(request.prompt) for request in requests}) != len(requests):
        raise ValueError("prompts: expected different ones, got one twice")
    turn = Turn(tokenizer, model)
    rule = Rule(sampling, 0, turn.stop)
    takes_padding(model)  # refuses a model that cannot be decoded
    prompts = [turn.prompt(request.prompt) for request in requests]
    _check_length(model, requests, prompts, sampling.max_new_tokens + len(turn.closing))
    batches = plan([len(ids) for ids in prompts], [request.samples for request in requests], batch_rows, spread)
    parsed = parse_taps(taps, num_layers(model))
    store = _Store(folder, requests, parsed)
    todo = [(number, batch) for number, batch in enumerate(batches) if not store.has(number, batch)]
    total = sum(request.samples for request in requests)
    done = total - sum(requests[i].samples for _, batch in todo for i in batch)
    with tqdm(total=total, initial=done, desc="responses", unit="resp", disable=not progress) as bar:
        tokens, start = 0, bar.format_dict["elapsed"]
        for number, batch in todo:
            uniform = torch.cat([uniforms(requests[i], sampling, seed) for i in batch])
            ids = [prompts[i] for i in batch]
            count, skips = requests[batch[0]].samples, turn.special
            for drawn in sample_batch(model, ids, count, uniform, rule, turn.closing, parsed, skips):
                if isinstance(drawn, Sampled):
                    items = [requests[i].prompt for i in batch]
                    store.add(number, batch, _as_texts(model, turn, items, ids, drawn, parsed))
                    continue
                tokens += drawn
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'] - start, 1e-9):.0f} tokens/s")
            bar.update(sum(requests[i].samples for i in batch))
    return store.read(batches)


class _Texts(NamedTuple):
    """G prompts x S responses, row g * S + s; features [G * S, F]."""

    texts: list[str]
    stopped: list[bool]
    features: Tensor


def _as_texts(
    model: Any, turn: Turn, items: list[Prompt], prompts: list[list[int]], drawn: Sampled, taps: Sequence[Tap]
) -> _Texts:
    """Turn sampled tokens into texts and the features of these texts.

    A text read through the template may have other tokens than those that were drawn: templates write or remove think
    blocks, and several token sequences decode to one text. The trunk reads such texts again.
    """
    assert drawn.features is not None
    count = len(drawn.tokens) // len(items)
    features = drawn.features
    texts: list[str] = []
    stopped: list[bool] = []
    others: dict[int, list[int]] = {}
    for row, (response, ended) in enumerate(zip(drawn.tokens, drawn.stopped, strict=True)):
        item, prompt = items[row // count], prompts[row // count]
        said = response[:-1] if ended else response
        response, ended = turn.ending.cut(response, ended)
        texts.append(turn.text(prompt, response, ended))
        stopped.append(ended)
        ids = turn.read(item, texts[-1])
        if ids != [*prompt, *said, *turn.closing]:
            others[row] = ids
    for _, same in groupby(sorted(others, key=lambda row: len(others[row])), key=lambda row: len(others[row])):
        rows = list(same)
        for part in (rows[i : i + _REREAD_ROWS] for i in range(0, len(rows), _REREAD_ROWS)):
            batch = torch.tensor([others[row] for row in part])
            starts = torch.tensor([_shared(prompts[row // count], others[row]) for row in part])
            features[part] = read_again(model, batch, starts, taps, turn.special).to(features)
    return _Texts(texts, stopped, features)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the beginning that two sequences share, less than the second's length."""
    pairs = enumerate(zip(first, second[:-1], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second) - 1))


@torch.no_grad()
def read_again(model: Any, ids: Tensor, starts: Tensor, taps: Sequence[Tap], skips: Sequence[int] = ()) -> Tensor:
    """[B, T] ids of whole sequences without padding, [B] where their responses begin -> [B, F] the taps; `skips` as in
    `sample_batch`."""
    ids, (count, length) = ids.to(model.device), ids.shape
    with capturing(model.base_model, [tap.layer for tap in taps]) as states:
        output = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    response = torch.arange(length, device=ids.device) >= starts.to(ids.device)[:, None]
    logprob = None
    if reads_logprob(taps):
        logprob = response_logprob(LanguageHead.of(model, skips), output, ids, response)
    rows = torch.arange(1, count + 1, device=ids.device) * length - 1
    return read_taps(taps, states, output, rows, response, logprob)


def _check_length(model: Any, requests: Sequence[Request], prompts: Sequence[list[int]], room: int) -> None:
    limit = longest_in_company(model.config)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if limit is not None and len(prompts[longest]) + room > limit:
        raise ValueError(
            f"prompts: expected at most {limit - room} tokens each, so that {room} more fit the model's {limit} "
            f"positions, got {len(prompts[longest])}: {str(requests[longest].prompt)[:60]!r}"
        )


class _Store:
    """samples.jsonl and features/ of one folder."""

    def __init__(self, folder: Path, requests: Sequence[Request], taps: Sequence[Tap]) -> None:
        self.requests = requests
        self.taps = " ".join(map(str, taps))
        self.file = folder / "samples.jsonl"
        self.features = folder / "features"
        self.features.mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, dict[str, Any]] = {}
        for row in repaired_json_lines(self.file):
            index = row["index"]
            if index >= len(requests) or Request(row["prompt"], len(row["responses"])) != requests[index]:
                raise ValueError(
                    f"{self.file}: expected responses to the present prompts, got {row['prompt']!r} with "
                    f"{len(row['responses'])} responses as number {index}; name another output folder"
                )
            self.rows[index] = row

    def _features(self, number: int) -> Path:
        return self.features / f"{number:05d}.safetensors"

    def has(self, number: int, batch: list[int]) -> bool:
        return all(i in self.rows for i in batch) and self._features(number).is_file()

    def add(self, number: int, batch: list[int], drawn: _Texts) -> None:
        """Write the features, atomically, then the lines that are missing; a kill between the two does no harm."""
        count = len(drawn.texts) // len(batch)
        with atomic_file(self._features(number)) as temporary:
            save_file({"features": drawn.features.view(len(batch), count, -1)}, temporary, {"taps": self.taps})
        lines = []
        for position, index in enumerate(batch):
            if index in self.rows:
                continue
            rows = slice(position * count, (position + 1) * count)
            self.rows[index] = {
                "index": index,
                "prompt": self.requests[index].prompt,
                "responses": drawn.texts[rows],
                "stopped": drawn.stopped[rows],
            }
            lines.append(json.dumps(self.rows[index], ensure_ascii=False) + "\n")
        with writing(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def read(self, batches: list[list[int]]) -> list[Rollout]:
        found: dict[int, Rollout] = {}
        for number, batch in enumerate(batches):
            file = self._features(number)
            with reading_weights(file), safe_open(file, "pt") as stored:
                features, taps = stored.get_tensor("features"), (stored.metadata() or {}).get("taps")
            if taps != self.taps:
                raise ValueError(
                    f"{file}: expected features of the taps {self.taps}, got {taps}; name another output folder"
                )
            for index, block in zip(batch, features, strict=True):
                row = self.rows[index]
                found[index] = Rollout(row["prompt"], row["responses"], row["stopped"], block)
        return [found[index] for index in range(len(self.requests))]
