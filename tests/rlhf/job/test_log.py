"""Metrics as JSON lines, whole after a kill and not doubled after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prudent.rlhf.job.log import RunLog, read_metrics


def test_metrics_are_appended_with_prefix_and_nan_is_null(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss": 0.5}, prefix="bt")
        log.metrics(2, {"loss": float("nan")})
    rows = read_metrics(tmp_path)
    assert [(r["step"], r.get("bt/loss"), r.get("loss")) for r in rows] == [(1, 0.5, None), (2, None, None)]
    assert "loss" in rows[1]
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_writes_no_step_twice_and_drops_the_torn_line(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(read_metrics(tmp_path)) == 1
    with RunLog(tmp_path) as log:
        log.metrics(1, {"loss": 0.5})
        log.metrics(1, {"accuracy": 0.5})
        log.metrics(2, {"loss": 0.4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.close()
    log.close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["[1,2]", "", "{broken", "7"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "time": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object, got .*: remove the line"):
        RunLog(tmp_path)


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log._file.close()
    log._file = Path("/dev/full").open("a")  # noqa: SIM115  the log closes it
    for write in (lambda: log.metrics(1, {"loss": 0.5}), log.close):
        with pytest.raises(OSError, match="could not be written \\(No space left on device\\)") as raised:
            write()
        assert raised.value.filename == str(log.path)
    log.close()
