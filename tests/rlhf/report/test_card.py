"""Model cards: sections, and how an edit is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prudent.rlhf.report.card import CARD_FILE, card_text, is_untouched, parts_of, with_sections, write_card

CARD = card_text(
    {"library_name": "prudent", "base_model": None, "tags": ["a", "b"]},
    "A title",
    "An opening.\n",
    {"One": "1\n", "Two": "2\n\n    code"},
)


def test_a_card_is_metadata_a_title_an_opening_and_sections() -> None:
    start, front, body = CARD.split("---\n", 2)
    assert start == ""
    assert yaml.safe_load(front) == {"library_name": "prudent", "tags": ["a", "b"]}
    assert body.startswith("\n# A title\n\nAn opening.\n\n## One\n\n1\n\n## Two\n\n2\n\n    code\n\n<!-- SHA-256 ")


def test_new_sections_give_the_card_that_would_have_been_written_with_them() -> None:
    changed = with_sections(CARD, {"One": "other", "Three": "3"})
    sections = {"One": "other", "Two": "2\n\n    code", "Three": "3"}
    front = {"library_name": "prudent", "tags": ["a", "b"]}
    assert changed == card_text(front, "A title", "An opening.", sections)


@pytest.mark.parametrize(
    "edited",
    [
        CARD.replace("2", "3", 1),
        CARD.replace("---\n", "---\nlicense: mit\n", 1),
        CARD + "\nMine.\n",
        CARD.rpartition("<!--")[0],
        "",
        "A card of another program.\n",
    ],
)
def test_an_edited_card_is_known_and_never_overwritten(edited: str, tmp_path: Path) -> None:
    assert is_untouched(CARD)
    assert not is_untouched(edited)
    (tmp_path / CARD_FILE).write_text(edited, encoding="utf-8")
    assert not write_card(tmp_path, CARD)
    assert (tmp_path / CARD_FILE).read_text(encoding="utf-8") == edited


def test_an_untouched_card_is_replaced_and_a_missing_one_written(tmp_path: Path) -> None:
    assert write_card(tmp_path, CARD)
    newer = with_sections(CARD, {"One": "other"})
    assert write_card(tmp_path, newer)
    assert (tmp_path / CARD_FILE).read_text(encoding="utf-8") == newer


def test_a_cards_parts_are_what_it_was_made_of() -> None:
    sections = {"One": "1", "Two": "2\n\n    code"}
    assert parts_of(CARD) == ({"library_name": "prudent", "tags": ["a", "b"]}, "A title", sections)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ({}, "", {})),
        ("Only words.", ({}, "", {})),
        ("---\na: [\n---\n# T\n", ({}, "T", {})),
        ("---\n- a\n---\n\n## S\ntext", ({}, "", {"S": "text"})),
        ("---\nlicense: mit\n---\n# T\n", ({"license": "mit"}, "T", {})),
    ],
)
def test_a_card_that_someone_else_wrote_may_lack_any_part(text: str, parts: object) -> None:
    assert parts_of(text) == parts
