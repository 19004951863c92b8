"""Rows of every form that `prudent score` reads."""

from __future__ import annotations

import json
from pathlib import Path

from prudent.rlhf.evaluation.score import ScoreConfig

ROWS = [
    {"prompt": "my day was", "response": "great", "id": 7},
    {"prompt": [{"role": "user", "content": "the food ?"}], "response": [{"role": "assistant", "content": "bad"}]},
    {"messages": [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "very nice"}]},
    {"prompt": "the hotel is", "chosen": "lovely", "rejected": "not lovely", "margin": 2.0},
    {"chosen": "the train was good", "rejected": "the train was long and sad"},
    {"prompt": "the soup", "response": "is é \u2028 awful", "complete": False},
]


def written(config: ScoreConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.output).read_text(encoding="utf-8").split("\n")[:-1]]
