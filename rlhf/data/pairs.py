"""Preference data in the formats people have, as one list of pairs: read, checked, counted, split by prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from ..job.files import refuse_mistyped
from .rows import ARRAY, RowError, Text, pairs_of_row

FILES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


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
    key: str = "data",
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
        key: what errors call the source.

    Returns:
        PairData. Exact duplicates and pairs with two equal responses are counted and dropped.

    Raises:
        ValueError: naming key, file and line, for a broken row; for a file that is missing, empty or without a usable
            pair.
    """
    if not min_score_gap > 0:
        raise ValueError(f"min_score_gap: expected a number above 0, got {min_score_gap}")
    name = str(file_or_name)
    counts = dict.fromkeys(("rows", "pairs", "prompts", "bad_rows", "duplicates", "equal", "below_gap"), 0)
    pairs: list[PreferencePair] = []
    seen: set[str] = set()
    for where, row in tqdm(read_rows(key, name), desc="reading pairs", unit="row", delay=1, disable=not progress):
        if limit is not None and counts["rows"] >= limit:
            break
        counts["rows"] += 1
        try:
            if isinstance(row, RowError):
                raise row
            found, below = pairs_of_row(row, min_score_gap)
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(f"{key}: {where}: {error}") from None
            counts["bad_rows"] += 1
            continue
        counts["below_gap"] += below
        for fields in found:
            pair = PreferencePair(**fields, where=where)
            responses = _key(pair.chosen), _key(pair.rejected)
            whole = json.dumps([pair.prompt_key, *responses])
            if responses[0] == responses[1]:
                counts["equal"] += 1
            elif whole in seen:
                counts["duplicates"] += 1
            else:
                seen.add(whole)
                pairs.append(pair)
    if counts["rows"] == 0:
        raise ValueError(f"{key}: {name}: expected preference pairs, got an empty file")
    if not pairs:
        dropped = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
        raise ValueError(
            f"{key}: {name}: expected at least one usable pair, got none ({dropped}; min_score_gap {min_score_gap:g})"
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


def read_rows(key: str, name: str, endings: Collection[str] = tuple(FILES)) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or dataset (as `load_pairs` names them); a line that is no JSON comes as its RowError.

    key: what errors call the source.   endings: of all files that may be given for it.
    """
    path = Path(name)
    kind = FILES.get(path.suffix.lower())
    if path.is_file():
        if kind is None:
            raise ValueError(
                f"{key}: {name}: expected a file that ends in {', '.join(endings)}, got {path.suffix or 'no ending'}"
            )
        return _jsonl_rows(key, path) if kind == "jsonl" else _parquet_rows(key, path)
    if kind is not None:
        raise ValueError(f"{key}: {name}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    refuse_mistyped(key, name.partition(":")[0])
    return _dataset_rows(key, name)


def _jsonl_rows(key: str, path: Path) -> Iterator[tuple[str, Any]]:
    with opened(key, path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", _value_of_line(line)


@contextmanager
def opened(key: str, path: Path) -> Iterator[IO[bytes]]:
    """A file of data, for reading. ValueError, with `key`, where that is not allowed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{key}: {path}: cannot be read ({error.strerror})") from None
    with file:
        yield file


def _value_of_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip("\r\n"))  # Windows' tools begin a file with a mark
    except UnicodeDecodeError as error:
        return RowError(f"expected UTF-8, got {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):  # over several lines
            return RowError(ARRAY)
        return RowError(f"expected one JSON object a line, got {error.msg}: column {error.colno}")
    except ValueError as error:
        return RowError(f"expected one JSON object a line, got {error}")


def _parquet_rows(key: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'prudent[train]'") from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has one exception class per cause
        raise ValueError(f"{key}: {path}: expected a Parquet file, got {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _dataset_rows(key: str, name: str) -> Iterator[tuple[str, Any]]:
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
        raise ValueError(
            f"{key}: {name}: neither a file nor a dataset that loads with split {split!r}: {reason}"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row
