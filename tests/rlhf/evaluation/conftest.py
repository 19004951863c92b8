"""A small reward model, and configs of `prudent score` for a file of rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel
from prudent.rlhf.evaluation import score
from prudent.rlhf.evaluation.score import ScoreConfig


@pytest.fixture(scope="module")
def model_folder(tiny_chat_folder, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward")
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3, aggregation="tradeoff:0.4").save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def make(model_folder, tmp_path, monkeypatch):
    """make(rows or lines, **config) -> ScoreConfig, with chunks of 4 rows."""
    monkeypatch.setattr(score, "CHUNK_ROWS", 4)

    def make(rows, **given) -> ScoreConfig:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        data = tmp_path / "in.jsonl"
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return ScoreConfig(
            **{"model": str(model_folder), "data": str(data), "output": str(tmp_path / "out" / "out.jsonl"), **given}
        )

    return make
