"""The load command of `prudent serve`: it measures, and a reply that is wrong or lost is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prudent.bench import serve_load
from prudent.bench.serve_client import Reply
from prudent.bench.serve_process import Texts


class _Scorer:
    def score(self, texts: list[str]) -> Any:
        return type("Scores", (), {"reward": [float(len(text)) for text in texts]})


def _reply(status: int, reward: float | None) -> Reply:
    return Reply(status, json.dumps({"scores": [{"reward": reward}]}).encode(), 0.1, {})


def test_a_reply_is_compared_with_the_score_of_its_own_text() -> None:
    texts = Texts(_Scorer(), 5)  # type: ignore[arg-type]
    assert json.loads(texts.body(7)) == {"texts": [texts.texts[2]]}
    assert texts.difference(7, _reply(200, texts.rewards[2])) == 0
    assert texts.difference(6, _reply(200, texts.rewards[2])) > 0
    assert texts.difference(7, _reply(503, texts.rewards[2])) == float("inf")
    assert texts.difference(7, _reply(200, None)) == float("inf")


def test_a_fault_that_could_not_be_tried_does_not_hold() -> None:
    faults = [{"name": "schemas", "found": "schemathesis is not installed", "holds": None}]
    text = serve_load.table({"machine": "m", "cores": 2, "commit": "c", "model": "l", "load": {}, "faults": faults})
    assert "| schemas | schemathesis is not installed | not run |" in text


@pytest.mark.slow
def test_a_small_run_writes_rates_and_finds_no_wrong_reply(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    out = tmp_path / "load"
    assert serve_load.main(["--clients", "2", "--requests", "12", "--texts", "10", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["load"]
    assert set(rows) == {"serve, 2", "one a request, 2"}
    assert all((row["lost"], row["wrong"]) == (0, 0) and row["rate"] > 0 for row in rows.values())
    assert rows["one a request, 2"]["items_a_batch"] == 1
    assert "| serve | 2 |" in out.with_suffix(".md").read_text()
