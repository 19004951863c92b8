"""`prudent score`: the same rows with rewards, in order, and the same bytes however often it was killed."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from prudent import Aggregation, EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.evaluation import score
from prudent.rlhf.evaluation.score import ScoreConfig, run_score

from .score_cases import ROWS, written


def scorer_of(config: ScoreConfig) -> Scorer:
    model = EnsembleRewardModel.from_pretrained(config.model)
    return Scorer(model, AutoTokenizer.from_pretrained(config.model), progress=False)


def test_every_form_of_row_comes_back_in_order_with_the_scorers_numbers(make):
    config = make(ROWS)
    result = run_score(config, progress=False)
    rows = written(config)
    scorer = scorer_of(config)
    for given, row in zip(ROWS, rows, strict=True):
        assert {key: row[key] for key in given} == given
    items = [{k: v for k, v in ROWS[i].items() if k != "id"} for i in (0, 1, 2, 5)]
    expected = scorer.score(items)
    for place, i in enumerate((0, 1, 2, 5)):
        found = rows[i]
        assert found["reward"] == pytest.approx(expected.reward[place], abs=1e-5)
        assert found["nominal"] == pytest.approx(expected.nominal[place], abs=1e-5)
        assert found["worst"] == pytest.approx(expected.worst[place], abs=1e-5)
        assert found["mean"] == pytest.approx(expected.mean[place].tolist(), abs=1e-5)
        assert found["std"] == pytest.approx(expected.std[place].tolist(), abs=1e-5)
        assert found["worst"] == min(found["mean"])
        assert found["reward"] == pytest.approx(0.4 * found["nominal"] + 0.6 * found["worst"], abs=1e-6)
    assert (result.rows, result.bad_rows, result.nonfinite) == (6, 0, 0)


def test_a_pair_is_scored_on_both_sides_as_training_reads_it(make):
    config = make(ROWS[3:5])
    run_score(config, progress=False)
    rows = written(config)
    expected = scorer_of(config).score(
        [
            {"prompt": "the hotel is", "response": "lovely"},
            {"prompt": "the hotel is", "response": "not lovely"},
            {"prompt": "the train was ", "response": "good"},
            {"prompt": "the train was ", "response": "long and sad"},
        ]
    )
    found = [row["scores"][side]["reward"] for row in rows for side in ("chosen", "rejected")]
    assert found == pytest.approx(expected.reward, abs=1e-5)
    assert set(rows[0]["scores"]["chosen"]) == {"reward", "nominal", "worst", "mean", "std"}
    assert rows[0]["chosen"] == "lovely"


def test_another_aggregation_changes_the_reward_and_nothing_else(make):
    config = make(ROWS[:3], aggregation="mean")
    run_score(config, progress=False)
    for row in written(config):
        assert row["reward"] == pytest.approx(sum(row["mean"]) / 3, abs=1e-6)
        assert row["worst"] == min(row["mean"])


def test_a_model_with_a_trust_region_gives_the_distance_of_each_response(make, model_folder, tmp_path):
    model = EnsembleRewardModel.from_pretrained(model_folder)
    model.score.set_trust(fit_trust(torch.randn(40, model.config.hidden_size)))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.save_pretrained(folder)
    config = make(ROWS[:4], model=str(folder), aggregation="trust:1")
    run_score(config, progress=False)
    *rows, pair = written(config)
    want = Scorer(model, tokenizer, progress=False).score([ROWS[0], ROWS[1]], aggregation="trust:1")
    assert [row["distance"] for row in rows[:2]] == pytest.approx(want.distance.tolist(), rel=1e-4)
    assert [row["reward"] for row in rows[:2]] == pytest.approx(want.reward, rel=1e-4)
    assert all(isinstance(side["distance"], float) for side in pair["scores"].values())


def test_a_price_is_refused_before_a_row_is_read_if_the_model_has_no_trust_region(make):
    config = make(ROWS[:1], aggregation="trust:1")
    with pytest.raises(ValueError, match=r"prudent calibrate --model DIR --data FILE"):
        run_score(config, progress=False)
    assert not Path(config.output).exists()


BROKEN = [
    ('{"prompt": "the food"', "JSON object per line"),
    ("[1, 2]", "one object per line, got an array"),
    ('{"prompt": "the food"}', "prompt and response, messages, or chosen and rejected, got prompt"),
    ('{"prompt": "a", "response": "b", "reward": 1}', "a field 'reward' already"),
    ('{"prompt": "a", "response": 3}', "response: expected a text or a list of messages, got int"),
    ('{"prompt": "a", "response": "b", "x": NaN}', "NaN, which JSON does not have"),
    ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
    ('{"chosen": "a b", "rejected": [{"role": "user", "content": "x"}]}', "both as texts or both as messages"),
    ('{"messages": []}', "at least one message"),
]


@pytest.mark.parametrize("field", ["reward", "nominal", "worst", "mean", "std", "distance", "scores", "error"])
@pytest.mark.parametrize("row", [ROWS[0], ROWS[3]])
def test_a_result_of_before_is_refused_and_never_stands_beside_a_new_one(make, field, row):
    config = make([{**row, field: "stale"}])
    with pytest.raises(
        ValueError, match=rf"line 1: the row has a field '{field}' already, which would be lost: rename it"
    ):
        run_score(config, progress=False)
    run_score(config.model_copy(update={"skip_bad_rows": True}), progress=False)
    (found,) = written(config)
    assert {key: value for key, value in found.items() if key not in row} == {"reward": None, "error": found["error"]}
    assert "stale" not in found.values()


def test_the_prompt_is_read_from_the_same_columns_as_in_training(make):
    rows = [
        {"instruction": "my day ?", "input": "it was long", "response": "good"},
        {"system": "very short", "question": "the food ?", "response": "bad"},
        {"system": "very short", "messages": [{"role": "user", "content": "the food ?"}, *ROWS[1]["response"]]},
    ]
    config = make(rows)
    run_score(config, progress=False)
    chat = [
        {"role": "system", "content": "very short"},
        {"role": "user", "content": "the food ?"},
        *ROWS[1]["response"],
    ]
    expected = scorer_of(config).score([{"prompt": "my day ?\n\nit was long", "response": "good"}, chat, chat])
    assert [row["reward"] for row in written(config)] == pytest.approx(expected.reward, abs=1e-5)


def test_a_column_that_looks_like_content_is_named_once_over_all_chunks(make, capsys):
    config = make([{**ROWS[0], "rationale": "it is kind"}] * 9)
    run_score(config, progress=False)
    said = capsys.readouterr().err
    assert said.count(f"data: {config.data}: not read, although it looks like content: rationale") == 1


def test_a_prompt_beside_messages_that_lack_it_is_refused(make):
    with pytest.raises(
        ValueError, match="line 1: prompt: expected a text that the messages contain, got one that would be"
    ):
        run_score(make([{**ROWS[2], "prompt": "be brief"}]), progress=False)


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_is_an_error_naming_file_and_line(make, line, message):
    config = make([*ROWS[:5], "", line])
    with pytest.raises(ValueError, match=r"in\.jsonl, line 7: ") as caught:
        run_score(config, progress=False)
    assert message in str(caught.value)
    assert len(written(config)) == 4  # the whole chunk before it


def test_a_broken_line_can_be_kept_in_its_place_with_a_null_reward(make):
    config = make([line for line, _ in BROKEN] + ROWS[:2], skip_bad_rows=True)
    result = run_score(config, progress=False)
    rows = written(config)
    assert (result.bad_rows, len(rows)) == (len(BROKEN), len(BROKEN) + 2)
    for row, (_, message) in zip(rows, BROKEN, strict=False):
        assert message in row["error"]
    assert [row["reward"] for row in rows[: len(BROKEN)]] == [None] * len(BROKEN)
    assert all(math.isfinite(row["reward"]) for row in rows[len(BROKEN) :])
    assert f"{len(BROKEN)} broken rows" in str(result)


def test_a_reward_that_is_not_finite_is_null_and_counted(make, monkeypatch):
    config = make(ROWS[:3])
    original = EnsembleRewardModel.features

    def overflowing(self, input_ids, *rest):
        hidden = original(self, input_ids, *rest)
        hidden[input_ids.shape[0] - 1] = math.inf  # the shortest of the batch
        return hidden

    monkeypatch.setattr(EnsembleRewardModel, "features", overflowing)
    result = run_score(config, progress=False)
    rows = written(config)
    assert [row["reward"] is None for row in rows].count(True) == result.nonfinite == 1
    bad = next(row for row in rows if row["reward"] is None)
    assert bad["nominal"] is None
    assert None in bad["mean"]


def test_standard_input_and_output(make, monkeypatch):
    config = make(ROWS[:2], data="-", output="-")
    text = "\n".join(json.dumps(row) for row in ROWS[:2])
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    result = run_score(config, progress=False)
    monkeypatch.undo()
    assert [json.loads(line)["prompt"] for line in out.getvalue().splitlines()] == [row["prompt"] for row in ROWS[:2]]
    assert str(result) == "standard output: 2 rows"


def test_a_one_head_classifier_of_anybody_is_scored_too(make, tiny_chat_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_chat_folder, num_labels=1, pad_token_id=0)
    classifier.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(tmp_path / "classifier")
    config = make(ROWS[:2], model=str(tmp_path / "classifier"))
    run_score(config, progress=False)
    for row in written(config):
        assert row["reward"] == row["nominal"] == row["worst"] == row["mean"][0]


def test_long_rows_are_counted_and_the_scorers_warning_does_not_come_once_a_chunk(make, caplog):
    config = make([{"prompt": "the food was", "response": "very " * 40}] * 9, max_length=32)
    with caplog.at_level(logging.WARNING):
        result = run_score(config, progress=False)
    assert result.truncated == 9
    assert not caplog.records
    assert "9 responses too long" in str(result)


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ({"aggregation": "tradeof:0.4"}, {}, "aggregation: kind: expected one of"),
        ({"aggregation": "head:3"}, {}, "expected a head below 3"),
        ({"aggregation": "mean,centre=batch"}, {}, "expected centre=none"),
        ({"data": "no-such-file.jsonl"}, {}, "^data: no-such-file.jsonl: no such file$"),
        ({"data": "."}, {}, "^data: .: expected a file, got a folder$"),
        ({"model": "./no-such-model"}, {}, "no-such-model"),
        ({"output": "-"}, {"resume": True}, "expected files"),
        ({}, {"resume": True, "overwrite": True}, "got both"),
        ({"max_length": 1000}, {}, "max_length"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(make, given, flags, message):
    config = make(ROWS[:1], **given)
    with pytest.raises(ValueError, match=message):
        run_score(config, progress=False, **flags)
    assert config.output == "-" or not Path(config.output).exists()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_is_no_output(make, tmp_path, flags):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"output: expected a file, got .*/out, a folder"):
        run_score(make(ROWS[:1], output=str(tmp_path / "out")), progress=False, **flags)


def test_an_empty_file_is_free_and_a_byte_order_mark_is_no_part_of_the_first_row(make):
    config = make(ROWS[:1])
    data, output = Path(config.data), Path(config.output)
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes())
    output.parent.mkdir()
    output.touch()  # a full disk leaves no more
    run_score(config, progress=False)
    assert written(config)[0]["prompt"] == ROWS[0]["prompt"]


def test_an_array_over_several_lines_is_said_to_be_one(make):
    config = make([json.dumps([ROWS[0]], indent=1)])
    with pytest.raises(ValueError, match=r"^data: .*in\.jsonl, line 1: expected JSON lines, .* got an array"):
        run_score(config, progress=False)


def test_a_full_disk_names_the_output(make, monkeypatch):
    monkeypatch.setattr(score, "_target", lambda _: Path("/dev/full").open("ab"))  # noqa: SIM115  the job closes it
    config = make(ROWS)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\)") as raised:
        run_score(config, progress=False)
    assert raised.value.filename == config.output


def test_the_data_is_never_the_output(make):
    config = make(ROWS[:1])
    same = config.model_copy(update={"output": config.data})
    with pytest.raises(ValueError, match="another file than the data"):
        run_score(same, overwrite=True, progress=False)


def test_the_models_own_centring_is_left_out(make, model_folder, tmp_path):
    model = EnsembleRewardModel.from_pretrained(model_folder)
    model.score.aggregation = Aggregation.parse("mean,centre=batch")
    model.save_pretrained(tmp_path / "centred")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "centred")
    config = make(ROWS[:2], model=str(tmp_path / "centred"))
    run_score(config, progress=False)
    for row in written(config):
        assert row["reward"] == pytest.approx(sum(row["mean"]) / 3, abs=1e-6)
