"""The evaluation job: a whole model, from folder to table, JSON and pictures."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from prudent import EnsembleRewardModel, Scorer
from prudent.engine import EnsembleHead
from prudent.rlhf.data.pairs import load_pairs, split_by_prompt
from prudent.rlhf.evaluation.evaluate import EvalConfig, run_eval
from prudent.rlhf.models.loading import load_reward

WORDS = ["great", "happy", "lovely", "nice", "fine", "bad", "awful", "sad", "boring", "ugly"]


@pytest.fixture(scope="module")
def folders(tiny_chat_folder, tmp_path_factory) -> SimpleNamespace:
    """An ensemble and a single head on one random trunk, and pairs with scores, a broken row and a foreign set."""
    root = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_folder)
    model = EnsembleRewardModel.from_trunk(str(tiny_chat_folder), num_heads=3)
    single = EnsembleRewardModel.from_trunk(model.model, head=EnsembleHead(32, 1, aggregation="mean"))
    for name, one in (("ensemble", model), ("single", single)):
        one.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = []
    for i in range(48):
        good, bad = WORDS[i % 5], WORDS[5 + (i * 3) % 5]
        row = {"prompt": f"the {('food', 'film', 'hotel', 'day')[i % 4]} was", "chosen": f"{good} " * (1 + i % 3)}
        rows.append({**row, "rejected": bad, "score_chosen": 5.0 + i % 4, "score_rejected": float(i % 3), "id": i})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    foreign = [{"prompt": "pain", "chosen": f"the the {w} <|user|>", "rejected": f"a a {w}"} for w in WORDS]
    (root / "foreign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in foreign))
    return SimpleNamespace(root=root, pairs=str(root / "pairs.jsonl"), foreign=str(root / "foreign.jsonl"))


def config_of(folders, output: Path, **given) -> EvalConfig:
    return EvalConfig(
        **{"model": str(folders.root / "ensemble"), "data": folders.pairs, "output": output, "resamples": 100, **given}
    )


def test_a_model_is_evaluated_from_folder_to_table_json_and_pictures(folders, tmp_path):
    pytest.importorskip("matplotlib")
    config = config_of(
        folders, tmp_path / "deep" / "out", compare=str(folders.root / "single"), foreign=folders.foreign
    )
    result = run_eval(config, progress=False)
    saved = json.loads((config.output / "eval.json").read_text())
    assert saved == result.metrics
    assert saved["config"]["model"] == config.model
    names = {"accuracy", "margin", "coverage", "reliability", "head_correlation", "scoring", "std"}
    assert {path.stem for path in result.pictures} == names
    assert {path.name for path in config.output.iterdir()} == {"eval.json", *(f"{name}.png" for name in names)}
    scorer = load_reward("model", config.model).scorer()
    items = [pair.items() for pair in load_pairs(config.data).pairs]
    c, r = (scorer.score([item[side] for item in items]) for side in (0, 1))
    for name, field in (("tradeoff:0.4", "reward"), ("nominal", "nominal"), ("worst", "worst")):
        right = [x > y for x, y in zip(getattr(c, field), getattr(r, field), strict=True)]
        assert saved["accuracy"][name]["value"] == pytest.approx(sum(right) / len(right))
    longer = [len(i[0]["response"]) > len(i[1]["response"]) for i in items]
    assert saved["accuracy"]["longer response"]["value"] == pytest.approx(sum(longer) / len(longer))
    assert saved["prompts"] == 4
    assert saved["scoring"]["responses"] == 2 * len(items)


def test_the_table_is_aligned_short_and_names_the_files(folders, tmp_path):
    result = run_eval(config_of(folders, tmp_path, pictures=False, foreign=folders.foreign), progress=False)
    text = str(result)
    assert len(text.splitlines()) < 45
    assert max(map(len, text.splitlines())) <= 110
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "95 % interval" in line)
    column = lines[start].index("accuracy, %") + len("accuracy, %")
    for line in lines[start + 1 : start + 5]:
        assert line[column - 1].isdigit()
        assert line[column] == " "
    assert text.endswith("eval.json")
    assert "The intervals resample 4 prompts" in text


def test_only_the_held_out_prompts_of_a_training_are_evaluated(folders, tmp_path):
    config = config_of(folders, tmp_path, eval_fraction=0.5, split_seed=3, pictures=False)
    result = run_eval(config, progress=False)
    held = split_by_prompt(load_pairs(folders.pairs).pairs, 0.5, 3)[1]
    assert (result.metrics["pairs"], result.metrics["prompts"]) == (len(held), 2)


def test_a_compared_head_on_the_same_trunk_costs_no_second_pass(folders, tmp_path, monkeypatch):
    calls = []
    original = Scorer.features
    monkeypatch.setattr(Scorer, "features", lambda self, items: calls.append(len(items)) or original(self, items))
    config = config_of(folders, tmp_path, compare=str(folders.root / "single"), pictures=False)
    result = run_eval(config, progress=False)
    assert len(calls) == 1
    single = run_eval(config_of(folders, tmp_path, model=str(folders.root / "single"), pictures=False), progress=False)
    assert result.metrics["accuracy"]["single head"] == single.metrics["accuracy"]["single head"]
    assert "nominal - single head" in result.metrics["difference"]
    swapped = config_of(folders, tmp_path, model=config.compare, compare=config.model, pictures=False)
    assert list(run_eval(swapped, progress=False).metrics["accuracy"]) == [
        *("single head", "compared model", "longer response")
    ]


@pytest.mark.parametrize("change", ["template", "max_score_length"])
def test_a_compared_head_that_reads_other_tokens_reads_its_own_features(folders, tmp_path, change):
    shutil.copytree(folders.root / "single", tmp_path / "other")
    if change == "template":
        tokenizer = AutoTokenizer.from_pretrained(folders.root / "single")
        tokenizer.chat_template = tokenizer.chat_template.replace(" <|end|>", " bad <|end|>")
        tokenizer.save_pretrained(tmp_path / "other")
    else:
        file = tmp_path / "other" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_score_length": 3}))
    other = str(tmp_path / "other")
    compared = run_eval(config_of(folders, tmp_path / "a", compare=other, pictures=False), progress=False)
    alone = run_eval(config_of(folders, tmp_path / "b", model=other, pictures=False), progress=False)
    assert compared.metrics["margin"]["single head"] == alone.metrics["margin"]["single head"]


def test_a_row_that_cannot_be_encoded_is_named_by_its_line_also_with_a_feature_cache(folders, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(Path(folders.pairs).read_text() + json.dumps({"prompt": [], "chosen": "good", "rejected": "bad"}))
    with pytest.raises(
        ValueError, match=r"^data: .*pairs\.jsonl, line 49: prompt: expected a text or a list of messages"
    ):
        run_eval(config_of(folders, tmp_path, data=str(data), pictures=False), progress=False)
    with pytest.raises(ValueError, match=r"^foreign: .*pairs\.jsonl, line 49: prompt: expected a text or a list"):
        run_eval(config_of(folders, tmp_path, foreign=str(data), pictures=False), progress=False)


def test_a_single_head_model_is_drawn_too(folders, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_eval(
        config_of(folders, tmp_path, model=str(folders.root / "single"), foreign=folders.foreign), progress=False
    )
    assert not {"head_correlation", "std"} & {path.stem for path in result.pictures}
    assert result.metrics["heads"] == 1


def test_no_picture_of_an_earlier_evaluation_stays_beside_the_new_numbers(folders, tmp_path):
    pytest.importorskip("matplotlib")
    run_eval(config_of(folders, tmp_path, foreign=folders.foreign), progress=False)
    assert (tmp_path / "std.png").exists()
    (tmp_path / "mine.png").touch()
    single = config_of(folders, tmp_path, model=str(folders.root / "single"))
    drawn = run_eval(single, progress=False).pictures
    assert set(tmp_path.glob("*.png")) == {*drawn, tmp_path / "mine.png"}
    run_eval(single.model_copy(update={"pictures": False}), progress=False)
    assert set(tmp_path.glob("*.png")) == {tmp_path / "mine.png"}


def test_the_margins_drawn_are_those_of_the_table(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from prudent.rlhf.evaluation import pictures

    drawn = {}
    original = pictures.margins
    monkeypatch.setattr(pictures, "margins", lambda values: drawn.update(values) or original(values))
    rows = [json.loads(line) for line in Path(folders.pairs).read_text().splitlines()]
    for i, row in enumerate(rows):  # long answers in one source, and a prompt of its own in every row
        row["source"], row["prompt"] = ("long", "short")[i % 2], f"{row['prompt']} {i}"
        row["chosen"] *= 1 + 8 * (i % 2)
    data = tmp_path / "sources.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run_eval(config_of(folders, tmp_path / "out", data=str(data)), progress=False).metrics
    for name, margin in drawn.items():
        assert margin.mean().item() == pytest.approx(metrics["margin"][name]["mean"])
        assert margin.std(correction=0).item() == pytest.approx(metrics["margin"][name]["std"])
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row | {"source": None}) + "\n" for row in rows))
    plain = run_eval(
        config_of(folders, tmp_path / "plain", data=str(tmp_path / "plain.jsonl"), pictures=False), progress=False
    )
    assert plain.metrics["margin"]["mean"]["mean"] != pytest.approx(metrics["margin"]["mean"]["mean"])


def test_the_table_says_what_was_left_out_of_the_data(folders, tmp_path):
    text = Path(folders.pairs).read_text()
    first = json.loads(text.splitlines()[0]) | {"prompt": "another"}
    data = tmp_path / "pairs.jsonl"
    rows = [first, first, first | {"rejected": first["chosen"]}, first | {"score_chosen": 0.5, "score_rejected": 0.0}]
    data.write_text(text + "".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    result = run_eval(config_of(folders, tmp_path, data=str(data), pictures=False, skip_bad_rows=True), progress=False)
    (line,) = (line for line in str(result).splitlines() if line.startswith("data: left out of 53 rows: "))
    for part in ("broken rows 1", "equal responses 1", "below the score gap 1"):
        assert part in line
    assert f"duplicates {result.metrics['data']['duplicates']}" in line


def test_rows_that_were_left_out_of_the_foreign_pairs_are_counted(folders, tmp_path):
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(Path(folders.foreign).read_text() + "broken\n")
    config = config_of(folders, tmp_path, foreign=str(foreign), pictures=False, skip_bad_rows=True)
    result = run_eval(config, progress=False)
    assert (result.metrics["data"]["bad_rows"], result.metrics["foreign_data"]["bad_rows"]) == (0, 1)
    assert "foreign: left out of" in str(result)


def test_rewards_that_are_not_finite_are_counted_and_drawn_without(folders, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    original = Scorer.features

    def broken(self, items):
        features = original(self, items)
        features[3] = math.nan
        return features

    monkeypatch.setattr(Scorer, "features", broken)
    result = run_eval(config_of(folders, tmp_path), progress=False)
    assert result.metrics["excluded"] == 1
    assert "left out, for rewards that are not finite: 1\n" in str(result)


def test_a_training_feature_cache_is_used_and_kept(folders, tmp_path):
    plain = run_eval(config_of(folders, tmp_path / "a", pictures=False), progress=False)
    config = config_of(folders, tmp_path / "b", pictures=False, feature_cache=tmp_path / "cache")
    cached = run_eval(config, progress=False)
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert cached.metrics["accuracy"] == plain.metrics["accuracy"]


def test_another_aggregation_is_the_one_reported(folders, tmp_path):
    result = run_eval(config_of(folders, tmp_path, aggregation="uwo:0.5", pictures=False), progress=False)
    assert "uwo:0.5" in result.metrics["accuracy"]
    assert "tradeoff:0.4" not in result.metrics["accuracy"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aggregation": "tradeof:1"}, "aggregation: kind"),
        ({"aggregation": "head:7"}, "below 3"),
        ({"model": "./no-such-model"}, "no-such-model"),
        ({"data": "no-such.jsonl"}, "no such file"),
        ({"foreign": "no-such.jsonl"}, "no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(folders, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_eval(config_of(folders, tmp_path, pictures=False, **given), progress=False)


def test_pictures_without_matplotlib_are_refused_before_any_scoring(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Scorer, "features", lambda self, items: pytest.fail("scored"))
    with pytest.raises(ImportError, match=r"prudent\[report\]"):
        run_eval(config_of(folders, tmp_path), progress=False)


@pytest.mark.parametrize("cached", [True, False])
def test_texts_that_lost_their_beginning_are_counted(folders, tmp_path, cached):
    scorer = load_reward("model", str(folders.root / "ensemble")).scorer()
    lengths = [len(scorer.encode(item)) for pair in load_pairs(folders.pairs).pairs for item in pair.items()]
    limit = sorted(lengths)[len(lengths) // 2]
    features = {"feature_cache": tmp_path / "cache"} if cached else {}
    config = config_of(folders, tmp_path / "out", pictures=False, max_length=limit, **features)
    result = run_eval(config, progress=False)
    found = json.loads((config.output / "eval.json").read_text())["truncated"]
    assert found == {"texts": sum(n > limit for n in lengths), "of": len(lengths), "max_length": limit}
    assert f"{found['texts']} of {found['of']} texts were too long and read without the beginning" in str(result)
