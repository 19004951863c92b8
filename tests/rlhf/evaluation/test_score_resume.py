"""`prudent score` continued after a kill: the same bytes, and never a mixture of two files or two models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prudent import EnsembleRewardModel, Scorer
from prudent.rlhf.evaluation.score import run_score

from .score_cases import ROWS, written


@pytest.mark.parametrize("cut", [0, 1, 300, 2000, 0.5, 0.9, -1, "chunk", None])
def test_a_killed_run_resumes_to_the_same_bytes(make, cut, monkeypatch):
    config = make(ROWS * 3)
    run_score(config, progress=False)
    output = Path(config.output)
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    if cut == "chunk":
        kept = ends[7]
    elif cut is None:
        kept = len(whole)
    else:
        kept = int(cut * len(whole)) if isinstance(cut, float) else cut % len(whole)
    output.write_bytes(whole[:kept])
    scored = []
    original = Scorer.score
    monkeypatch.setattr(
        Scorer, "score", lambda self, items, **kw: scored.append(len(items)) or original(self, items, **kw)
    )
    result = run_score(config, resume=True, progress=False)
    assert output.read_bytes() == whole
    assert result.rows == len(ROWS) * 3
    assert result.kept == sum(end <= kept for end in ends) // 4 * 4
    rows_again = result.rows - result.kept
    assert rows_again <= sum(scored) <= 2 * rows_again


def test_an_interrupt_between_chunks_leaves_whole_lines_to_go_on_from(make, monkeypatch):
    config = make(ROWS * 3)
    original, calls = Scorer.score, []

    def interrupted(self, items, **kwargs):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, items, **kwargs)

    monkeypatch.setattr(Scorer, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_score(config, progress=False)
    assert len(written(config)) == 8
    assert run_score(config, resume=True, progress=False).kept == 8
    assert max(calls) <= 8  # 4 rows, 2 items a pair: never the whole file


def test_resume_begins_an_output_that_is_not_there(make):
    config = make(ROWS)
    assert run_score(config, resume=True, progress=False).rows == 6


def test_resume_refuses_another_aggregation_or_model_but_not_another_batch_size(make):
    config = make(ROWS)
    run_score(config, progress=False)
    with pytest.raises(ValueError, match="made with another aggregation"):
        run_score(config.model_copy(update={"aggregation": "min"}), resume=True, progress=False)
    run_score(config.model_copy(update={"batch_tokens": 64}), resume=True, progress=False)


def test_resume_refuses_data_that_changed_under_the_kept_lines(make):
    config = make(ROWS)
    run_score(config, progress=False)
    before = Path(config.output).read_bytes()
    make([{**ROWS[0], "id": 8}] * 6)
    with pytest.raises(ValueError, match=r"line 4 does not belong to .*in\.jsonl, line 4"):
        run_score(config, resume=True, progress=False)
    assert Path(config.output).read_bytes() == before


def test_resume_refuses_an_output_of_unknown_making(make):
    config = make(ROWS)
    run_score(config, progress=False)
    Path(f"{config.output}.config.json").unlink()
    with pytest.raises(ValueError, match="says how it was made, is missing"):
        run_score(config, resume=True, progress=False)


def test_a_mistake_in_the_first_rows_leaves_the_output_to_the_mended_command(make):
    config = make([{"prompt": "no response"}, *ROWS])
    with pytest.raises(ValueError, match="line 1"):
        run_score(config, progress=False)
    result = run_score(config.model_copy(update={"skip_bad_rows": True}), progress=False)
    assert (result.rows, result.bad_rows) == (len(ROWS) + 1, 1)


def test_an_existing_output_is_kept_unless_told_otherwise(make):
    config = make(ROWS[:2])
    Path(config.output).parent.mkdir()
    Path(config.output).write_text("precious\n")
    with pytest.raises(ValueError, match="exists already"):
        run_score(config, progress=False)
    with pytest.raises(ValueError, match="no-such-model"):
        run_score(config.model_copy(update={"model": "./no-such-model"}), overwrite=True, progress=False)
    assert Path(config.output).read_text() == "precious\n"
    run_score(config, overwrite=True, progress=False)
    assert len(written(config)) == 2


def test_resume_refuses_a_model_that_was_trained_anew_under_its_name(make, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    config = make(ROWS, model=str(tmp_path / "model"))
    run_score(config, progress=False)
    before = Path(config.output).read_bytes()
    model = EnsembleRewardModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.score.bias[1] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"out\.jsonl cannot be resumed: the model .*model has changed since"):
        run_score(config, resume=True, progress=False)
    assert Path(config.output).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("out.jsonl.config.json", "{broken", r"out\.jsonl\.config\.json: expected a JSON object, got broken JSON"),
        (
            "out.jsonl",
            "{broken",
            r"output: .*out\.jsonl cannot be resumed: line 4 does not belong to .*in\.jsonl, line 4",
        ),
        ("out.jsonl", "[1]", r"output: .*out\.jsonl cannot be resumed: line 4 does not belong to .*in\.jsonl, line 4"),
    ],
)
def test_a_resumed_output_that_was_damaged_is_named(make, name, line, says):
    config = make(ROWS)
    run_score(config, progress=False)
    damaged = Path(config.output).with_name(name)
    lines = damaged.read_text().split("\n")
    damaged.write_text("\n".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(ValueError, match=says):
        run_score(config, resume=True, progress=False)
