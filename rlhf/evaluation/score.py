"""Run `prudent score`: add rewards to every line of a JSON-lines file, in order; a resumed run writes equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ...engine import Aggregation, Scorer
from ...engine.text import ItemError
from ..data.pairs import name_unread
from ..data.reading import opened, value_of_line
from ..data.rows import RowError, items_of_row, object_of_row, unread_of_items
from ..job.files import atomic_write_json, read_json, writing
from ..job.log import muted
from ..job.record import record_path, refuse_other_settings, refuse_to_replace
from ..models.features import model_fingerprint
from ..models.loading import load_reward
from .by_item import ITEM_FIELDS, by_item
from .config import ScoreConfig

CHUNK_ROWS = 256  # rows read, scored and written at a time; bounds the memory, and the work that a kill loses
_SIDES = ("chosen", "rejected")
_OUTPUT = (*ITEM_FIELDS, "scores", "error")  # fields that a row of the input may not have: they would look like results


@dataclass
class ScoreResult:
    """output: the file; rows: its lines; kept: the lines of an earlier run. The other counts are of this run's rows."""

    output: str
    rows: int = 0
    kept: int = 0
    bad_rows: int = 0
    nonfinite: int = 0
    truncated: int = 0

    def __str__(self) -> str:
        where = "standard output" if self.output == "-" else self.output
        lines = [f"{where}: {self.rows} rows" + (f", {self.kept} of them from an earlier run" if self.kept else "")]
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
    """A line of input: its object, the items to score (two of a pair), or the line's error."""

    where: str
    size: int  # bytes
    value: dict[str, Any]
    items: list[dict[str, Any]]
    error: str | None = None
    unread: tuple[str, ...] = ()  # columns that look like content and that no item contains

    @property
    def own(self) -> dict[str, Any]:
        """The fields that are copied to the output unchanged."""
        return {key: value for key, value in self.value.items() if key not in _OUTPUT}


def run_score(
    config: ScoreConfig, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> ScoreResult:
    """Score every row of a JSON-lines file.

    A row is a prompt with a `response` (texts or messages), {"messages"}, or a pair {"chosen", "rejected"}, with or
    without a prompt. Prompts and pairs are read as `load_pairs` reads them, from the same columns. The output has one
    line per row, in order (blank lines are skipped): the row's own fields, and
        reward, nominal, worst   floats; null if not finite
        mean, std                lists of K floats
        distance                 float, from the reference responses, 1 = their 95 % quantile; only of a model that has
                                 a trust region
    or, for a pair, `scores`: {"chosen": these, "rejected": these}. Rewards are calibrated and not sampled. A row
    that has one of these fields already, or `error`, is a broken row: an old score could be taken for a new one.
    A broken row that is skipped has its own fields, a null `reward` and the `error`.

    Rows are scored in chunks of 256, so the memory does not grow with the file. `<output>.config.json` records how the
    output was made.

    Args:
        config: see `ScoreConfig`.
        resume: continue an output that was cut short. Whole chunks are kept, the rest is scored again, so the file
            becomes the same, byte for byte, as one written in one run.
        overwrite: replace an output that exists.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: for a broken row, naming file and line (unless skip_bad_rows); for an aggregation or model that
            cannot be used; for an output that exists already, or that cannot be resumed because another model or config
            made it.
    """
    spec = None if config.aggregation is None else Aggregation.parse(config.aggregation)
    if spec is not None and spec.centre != "none":
        raise ValueError(
            f"score: aggregation: expected centre=none, because rows are scored one by one, got {str(spec)!r}"
        )
    if config.data != "-" and not Path(config.data).is_file():
        found = "expected a file, got a folder" if Path(config.data).is_dir() else "no such file"
        raise ValueError(f"data: {config.data}: {found}")
    kept, kept_bytes = _kept(config, resume, overwrite)
    scorer = load_reward("model", config.model, append_eos=config.append_eos).scorer(
        config.batch_tokens, config.max_length, progress
    )
    origin = _origin(config, scorer)
    _refuse_another_model(config, kept, origin)
    spec = (spec or scorer.model.score.aggregation).with_centre("none")
    spec.check_heads(scorer.model.score.num_heads)
    scorer.model.score.check_price(spec)
    result = ScoreResult(config.output, rows=kept, kept=kept)
    total = None if config.data == "-" else os.path.getsize(config.data)
    with writing(config.output), ExitStack() as stack:  # closing the file writes too
        rows = _read_rows(stack.enter_context(_source(config.data)), config.data)
        done = _skip(rows, kept, config)
        _begin(config, kept_bytes, origin)  # changes an existing output only now that data and model are known to fit
        target = stack.enter_context(_target(config.output))
        # its warnings would come once a chunk; the result has the counts
        stack.enter_context(muted(Scorer.__module__))
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "delay": 1, "disable": not progress}
        bar = stack.enter_context(tqdm(desc="scoring rows", total=total, initial=done, **options))
        unread: set[str] = set()
        while chunk := list(islice(rows, CHUNK_ROWS)):
            new = dict.fromkeys(name for row in chunk for name in row.unread if name not in unread)
            unread.update(name_unread("data", config.data, new))
            target.write(b"".join(_score(chunk, scorer, spec, config, result)))
            target.flush()
            result.rows += len(chunk)
            bar.update(sum(row.size for row in chunk))
    return result


