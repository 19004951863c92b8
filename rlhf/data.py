"""Preference data in the formats people have, as one list of pairs: read, checked, counted, split by prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .rows import RowError, Text, pairs_of_row

_FILES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the response preferred and the one rejected; each a text or a list of {"role", "content"} messages.

    Two texts join as they are: prompt + response is the whole sequence. `margin`: how much the annotator preferred it
    (Bradley-Terry's margin). Scores: per-response annotations, on whatever scale they came. `where`: file and
    line, for messages; no part of what the pair is.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def prompt_key(self) -> str:
        """One string per distinct prompt."""
        return _key(self.prompt)

    def items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The chosen and the rejected sequence, as `Scorer` takes them."""
        return {"prompt": self.prompt, "response": self.chosen}, {"prompt": self.prompt, "response": self.rejected}


class PairData(NamedTuple):
    """pairs, and counts of rows, pairs, prompts, bad_rows, duplicates, equal (responses), below_gap."""

    pairs: list[PreferencePair]
    counts: dict[str, int]


def load_pairs(
    file_or_name: Path | str,
    *,
    min_score_gap: float = 2.0,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    progress: bool = False,
) -> PairData:
    """Preference pairs from a JSON-lines or Parquet file, or a Hugging Face dataset.

    A row is one of
    - prompt, chosen, rejected: texts, or lists of messages;
    - chosen, rejected: the prompt is what both begin with (whole messages; of texts, up to the last "Assistant:" turn
      that both have, as in HH-RLHF, else up to the last blank of the shared prefix);
    - prompt (or instruction), and responses (or completions): a list of texts or {"response": ...} with scores, or with
      a parallel list `scores`: UltraFeedback. Every two responses whose scores differ by `min_score_gap` make a pair.
    Beside the first two: margin (or strength), source, and score_chosen and score_rejected, where a pair whose scores
    differ by less than `min_score_gap` is dropped (BRME 5.2: "greater than or equal to 2").

    Args:
        file_or_name: a file that ends in .jsonl, .json (JSON lines too) or .parquet, or a dataset name, with ":SPLIT"
            behind it where the split is not `train`.
        min_score_gap: > 0, on the scores' own scale.
        skip_bad_rows: count broken rows and go on, instead of refusing the file.
        limit: stop after this many rows.

    Returns:
        PairData. Exact duplicates and pairs with two equal responses are counted and dropped.

    Raises:
        ValueError: naming file and line, for a broken row; for a file that is missing, empty or without a usable pair.
    """
    if not min_score_gap > 0:
        raise ValueError(f"min_score_gap: expected a number above 0, got {min_score_gap}")
    name = str(file_or_name)
    counts = dict.fromkeys(("rows", "pairs", "prompts", "bad_rows", "duplicates", "equal", "below_gap"), 0)
    pairs: list[PreferencePair] = []
    seen: set[str] = set()
    for where, row in tqdm(read_rows(name), desc="reading pairs", unit="row", delay=1, disable=not progress):
        if limit is not None and counts["rows"] >= limit:
            break
        counts["rows"] += 1
        try:
            if isinstance(row, RowError):
                raise row
            found, below = pairs_of_row(row, min_score_gap)
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(f"{where}: {error}") from None
            counts["bad_rows"] += 1
            continue
        counts["below_gap"] += below
        for fields in found:
            pair = PreferencePair(**fields, where=where)
            responses = _key(pair.chosen), _key(pair.rejected)
            key = json.dumps([pair.prompt_key, *responses])
            if responses[0] == responses[1]:
                counts["equal"] += 1
            elif key in seen:
                counts["duplicates"] += 1
            else:
                seen.add(key)
                pairs.append(pair)
    if counts["rows"] == 0:
        raise ValueError(f"{name}: expected preference pairs, got an empty file")
    if not pairs:
        dropped = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
        raise ValueError(
            f"{name}: expected at least one usable pair, got none ({dropped}; min_score_gap {min_score_gap:g})"
        )
    counts["pairs"] = len(pairs)
    counts["prompts"] = len({pair.prompt_key for pair in pairs})
    return PairData(pairs, counts)


def split_by_prompt(
    pairs: list[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out): `fraction` of the prompts, at least one, are held out with all their pairs; 0 holds out none.

    By prompt, because pairs of one prompt share its text and often a response: held out by row they were half known.
    Which prompts are held out depends on the set of prompts and the seed, not on the order of rows.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction: expected a number in [0, 1), got {fraction}")
    if fraction == 0:
        return list(pairs), []
    prompts = sorted({pair.prompt_key for pair in pairs})
    if len(prompts) < 2:
        raise ValueError("eval_fraction: expected at least two prompts to split, got one; 0 trains on everything")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = set(random.Random(seed).sample(prompts, count))
    train = [pair for pair in pairs if pair.prompt_key not in held]
    return train, [pair for pair in pairs if pair.prompt_key in held]


def _key(text: Text) -> str:
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True)


def read_rows(name: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or dataset (as `load_pairs` names them); a line that is no JSON comes as its RowError."""
    path = Path(name)
    kind = _FILES.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(
                f"{name}: expected a file that ends in {', '.join(_FILES)}, got {path.suffix or 'no ending'}"
            )
        return _jsonl_rows(path) if kind == "jsonl" else _parquet_rows(path)
    if kind is not None:
        raise ValueError(f"{name}: no such file")
    return _dataset_rows(name)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row: Any
            try:
                row = json.loads(line.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                row = RowError(f"expected UTF-8, got {error.reason} at byte {error.start}")
            except json.JSONDecodeError as error:
                row = RowError(f"expected one JSON object a line, got {error.msg}: column {error.colno}")
            except ValueError as error:
                row = RowError(f"expected one JSON object a line, got {error}")
            yield f"{path}, line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'prudent[train]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has one exception class per cause
        raise ValueError(f"{path}: expected a Parquet file, got {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _dataset_rows(name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError("Hugging Face datasets need their library: pip install 'prudent[train]'") from None
    repository, _, split = name.partition(":")
    split = split or "train"
    try:
        rows = datasets.load_dataset(repository, split=split)
    except Exception as error:  # offline, unknown name, unknown split, broken file: a class each, the text says which
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: neither a file nor a dataset that loads with split {split!r}: {reason}") from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row
