"""The bench of reading: both ways read the same chats, and a way that reads others is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prudent.bench import reading
from prudent.engine.text import ItemEncoder


def encoder_of(folder: Path) -> ItemEncoder:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=len(tokenizer))


def test_chats_have_the_asked_length_and_differ() -> None:
    chats = reading.made_chats(20, 90)
    assert {len(chat["prompt"]) + len(chat["response"]) for chat in chats} == {90}
    assert len({chat["response"] for chat in chats}) == 20


def test_the_bench_writes_the_times_of_both_ways(
    tiny_chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--items", "30", "--characters", "60", "--rounds", "2"]
    reading.main(["--model", str(tiny_chat_folder), *options, "--out", str(tmp_path)])
    written = (tmp_path / "reading.md").read_text()
    assert written.strip() in capsys.readouterr().out
    assert "| one by one |" in written
    assert "| together |" in written


def test_ids_that_differ_are_an_error(tiny_chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(tiny_chat_folder)
    monkeypatch.setattr(encoder, "read_all", lambda items: [encoder.read("other") for _ in items])
    with pytest.raises(ValueError, match="expected the same ids"):
        reading.measure(encoder, reading.made_chats(3, 40), 1, progress=False)