def _origin(config: ScoreConfig, scorer: Scorer | None = None) -> dict[str, Any]:
    """Settings that a resumed run must share with the run that it continues. batch_tokens may change."""
    origin = config.model_dump(mode="json", exclude={"output", "batch_tokens"})
    return origin if scorer is None else {**origin, "weights": _weights(scorer)}


def _weights(scorer: Scorer) -> str:
    """Fingerprint the model, to detect another one saved under the same name."""
    digest = hashlib.sha256(model_fingerprint(scorer.model).encode())
    for name, tensor in sorted(scorer.model.score.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_another_model(config: ScoreConfig, kept: int, origin: Mapping[str, Any]) -> None:
    before = read_json(record_path(config.output)) if kept else origin
    if before.get("weights") != origin["weights"]:
        raise ValueError(f"output: {config.output} cannot be resumed: the model {config.model} has changed since")


def _kept(config: ScoreConfig, resume: bool, overwrite: bool) -> tuple[int, int]:
    """Check the output against the flags; returns how many of its rows are kept, and their bytes. Writes nothing."""
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
        return 0, 0  # left by a run that was refused at its first rows
    if config.data != "-" and output.samefile(config.data):
        raise ValueError(f"output: expected another file than the data, got {output}")
    if overwrite:
        return 0, 0
    if not resume:
        refuse_to_replace(output)
    refuse_other_settings(output, _origin(config))
    lines = kept = position = end = 0
    with output.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, position = lines + 1, position + len(line)
            if lines % CHUNK_ROWS == 0:
                kept, end = lines, position
    return kept, end


def _begin(config: ScoreConfig, kept_bytes: int, origin: Mapping[str, Any]) -> None:
    """Cut the output to the bytes that are kept, and record how it is made."""
    if config.output == "-":
        return
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        file.truncate(kept_bytes)
    atomic_write_json(record_path(config.output), dict(origin))


def _skip(rows: Iterator[_Row], kept: int, config: ScoreConfig) -> int:
    """Skip the rows whose lines are kept; return their bytes. The last kept line must belong to the last such row."""
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
        if not isinstance(written, dict) or any(written.get(key) != value for key, value in row.own.items()):
            raise ValueError(
                f"output: {config.output} cannot be resumed: line {kept} does not belong to {row.where}; "
                "has a file changed?"
            )
    return size


def _read_rows(file: Iterable[bytes], name: str) -> Iterator[_Row]:
    """Yield the lines that are not blank; a broken line has its error."""
    for number, line in enumerate(file, 1):
        if line.strip():
            row = _Row(f"{name}, line {number}", len(line), {}, [])
            try:
                row.value = dict(object_of_row(value_of_line(line, _no_constant)))
                taken = [key for key in _OUTPUT if key in row.value]
                if taken:
                    raise RowError(f"the row has a field {taken[0]!r} already, which would be lost: rename it first")
                row.items = items_of_row(row.value)
                row.unread = tuple(unread_of_items(row.value))
            except RowError as error:
                row.error = str(error)
            yield row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _score(
    rows: list[_Row], scorer: Scorer, spec: Aggregation, config: ScoreConfig, result: ScoreResult
) -> list[bytes]:
    """Return the output lines of one chunk; add to the result's counts."""
    _refuse(rows, config)
    try:
        scores = scorer.score([item for row in rows for item in row.items], aggregation=spec)
    except ItemError:
        for row in rows:
            _try_encoding(row, scorer)
        _refuse(rows, config)
        scores = scorer.score([item for row in rows for item in row.items], aggregation=spec)
    result.bad_rows += sum(row.error is not None for row in rows)
    result.nonfinite += scores.num_nonfinite
    result.truncated += scores.num_truncated
    found = by_item(scores)
    return [_line(row, [next(found) for _ in row.items]) for row in rows]


def _refuse(rows: Iterable[_Row], config: ScoreConfig) -> None:
    for row in rows:
        if row.error is not None and not config.skip_bad_rows:
            raise ValueError(f"data: {row.where}: {row.error}")


def _try_encoding(row: _Row, scorer: Scorer) -> None:
    """Mark the row as broken if the scorer cannot read it."""
    try:
        for item in row.items:
            scorer.encode(item)
    except ItemError as error:
        row.error, row.items = error.reason, []


def _line(row: _Row, found: list[dict[str, Any]]) -> bytes:
    if row.error is not None:
        return _encoded({**row.own, "reward": None, "error": row.error})
    if len(found) == 2:
        return _encoded({**row.own, "scores": dict(zip(_SIDES, found, strict=True))})
    return _encoded({**row.own, **found[0]})


def _encoded(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _source(name: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if name == "-" else opened("data", Path(name))


def _target(name: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdout.buffer) if name == "-" else open(name, "ab")
