"""`prudent score`: JSON lines in, the same lines with rewards out; streaming, in order, resumable to the same bytes."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ...engine import Aggregation, Scorer, Scores
from ..data.pairs import PreferencePair, opened
from ..data.rows import ARRAY, RowError, object_of_row, pairs_of_row
from ..job.files import atomic_write_json, read_json, writing
from ..models.loading import load_scorer
from .config import ScoreConfig

CHUNK_ROWS = 256  # rows read, scored and written at a time: the memory a file takes, and the most a kill costs
_SIDES = ("chosen", "rejected")
_PAIR_FIELDS = ("prompt", "instruction", "question", *_SIDES)
_FIELDS = ("reward", "nominal", "worst", "mean", "std")


@dataclass
class ScoreResult:
    """output: the file; rows: its lines; kept: those of an earlier run. The other counts are of this run's rows."""

    output: str
    rows: int = 0
    kept: int = 0
    bad_rows: int = 0
    nonfinite: int = 0
    truncated: int = 0

    def __str__(self) -> str:
        where = "standard output" if self.output == "-" else self.output
        lines = [f"{where}: {self.rows} rows" + (f", {self.kept} of them from before" if self.kept else "")]
        for count, meaning in (
            (self.bad_rows, "broken rows, written with a null reward and the error"),
            (self.nonfinite, "responses whose reward is not finite, written as null"),
            (self.truncated, "responses too long, scored without their beginning"),
        ):
            if count:
                lines.append(f"  {count} {meaning}")
        return "\n".join(lines)


@dataclass
class _Row:
    """A line of input: the object it holds, the items to score (two of a pair), or what is wrong with it."""

    where: str
    size: int  # bytes
    value: dict[str, Any]
    items: list[Mapping[str, Any]]
    error: str | None = None


def run_score(
    config: ScoreConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> ScoreResult:
    """Score every row of a JSON-lines file.

    A row is {"prompt", "response"} (texts or messages), {"messages"}, or a pair {"chosen", "rejected"}, with or without
    a prompt, read as `load_pairs` reads it. The output has one line a row, in order (blank lines are no rows): the
    row's own fields, and beside them
        reward, nominal, worst   floats; null where not finite
        mean, std                lists of K floats
    or, for a pair, `scores`: {"chosen": the five, "rejected": the five}. Rewards are calibrated and not sampled.

    Rows are scored in chunks of 256, so the memory does not grow with the file. Beside the output lies
    `<output>.config.json`, which says how it was made.

    Args:
        config: see `ScoreConfig`.
        resume: go on with an output that was cut short. Whole chunks are kept, the rest is scored again, so the file
            becomes the same, byte for byte, as one written in one go.
        overwrite: replace an output that exists.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: for a broken row, naming file and line (unless skip_bad_rows); for an aggregation or model that
            cannot be used; for an output that exists, or that was made otherwise than the resumed one.
    """
    spec = None if config.aggregation is None else Aggregation.parse(config.aggregation)
    if spec is not None and spec.centre != "none":
        raise ValueError(f"score: aggregation: expected centre=none, for rows are scored one by one, got {str(spec)!r}")
    if config.data != "-" and not Path(config.data).is_file():
        found = "expected a file, got a folder" if Path(config.data).is_dir() else "no such file"
        raise ValueError(f"data: {config.data}: {found}")
    kept, kept_bytes = _kept(config, resume, overwrite)
    scorer = load_scorer(config.model, config.batch_tokens, config.max_length, progress, append_eos=config.append_eos)
    spec = (spec or scorer.model.score.aggregation).with_centre("none")
    spec.check_heads(scorer.model.score.num_heads)
    result = ScoreResult(config.output, rows=kept, kept=kept)
    total = None if config.data == "-" else os.path.getsize(config.data)
    with writing(config.output), ExitStack() as stack:  # closing the file writes too
        rows = _read_rows(stack.enter_context(_source(config.data)), config.data)
        done = _skip(rows, kept, config)
        _begin(config, kept_bytes)  # nothing that was there is touched before data, model and output are known to fit
        target = stack.enter_context(_target(config.output))
        stack.enter_context(_quiet())
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 1, "disable": not progress}
        bar = stack.enter_context(tqdm(desc="scoring rows", total=total, initial=done, **options))
        while chunk := list(islice(rows, CHUNK_ROWS)):
            target.write(b"".join(_score(chunk, scorer, spec, config, result)))
            target.flush()
            result.rows += len(chunk)
            bar.update(sum(row.size for row in chunk))
    return result


def _record(config: ScoreConfig) -> Path:
    return Path(f"{config.output}.config.json")


def _made_by(config: ScoreConfig) -> dict[str, Any]:
    """What a continuation must share with the run it continues; how much memory a batch takes may change."""
    return config.model_dump(mode="json", exclude={"output", "batch_tokens"})


def _kept(config: ScoreConfig, resume: bool, overwrite: bool) -> tuple[int, int]:
    """Check the output against the flags; returns how many of its rows are kept, and their bytes. Changes nothing."""
    if resume and overwrite:
        raise ValueError("score: expected resume or overwrite, got both")
    if resume and "-" in (config.data, config.output):
        raise ValueError("score: resume: expected files as data and output, got '-' (standard input or output)")
    output = Path(config.output)
    if config.output == "-" or not output.exists():
        return 0, 0
    if output.is_dir():
        raise ValueError(f"output: expected a file, got {output}, a folder")
    if output.stat().st_size == 0:
        return 0, 0  # of a run that was refused at its first rows: a mended command may have the file
    if config.data != "-" and output.samefile(config.data):
        raise ValueError(f"output: expected another file than the data, got {output}")
    if overwrite:
        return 0, 0
    if not resume:
        raise ValueError(f"output: {output} exists already; resume it, overwrite it, or choose another output")
    record = _record(config)
    if not record.exists():
        raise ValueError(f"output: {output} cannot be resumed: {record.name}, which says how it was made, is missing")
    before, made = read_json(record), _made_by(config)
    changed = [key for key in made if before.get(key) != made[key]]
    if changed:
        raise ValueError(f"output: {output} cannot be resumed: it was made with another {', '.join(changed)}")
    lines = kept = position = end = 0
    with output.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, position = lines + 1, position + len(line)
            if lines % CHUNK_ROWS == 0:
                kept, end = lines, position
    return kept, end


