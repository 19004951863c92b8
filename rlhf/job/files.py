"""Write files and folders atomically, read JSON, and explain I/O errors."""

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
    """Return the operating system's message if it caused `error`, else the first line of `error`."""
    number = _number(error)
    if number is not None:
        return os.strerror(number)
    return (str(error) or type(error).__name__).splitlines()[0]


def explain_os_error(error: OSError, output: Path | str | None) -> str:
    """Return "PATH: the operating system's message".

    "output: " goes before it if PATH is the output, or lies in, beside or above it.

    output: the job's output file or folder, if it has one.
    """
    if error.errno is None or error.strerror is None:
        return str(error)
    if error.filename is None:  # the file was open already: most likely the output, on a full disk
        return error.strerror if output is None else f"output: {output}: {error.strerror}"
    name = os.fsdecode(error.filename)
    if output is not None:
        file, own = (Path(os.path.abspath(path)) for path in (name, output))
        if file.is_relative_to(own) or own.is_relative_to(file) or str(file).startswith(f"{own}."):
            name = f"output: {name}"
    return f"{name}: {error.strerror}"


def _number(error: BaseException) -> int | None:
    """Return the errno of `error` or of an error that caused it."""
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
    """Return whether `error` comes from a write, and names no file or only the `temporary` one."""
    if isinstance(error, OSError) and error.filename is None:
        return error.errno is not None or isinstance(
            error, shutil.Error
        )  # else a library's own error, such as a failed download
    if isinstance(error, OSError):
        return temporary is not None and str(error.filename).startswith(str(temporary))
    if isinstance(error, SafetensorError):
        return "deserializ" not in str(error).lower()
    return "inline_container" in str(error)  # torch's zip writer says nothing else when the disk is full


@contextmanager
def writing(path: Path | str, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failed write inside the block into an OSError with `path` as its `filename` and the system's message.

    temporary: the file that is written in place of `path`; an error that names any other file passes unchanged.
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
    """Yield a temporary sibling to write; it replaces `path` when the block ends, and is removed on an error.

    Raises:
        OSError: see `writing`.
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
    """Write UTF-8 `text` to `path` in one step: a reader, or a resumed job, sees the old file or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with `atomic_write_text`; ValueError for NaN or infinity, which JSON lacks."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; it replaces `path` when the block ends, and is removed on an error.

    An existing folder `path` stays whole until the new one is complete; two renames then exchange them.

    Raises:
        OSError: see `writing`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same number
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
    """Raise ValueError for a missing path that would be looked up on the hub instead, which takes half a minute."""
    path = Path(name)
    if not name:
        raise ValueError(f"{key}: expected a file, a folder or a hub name, got an empty string")
    if path.exists():
        return
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"{key}: {name}: no such file or folder")
    if "/" in name and path.parent.is_dir() and not _downloaded(name):
        raise ValueError(
            f"{key}: {name}: no such file or folder (not looked up on the hub, because {path.parent} is a local folder)"
        )


def _downloaded(name: str) -> bool:
    folder = name.partition(":")[0].replace("/", "--")
    return any((Path(HF_HUB_CACHE) / f"{kind}--{folder}").is_dir() for kind in ("models", "datasets"))


def read_json(path: Path | str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: if the file holds anything else; it names the file.
        OSError: if the file cannot be opened.
    """
    path = Path(path)
    try:
        return _object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines log, in order; [] if there is no such file.

    An unfinished last line, which a killed process may leave, is ignored.

    Raises:
        ValueError: for any other line that is not a JSON object; it names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(_object(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {error}: remove the line") from None
    return rows


def repaired_json_lines(path: Path | str) -> list[dict[str, Any]]:
    """Cut an unfinished last line off a JSON-lines log, so that it can be appended to; return the log's objects."""
    path = Path(path)
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)
    return read_json_lines(path)


def _object(content: bytes) -> dict[str, Any]:
    """Return the JSON object in `content`; raise ValueError with what it is instead."""
    if not content.strip():
        raise ValueError("nothing")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error.msg} at character {error.pos})") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value
