"""Model cards: README.md of a model's folder, sealed, so that one that a person has edited is never overwritten."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..job.files import atomic_write_text

CARD_FILE = "README.md"  # Hugging Face's name
_SEAL = "<!-- SHA-256 of the lines above, by which prudent knows that nobody has edited them: {} -->\n"
_SEALED = re.compile(re.escape(_SEAL).replace(re.escape("{}"), "([0-9a-f]{64})") + r"\Z")


def card_text(metadata: Mapping[str, Any], title: str, opening: str, sections: Mapping[str, str]) -> str:
    """A card: YAML metadata as Hugging Face reads it, a title, an opening, and sections (heading -> Markdown), sealed.

    metadata: keys whose value is None or empty are left out.
    """
    kept = {key: value for key, value in metadata.items() if value}
    front = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return _sealed(f"---\n{front}---\n\n# {title}\n\n{opening.strip()}", sections)


def is_untouched(text: str) -> bool:
    """Whether `text` is a card that `card_text` or `with_sections` made, and no character of it has changed."""
    seal = _SEALED.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def write_card(folder: Path, text: str) -> bool:
    """Write `text` as the folder's card, unless it has one that someone else wrote or edited; return whether it did."""
    old = read_card(folder)
    if old is not None and not is_untouched(old):
        return False
    atomic_write_text(folder / CARD_FILE, text)
    return True


def read_card(folder: Path) -> str | None:
    """The folder's card; None if it has none."""
    file = folder / CARD_FILE
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """An untouched card with other text under the given headings; a heading that it lacks is added at the end."""
    start, *parts = re.split(r"^## (.*)\n", _SEALED.sub("", text), flags=re.MULTILINE)
    return _sealed(start.strip(), dict(zip(parts[::2], parts[1::2], strict=True)) | dict(sections))


def parts_of(text: str) -> tuple[dict[str, Any], str, dict[str, str]]:
    """(metadata, title, heading -> Markdown) of a card, whoever wrote it; {} or "" for what it lacks."""
    found = re.match(r"---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    start, *parts = re.split(r"^## (.*)\n", _SEALED.sub("", text), flags=re.MULTILINE)
    title = re.search(r"^# (.*)", start, re.MULTILINE)
    sections = {heading.strip(): inner.strip() for heading, inner in zip(parts[::2], parts[1::2], strict=True)}
    return metadata if isinstance(metadata, dict) else {}, title[1].strip() if title else "", sections


def _sealed(start: str, sections: Mapping[str, str]) -> str:
    body = "\n\n".join([start, *(f"## {heading}\n\n{inner.strip()}" for heading, inner in sections.items())]) + "\n\n"
    return body + _SEAL.format(_digest(body))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