def _begin(config: ScoreConfig, kept_bytes: int) -> None:
    """Make the output what is kept of it, and record how it is made."""
    if config.output == "-":
        return
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        file.truncate(kept_bytes)
    atomic_write_json(_record(config), _made_by(config))


def _skip(rows: Iterator[_Row], kept: int, config: ScoreConfig) -> int:
    """Pass over the rows whose lines are kept; returns their bytes. The last line must be of the last row."""
    size = 0
    row = None
    for row in islice(rows, kept):
        size += row.size
    if row is not None:
        with open(config.output, "rb") as file:
            line = next(islice(file, kept - 1, None))
        try:
            written = json.loads(line)
        except ValueError:
            written = None
        if not isinstance(written, dict) or any(written.get(key) != value for key, value in row.value.items()):
            raise ValueError(
                f"output: {config.output} cannot be resumed: line {kept} is not of {row.where}; has a file changed?"
            )
    return size


def _read_rows(file: Iterable[bytes], name: str) -> Iterator[_Row]:
    """The lines that are not blank; one that is no row comes with its error."""
    for number, line in enumerate(file, 1):
        if line.strip():
            row = _Row(f"{name}, line {number}", len(line), {}, [])
            try:
                value = json.loads(line, parse_constant=_no_constant)
                if b"\\ud" in line.lower():
                    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
                row.value = dict(object_of_row(value))
                row.items = _items(row.value)
            except RowError as error:
                row.error = str(error)
            except ValueError as error:
                several = line.lstrip().startswith(b"[")
                row.error = ARRAY if several else f"expected one JSON object a line, in UTF-8, got {error}"
            yield row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _items(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What of a row is scored; RowError if that cannot be told."""
    if all(row.get(side) is not None for side in _SIDES):
        taken = ["scores"] if "scores" in row else []
        given = {key: row[key] for key in _PAIR_FIELDS if key in row}
        ((fields,), _) = pairs_of_row(given, min_score_gap=1.0)  # without scores no pair is below any gap
        items: list[Mapping[str, Any]] = list(PreferencePair(**fields).items())
    else:
        taken = [key for key in _FIELDS if key in row]
        names = ("messages",) if "messages" in row else ("prompt", "response")
        if any(name not in row for name in names):
            found = ", ".join(row) or "none"
            raise RowError(f"expected the fields prompt and response, messages, or chosen and rejected, got {found}")
        items = [{key: row[key] for key in (*names, "complete") if key in row}]
    if taken:
        raise RowError(f"the row has a field {taken[0]!r} already, which would be lost: rename it first")
    return items


def _score(
    rows: list[_Row], scorer: Scorer, spec: Aggregation, config: ScoreConfig, result: ScoreResult
) -> list[bytes]:
    """The output lines of one chunk; adds to the result's counts."""
    _refuse(rows, config)
    try:
        scores = scorer.score([item for row in rows for item in row.items], aggregation=spec)
    except ValueError:
        for row in rows:
            _try_encoding(row, scorer)
        _refuse(rows, config)
        scores = scorer.score([item for row in rows for item in row.items], aggregation=spec)
    result.bad_rows += sum(row.error is not None for row in rows)
    result.nonfinite += scores.num_nonfinite
    result.truncated += scores.num_truncated
    found = iter(_by_item(scores))
    return [_line(row, [next(found) for _ in row.items]) for row in rows]


def _refuse(rows: Iterable[_Row], config: ScoreConfig) -> None:
    for row in rows:
        if row.error is not None and not config.skip_bad_rows:
            raise ValueError(f"data: {row.where}: {row.error}")


def _try_encoding(row: _Row, scorer: Scorer) -> None:
    """Find out whether this is the row that the scorer cannot read."""
    try:
        for item in row.items:
            scorer.encode(item)
    except ValueError as error:
        row.error, row.items = str(error).removeprefix("Scorer: item: "), []


def _by_item(scores: Scores) -> Iterator[dict[str, Any]]:
    columns = (scores.reward, scores.nominal, scores.worst, scores.mean.tolist(), scores.std.tolist())
    for values in zip(*columns, strict=True):
        yield {
            name: [_number(x) for x in value] if isinstance(value, list) else _number(value)
            for name, value in zip(_FIELDS, values, strict=True)
        }


def _number(value: float | None) -> float | None:
    """Nine significant digits, which tell any two fp32 numbers apart; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


def _line(row: _Row, found: list[dict[str, Any]]) -> bytes:
    if row.error is not None:
        return _encoded({"reward": None, **row.value, "error": row.error})
    if len(found) == 2:
        return _encoded({**row.value, "scores": dict(zip(_SIDES, found, strict=True))})
    return _encoded({**row.value, **found[0]})


def _encoded(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _source(name: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if name == "-" else opened("data", Path(name))


def _target(name: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdout.buffer) if name == "-" else open(name, "ab")


@contextmanager
def _quiet() -> Iterator[None]:
    """The scorer warns once a call, which here is once a chunk; the result has the counts."""
    logger = logging.getLogger(Scorer.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
