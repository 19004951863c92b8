"""`prudent calibrate` as a function: the region and scales of a model's heads, its folder, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prudent.engine import EnsembleRewardModel, Scorer, fit_trust
from prudent.rlhf.models.adapter import load_head, save_head
from prudent.rlhf.reward.calibrate import CalibrateConfig, run_calibrate

THINGS = ("food", "film", "hotel", "train", "soup", "day", "bread", "weather")
WORDS = ("good", "bad", "great", "sad", "nice")
ROWS = [{"prompt": f"the {thing} is", "response": f"{a} {b}"} for thing in THINGS for a in WORDS for b in WORDS]
LABELS = torch.arange(8).repeat_interleave(25)
# the heads read another kind of token: that of a word, not that of the turn's end
FOREIGN = [{**row, "complete": False} for row in ROWS[::4]]


@pytest.fixture
def model(tiny_chat_folder: Path, tmp_path: Path) -> Path:
    """A reward model's folder, with a file that is not the model's."""
    torch.manual_seed(1)
    folder = tmp_path / "run" / "model"
    EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    return folder


def config(model: Path, rows: list[Any], **given: Any) -> CalibrateConfig:
    data = model.parent.parent / f"rows{len(list(model.parent.parent.glob('*.jsonl')))}.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CalibrateConfig(**{"model": str(model), "data": str(data), **given})


def scorer(folder: Path) -> Scorer:
    return Scorer(EnsembleRewardModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), progress=False)


def test_the_region_is_that_of_the_responses_by_prompt_and_everything_else_stays(model):
    before = scorer(model)
    features = before.features(ROWS)
    want = fit_trust(features, prompts=LABELS, head=before.model.score)
    result = run_calibrate(config(model, ROWS), progress=False)
    after = scorer(model)
    for got, expected in zip(after.model.score.trust, want, strict=True):
        assert torch.equal(got, expected)
    old, new = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert (model / "README.md").read_text(encoding="utf-8") == "mine"
    assert float((after.score(FOREIGN).distance > 1).float().mean()) > 0.5
    text = str(result)
    assert "trust region of 200 responses to 8 prompts, 31 directions of 32 features" in text
    assert json.loads((model / "calibration.json").read_text(encoding="utf-8")) == result.numbers
    assert result.numbers["before"]["q95"] is None
    assert result.numbers["after"]["beyond"] < 0.06


def test_a_second_calibration_shows_what_the_first_region_said_of_the_new_responses(model):
    run_calibrate(config(model, ROWS), progress=False)
    numbers = run_calibrate(config(model, FOREIGN), progress=False).numbers
    assert numbers["before"]["beyond"] > 0.5
    assert numbers["after"]["q95"] < numbers["before"]["median"]


def test_scales_are_measured_on_a_file_of_their_own_and_the_unit_follows(model):
    scale = config(model, ROWS[:40])
    run_calibrate(config(model, ROWS, scale_data=scale.data), progress=False)
    reader = scorer(model)
    mean = reader.score(ROWS[:40]).mean
    torch.testing.assert_close(mean.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean.std(0), torch.ones(3), rtol=0, atol=1e-4)
    want = fit_trust(reader.features(ROWS), prompts=LABELS, head=reader.model.score).unit
    torch.testing.assert_close(reader.model.score.trust.unit, want)


def test_another_folder_and_an_aggregation_with_a_price_leave_the_model_alone(model):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    output = model.parent / "other"
    run_calibrate(config(model, ROWS, output=output, aggregation="trust:1,from=1"), progress=False)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    loaded = EnsembleRewardModel.from_pretrained(output)
    assert str(loaded.score.aggregation) == "trust:1,from=1"
    assert (output / "README.md").is_file()


def test_pairs_messages_and_texts_are_read_and_broken_rows_counted(model):
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "so long"} for row in ROWS[:20]]
    rows = [*pairs, {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "film"}]}]
    with pytest.raises(ValueError, match=r"^data: .*jsonl, line 22: expected the fields prompt and response"):
        run_calibrate(config(model, [*rows, {"prompt": "the food"}]), progress=False)
    result = run_calibrate(config(model, [*rows, {"prompt": "the food"}, "{"], skip_bad_rows=True), progress=False)
    assert result.numbers["data"] == {"responses": 41, "prompts": 2, "bad_rows": 2, "truncated": 0}
    assert "broken rows skipped: 2" in str(result)


@pytest.mark.parametrize("cut", ["closed", "open"])
def test_a_response_that_was_cut_off_is_read_as_its_reward_will_be(model, cut):
    rows = [{**row, "stopped": number % 2 == 0} for number, row in enumerate(ROWS)]
    before = scorer(model)
    items = [
        row if cut == "closed" or number % 2 == 0 else {**row, "complete": False} for number, row in enumerate(ROWS)
    ]
    want = fit_trust(before.features(items), prompts=LABELS, head=before.model.score)
    run_calibrate(config(model, rows, cut=cut), progress=False)
    assert all(torch.equal(*pair) for pair in zip(scorer(model).model.score.trust, want, strict=True))


def test_cached_features_give_the_same_model(model, tmp_path):
    plain, cached = model.parent / "plain", model.parent / "cached"
    run_calibrate(config(model, ROWS, output=plain), progress=False)
    run_calibrate(config(model, ROWS, output=cached, feature_cache=tmp_path / "features"), progress=False)
    assert (plain / "model.safetensors").read_bytes() == (cached / "model.safetensors").read_bytes()


def test_a_classifier_becomes_a_model_with_a_region_in_another_folder(model, tiny_chat_folder, tmp_path):
    folder = tmp_path / "classifier"
    classifier = LlamaForSequenceClassification(LlamaConfig.from_pretrained(tiny_chat_folder, num_labels=1))
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_chat_folder).save_pretrained(folder)
    given = config(model, ROWS).model_copy(update={"model": str(folder)})
    with pytest.raises(ValueError, match=r"output: expected a folder, because .* is a LlamaForSequenceClassification"):
        run_calibrate(given, progress=False)
    run_calibrate(given.model_copy(update={"output": tmp_path / "new"}), progress=False)
    assert scorer(tmp_path / "new").score(ROWS[:2]).distance is not None


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (ROWS[:19], {}, "data: .*jsonl: expected at least 20 rows, .* got 19"),
        ([ROWS[0]] * 30, {}, "data: .*jsonl: expected rows that differ in every block, got 30"),
        (ROWS[:1], {"limit": 1, "skip_bad_rows": True}, "expected at least 20 rows"),
        (["{"], {"skip_bad_rows": True}, "data: .*jsonl: expected responses, got none .1 broken rows"),
        (ROWS, {"aggregation": "head:7"}, "expected a head below 3"),
    ],
)
def test_a_refused_calibration_leaves_the_folder_as_it_was(model, rows, given, message):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(ValueError, match=message):
        run_calibrate(config(model, rows, **given), progress=False)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_an_output_that_exists_is_refused_before_the_model_is_read(model, tmp_path):
    with pytest.raises(ValueError, match=r"output: expected a new folder, got .* which exists"):
        run_calibrate(config(model, ROWS, output=tmp_path), progress=False)


def test_the_adapter_beside_a_model_gets_the_same_heads(model):
    adapter = model.parent / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"lora")
    save_head(EnsembleRewardModel.from_pretrained(model).score, adapter)
    run_calibrate(config(model, ROWS), progress=False)
    mine, theirs = EnsembleRewardModel.from_pretrained(model).score, load_head(adapter)
    for one, other in zip(mine.trust, theirs.trust, strict=True):
        assert torch.equal(one, other)
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"lora"
