"""Read rows from JSON lines, Parquet files and Hugging Face data sets, each with its file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..job.files import refuse_mistyped
from .rows import ARRAY, RowError

FILES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_MAX_DEPTH = 100  # levels of nesting; Python's recursion limit is no fixed bound, because the callers use part of it


def check_source(key: str, name: str, endings: Collection[str] = tuple(FILES)) -> None:
    """Raise ValueError for an empty name, or a file that is not there or of another kind; nothing is read.

    key: the config key, for errors.   endings: of the files that can be read.
    """
    path = Path(name)
    ending = path.suffix.lower()
    if path.is_file():
        if ending not in endings:
            raise ValueError(
                f"{key}: {name}: expected a file that ends in {', '.join(endings)}, got {path.suffix or 'no ending'}"
            )
    elif ending in endings:
        raise ValueError(f"{key}: {name}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    else:
        refuse_mistyped(key, name.partition(":")[0])


def read_rows(key: str, name: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or data set, named as `load_pairs` describes; an unreadable line is yielded as a RowError.

    key: the config key, for errors.
    """
    check_source(key, name)
    path = Path(name)
    if not path.is_file():
        return _dataset_rows(key, name)
    return _jsonl_rows(key, path) if FILES[path.suffix.lower()] == "jsonl" else _parquet_rows(key, path)


@contextmanager
def opened(key: str, path: Path) -> Iterator[IO[bytes]]:
    """Open a data file for reading. Raises ValueError, with the config `key`, if it cannot be read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{key}: {path}: cannot be read ({error.strerror})") from None
    with file:
        yield file


def text_lines(key: str, path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of each line of a UTF-8 text file that is not blank. Raises ValueError, with the config `key`."""
    with opened(key, path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")  # tools on Windows begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path}: expected UTF-8, got {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def value_of_line(line: bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Return the JSON value of a line. Raises RowError, also for nesting over 100 levels and for half a surrogate pair.

    parse_constant: makes the value of NaN and Infinity, as in `json.loads`.
    """
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")  # tools on Windows begin a file with a byte order mark
        value = json.loads(text, parse_constant=parse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"expected UTF-8, got {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        if line.lstrip().startswith(b"["):  # an array over several lines
            raise RowError(ARRAY) from None
        raise RowError(f"expected one JSON object per line, got {error.msg}: column {error.colno}") from None
    except RecursionError:
        raise RowError(_TOO_DEEP) from None
    except ValueError as error:
        raise RowError(f"expected one JSON object per line, got {error}") from None
    if line.count(b"[") + line.count(b"{") > _MAX_DEPTH and _is_too_deep(value):
        raise RowError(_TOO_DEEP)
    if b"\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise RowError(f"expected text, got half of a surrogate pair, {half!a}") from None
    return value


_TOO_DEEP = f"expected at most {_MAX_DEPTH} levels of nesting, got more"


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(inner, (dict, list)) for inner in level)


def _jsonl_rows(key: str, path: Path) -> Iterator[tuple[str, Any]]:
    with opened(key, path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = value_of_line(line)
                except RowError as error:
                    row = error
                yield f"{path}, line {number}", row


def _parquet_rows(key: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install 'prudent[train]'") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", {column: _without_nulls(value) for column, value in row.items()}
    except Exception as error:  # pyarrow has one exception class per cause
        after = f" after row {number}" if number else ""
        raise ValueError(f"{key}: {path}: expected a Parquet file, got {error}{after}") from None


def _dataset_rows(key: str, name: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError("Hugging Face datasets need their library: pip install 'prudent[train]'") from None
    repository, _, split = name.partition(":")
    try:
        if _is_saved(Path(repository)):
            rows = _split_of(datasets.load_from_disk(repository), split)
        else:
            rows = datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # offline, unknown name, unknown split, broken file: each has its own exception class
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{key}: {name}: neither a file nor a dataset that loads with split {split or 'train'!r}: {reason}"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", {column: _without_nulls(value) for column, value in row.items()}


def _is_saved(folder: Path) -> bool:
    """Return whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _split_of(saved: Any, split: str) -> Any:
    """Return the rows of a split of a saved data set; a data set saved without splits is read whole."""
    if not isinstance(saved, dict):
        if split and split != str(saved.split):
            raise ValueError(f"the folder holds one data set without splits: leave out ':{split}'")
        return saved
    if (split or "train") not in saved:
        raise ValueError(f"the splits are {', '.join(saved)}: choose one as in FOLDER:{next(iter(saved), 'SPLIT')}")
    return saved[split or "train"]


def _without_nulls(value: Any) -> Any:
    """Remove keys whose value is None: Arrow gives each object the keys of all objects in its column."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
