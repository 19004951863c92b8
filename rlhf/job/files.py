"""Files that are either there and whole, or not there: what makes a killed job resumable."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError

_ERRNO = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")  # as Python and Rust print the system's number


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cause(error: BaseException) -> str:
    """What the system said, where it is behind `error`; else its first line."""
    number = _number(error)
    if number is not None:
        return os.strerror(number)
    return (str(error) or type(error).__name__).splitlines()[0]


def in_a_sentence(error: OSError, output: Path | str | None) -> str:
    """PATH: what the system said of it; behind its key, where it is the `output`, in it, beside it or above it."""
    if error.errno is None or error.strerror is None:
        return str(error)
    if error.filename is None:  # of a file that is open: it is the output that a disk has no room for
        return error.strerror if output is None else f"output: {output}: {error.strerror}"
    name = os.fsdecode(error.filename)
    if output is not None:
        file, own = (Path(os.path.abspath(path)) for path in (name, output))
        if file.is_relative_to(own) or own.is_relative_to(file) or str(file).startswith(f"{own}."):
            name = f"output: {name}"
    return f"{name}: {error.strerror}"


def _number(error: BaseException) -> int | None:
    """The system's number of what went wrong, wherever it is behind `error`."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno:
            return behind.errno
        printed = _ERRNO.search(str(behind))  # safetensors and shutil.copytree pass the text on alone
        if printed is not None:
            return int(printed[1] or printed[2])
        behind = behind.__context__
    return None


def _failed_write(error: BaseException, temporary: Path | None) -> bool:
    """Whether `error` is of a write that names no file, or none but the `temporary` that nobody asked for."""
    if isinstance(error, OSError) and error.filename is None:
        return error.errno is not None or isinstance(error, shutil.Error)  # else a library's own, a failed download say
    if isinstance(error, OSError):
        return temporary is not None and str(error.filename).startswith(str(temporary))
    if isinstance(error, SafetensorError):
        return "deserializ" not in str(error).lower()
    return "inline_container" in str(error)  # torch's zip writer, which says no more of a disk that is full


@contextmanager
def writing(path: Path | str, temporary: Path | None = None) -> Iterator[None]:
    """Turn a write that fails inside into an OSError with `path` as its `filename` and the system's words.

    temporary: what is written in its place; an error that names another file is passed on as it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _failed_write(error, temporary):
            raise
        number = _number(error)
        reason = "is the disk full?" if number is None else os.strerror(number)
        raise OSError(number or errno.EIO, f"could not be written ({reason})", str(path)) from error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling to write; on a clean exit it becomes `path`, on an error it is removed.

    Raises:
        OSError: as `writing`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a sibling, because a rename is atomic only within one file system; the process id keeps two writers apart
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, temporary):
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)  # safetensors makes its files private
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 `text` to `path` as one step: a reader, or a resumed job, sees the old file or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path | str, value: Any) -> None:
    """`atomic_write_text` of `value` as indented JSON; ValueError on NaN or infinity, which JSON cannot say."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on a clean exit it becomes `path`, on an error it is removed.

    An existing folder `path` is replaced: it stays whole until the new one is, then gives way by two renames.

    Raises:
        OSError: as `writing`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had this number
    try:
        with writing(path, temporary):
            temporary.mkdir()
            readers = temporary.stat().st_mode & 0o666
            yield temporary
            for entry in sorted(temporary.rglob("*")):
                if entry.is_file():
                    entry.chmod(readers)  # safetensors makes its files private
                _sync(entry)
            _sync(temporary)
            retired = path.with_name(f".{path.name}.{os.getpid()}.old")
            if path.exists():
                os.replace(path, retired)
            os.replace(temporary, path)
            _sync(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_mistyped(key: str, name: str) -> None:
    """Raise ValueError for a path that is not there and would be taken for a hub's name, which costs half a minute."""
    path = Path(name)
    if not name:
        raise ValueError(f"{key}: expected a file, a folder or a hub's name, got an empty text")
    if path.exists():
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"{key}: {name}: no such file or folder")
    if "/" in name and path.parent.is_dir() and not _downloaded(name):
        raise ValueError(
            f"{key}: {name}: no such file or folder (no hub is asked for it, because there is a folder {path.parent})"
        )


def _downloaded(name: str) -> bool:
    folder = name.partition(":")[0].replace("/", "--")
    return any((Path(HF_HUB_CACHE) / f"{kind}--{folder}").is_dir() for kind in ("models", "datasets"))


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, where it holds anything else.
        OSError: where it cannot be opened.
    """
    path = Path(path)
    try:
        return _object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a log of JSON lines, in order; [] if there is no such file. What a kill left of a last line that
    has no end yet is passed over.

    Raises:
        ValueError: naming file and line, for another line that is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(_object(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object, got {error}: take the line out of the file"
            ) from None
    return rows


def _object(content: bytes) -> dict[str, Any]:
    """ValueError: what there is instead."""
    if not content.strip():
        raise ValueError("nothing")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are no UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error.msg} at character {error.pos})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; one cut short by a kill is taken off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
    return read_json_lines(path)
