"""The whole demo at a tiny size: its files, continuing after an interruption, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytest.importorskip("vaderSentiment", reason="the gold scorer is an extra: pip install 'prudent[demo]'")
pytest.importorskip("matplotlib", reason="the pictures are an extra: pip install 'prudent[report]'")

from prudent.engine import Scorer
from prudent.rlhf.demo import demo
from prudent.rlhf.demo.config import SIZES
from prudent.rlhf.demo.demo import DemoConfig, run_demo
from prudent.rlhf.demo.distances import HELD_OUT, TRAINING
from prudent.rlhf.demo.machine import estimate, seconds
from prudent.rlhf.demo.rewards import TITLES
from prudent.rlhf.job.config import load_config
from prudent.rlhf.job.folder import locked_folder
from prudent.rlhf.models.loading import load_language_model, load_tokenizer
from prudent.rlhf.sampling import stored as rollout
from prudent.rlhf.sampling.prompts import read_prompts

from ..page import Reader

KNOWN = (TRAINING, HELD_OUT)
SUBJECTS = ("the food", "the hotel", "my day", "your train", "the film", "the soup", "the room", "people", "service")


def _config(folder: Path, output: Path, **options: Any) -> DemoConfig:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(f"{s} {v}" for s in SUBJECTS for v in ("was", "is", "is not", "is very")) + "\n")
    small = {
        "held_out_prompts": 6,
        "best_of": 24,
        "samples_per_prompt": 4,
        "pairs": 100,
        "draws": 2,
        "max_new_tokens": 6,
        "dtype": "float32",
        "temperature": 1.0,
        "batch_rows": 24,
        "ppo": {"steps": 0},  # tests/rlhf/demo/test_ppo.py has them
    }
    return DemoConfig(output=output, **{"model": str(folder), "prompts": prompts, **small, **options})


@pytest.fixture(scope="module")
def finished(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, Any]:
    config = _config(tiny_chat_folder, tmp_path_factory.mktemp("demo") / "run")
    return config, run_demo(config, progress=False)


def test_the_run_folder_holds_everything(finished: tuple[DemoConfig, Any]) -> None:
    folder = finished[0].output
    for name in ("config.yaml", "samples.jsonl", "pairs.jsonl", "held_out.jsonl", "metrics.jsonl", "metrics.json"):
        assert (folder / name).stat().st_size > 0, name
    assert load_config(DemoConfig, folder / "config.yaml") == finished[0]
    assert json.loads((folder / "metrics.json").read_text()) == finished[1].metrics
    assert not list(folder.glob(".*tmp*"))


def test_the_page_shows_how_the_single_head_s_penalty_was_chosen(finished: tuple[DemoConfig, Any]) -> None:
    folder, metrics = finished[0].output, finished[1].metrics
    assert metrics["choice"] == json.loads((folder / "model" / "fit.json").read_text())
    page = (folder / "report.html").read_text()
    assert "Single head: L2" in page
    assert "How the single head's L2 penalty was chosen" in page


@pytest.fixture(scope="module")
def wide(tiny_chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoConfig, Any]:
    ppo = {"steps": 1, "max_new_tokens": 5, "lora_rank": 2, "prompts_per_step": 2}
    features = ["last:-1", "mean:1/2", "logprob"]
    folder = tmp_path_factory.mktemp("wide") / "run"
    config = _config(tiny_chat_folder, folder, features=features, ppo=ppo, best_of=8)
    return config, run_demo(config, progress=False)


@pytest.mark.parametrize("run", ["finished", "wide"])
def test_the_saved_models_score_text_as_the_run_scored_features(run: str, request: pytest.FixtureRequest) -> None:
    finished = request.getfixturevalue(run)
    folder = finished[0].output
    if run == "wide":
        config = json.loads((folder / "model" / "config.json").read_text())
        assert config["taps"] == ["last:2", "mean:1", "logprob"]
        for arm in ("single", "trust"):  # PPO reads them in the frozen trunk's own pass
            said = (folder / "ppo" / arm / "ppo.json").read_text()
            assert json.loads(said)
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    accuracies = {}
    for name in ("model", "ensemble"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        scorer = Scorer(model, AutoTokenizer.from_pretrained(folder / name), progress=False)
        sides = [
            scorer.score([{"prompt": row["prompt"], "response": row[side]} for row in rows], aggregation="mean").mean
            for side in ("chosen", "rejected")
        ]
        means = [side.mean(dim=1) for side in sides]
        accuracies[name] = float((means[0] > means[1]).float().mean())
    found = finished[1].metrics["pairs"]["accuracy"]
    one_pair = 1.01 / len(rows)  # a near tie may fall either way: the trunk rounds otherwise in other batches
    assert accuracies["ensemble"] == pytest.approx(found["mean"]["value"], abs=one_pair)
    assert accuracies["model"] == pytest.approx(found["single head"]["value"], abs=one_pair)


@pytest.mark.parametrize("run", ["finished", "wide"])
def test_a_saved_model_gives_distances_and_its_reward_pays_for_them(run: str, request: pytest.FixtureRequest) -> None:
    finished = request.getfixturevalue(run)
    folder = finished[0].output
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if len(row["responses"]) == finished[0].samples_per_prompt]  # the training prompts
    items = [{"prompt": row["prompt"], "response": text} for row in rows for text in row["responses"]]
    known = next(row for row in finished[1].metrics["distances"] if row["kind"] == TRAINING)
    for name in ("model", "ensemble"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        scorer = Scorer(model, AutoTokenizer.from_pretrained(folder / name), progress=False)
        scores = scorer.score(items)
        far = scores.distance
        assert far is not None
        assert float(far.double().quantile(0.5)) == pytest.approx(known["median"], rel=1e-4)
        assert float((far > 1).double().mean()) == pytest.approx(known["beyond"], abs=1.01 / len(items))
        if name == "model":
            unit = float(model.score.trust.unit)
            plain = torch.tensor(scorer.score(items, aggregation="mean").reward)
            torch.testing.assert_close(torch.tensor(scores.reward), plain - unit * far**2, rtol=1e-4, atol=1e-4)


def test_pairs_are_ordered_by_gold_but_for_the_flipped_share(finished: tuple[DemoConfig, Any]) -> None:
    config, result = finished
    rows = [json.loads(line) for line in (config.output / "pairs.jsonl").read_text().splitlines()]
    counts = result.metrics["counts"]
    assert len(rows) == counts["pairs"]
    assert sum(row["flipped"] for row in rows) == counts["flipped"] == round(0.25 * len(rows))
    assert all((row["gold_chosen"] < row["gold_rejected"]) == row["flipped"] for row in rows)
    held = [json.loads(line) for line in (config.output / "held_out.jsonl").read_text().splitlines()]
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in held)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held}
    assert counts["pairs"] == config.pairs


def test_the_table_and_the_path_are_what_the_terminal_shows(finished: tuple[DemoConfig, Any]) -> None:
    text = str(finished[1])
    assert all(word in text for word in (*TITLES.values(), "n=1 ", "own, n=24", "mixture, n=24"))
    assert text.splitlines()[-1] == f"report: {finished[0].output / 'report.html'}"
    assert len({len(line) for line in text.splitlines()[:4]}) == 1, "columns are aligned"


def test_a_finished_demo_is_not_done_again(finished: tuple[DemoConfig, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_Run", None)
    assert str(run_demo(finished[0], progress=False)) == str(finished[1])


def test_the_report_is_one_whole_page_that_loads_nothing(finished: tuple[DemoConfig, Any]) -> None:
    text = (finished[0].output / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert all(load.startswith(("#", "data:")) for load in reader.loads), reader.loads
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text
    assert "script" not in reader.tags
    assert "{{" not in text
    assert "{%" not in text
    assert text.count("<svg") >= 4


def test_the_report_says_what_the_metrics_say(finished: tuple[DemoConfig, Any]) -> None:
    import html

    text = html.unescape((finished[0].output / "report.html").read_text(encoding="utf-8"))
    for line in finished[1].metrics["findings"]:
        assert line in text
    lead = text.split('<p class="lead">')[1]
    assert lead.startswith(finished[1].metrics["findings"][0])
    first = text.split("<figure>")[1]
    assert "Best-of-n: each reward picks from n candidates" in first.split("</figure>")[0]


def test_an_interrupted_demo_goes_on_to_the_same_samples_and_numbers(
    tiny_chat_folder: Path, finished: tuple[DemoConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_chat_folder, tmp_path / "cut")
    usual, count = rollout.sample_batch, 0

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal count
        for step in usual(*args, **kwargs):
            count += 1
            if count > 40:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(rollout, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, progress=False)
    monkeypatch.setattr(rollout, "sample_batch", usual)
    monkeypatch.setattr(demo, "evaluate_heads", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, progress=False)
    monkeypatch.undo()
    result = run_demo(config, progress=False)
    whole = finished[0].output
    for name in ("samples.jsonl", "pairs.jsonl", "held_out.jsonl"):
        assert (config.output / name).read_bytes() == (whole / name).read_bytes()
    same = [{k: v for k, v in r.metrics.items() if k != "seconds"} for r in (result, finished[1])]
    assert same[0] == same[1]


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_other_settings_in_the_same_folder_are_refused(finished: tuple[DemoConfig, Any]) -> None:
    changed = finished[0].model_copy(update={"temperature": 0.5})
    with pytest.raises(ValueError, match=r"another temperature \(1\.0 there, 0\.5 here\): choose another folder"):
        run_demo(changed, progress=False)


def test_a_run_of_another_version_is_refused_with_a_sentence(tiny_chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output: x\npairs_per_prompt: 120\n")
    (tmp_path / "run" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"one of this version's demo, got .*pairs_per_prompt.*: choose another folder$"
    ):
        run_demo(_config(tiny_chat_folder, tmp_path / "run"), progress=False)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == "{}\n"


def test_a_size_sets_what_is_not_given_itself() -> None:
    full = load_config(DemoConfig, None, ["size=full", "best_of=8", "ppo.steps=3"])
    assert (full.samples_per_prompt, full.held_out_prompts) == (16, 32)
    assert (full.best_of, full.ppo.steps, full.ppo.max_new_tokens) == (8, 3, 20)
    plain = DemoConfig()
    assert plain.size == "small"
    for key, value in SIZES["small"].items():
        assert (getattr(plain, key).steps if key == "ppo" else getattr(plain, key)) == (
            value["steps"] if key == "ppo" else value
        )
    with pytest.raises(ValueError, match="size: expected"):
        load_config(DemoConfig, None, ["size=huge"])


def test_a_config_that_was_written_reads_back_the_same(tmp_path: Path) -> None:
    config = DemoConfig(size="full", best_of=8, ppo={"steps": 3})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(DemoConfig, tmp_path / "config.yaml") == config


def test_the_estimate_grows_with_the_work_and_falls_with_the_speed(tiny_chat_folder: Path, tmp_path: Path) -> None:
    small, full = DemoConfig(), DemoConfig(size="full")
    assert seconds(300, 240, small) > seconds(600, 240, small)
    assert seconds(300, 240, full) > 2 * seconds(300, 240, small)
    assert seconds(300, 240, small) > seconds(300, 240, DemoConfig(ppo={"steps": 0})) + 30

    # two runs on two cores of an AMD EPYC: probe's tokens a second, seconds in all
    for speed, measured in ((741, 227), (431, 365)):
        assert seconds(speed, 240, small) == pytest.approx(measured, rel=0.3)
    model = load_language_model("model", str(tiny_chat_folder), torch.float32).eval()
    tokenizer = load_tokenizer("model", str(tiny_chat_folder))
    said = estimate(model, tokenizer, ["the food"], _config(tiny_chat_folder, tmp_path / "run"))
    assert re.search(r"about \d+ tokens a second: about \d+ minutes? in all.*--size full takes about \d+ minute", said)


def test_a_folder_of_something_else_is_refused(tiny_chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="with other files"):
        run_demo(_config(tiny_chat_folder, tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_another_process_writes_is_refused(finished: tuple[DemoConfig, Any]) -> None:
    with locked_folder(finished[0].output), pytest.raises(ValueError, match="is being written by process"):
        run_demo(finished[0], progress=False)


def test_a_mistake_leaves_the_folder_to_the_mended_command(
    tiny_chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_chat_folder, tmp_path / "run", preferences="no_such.jsonl")
    monkeypatch.setattr(
        demo._Run, "_load_model", lambda self: pytest.fail("a model was loaded before the file was read")
    )
    with pytest.raises(ValueError, match=r"^preferences: .*no_such\.jsonl: no such file"):
        run_demo(config, progress=False)
    with pytest.raises(ValueError, match="no_such_either"):  # and not that the folder holds another run
        run_demo(config.model_copy(update={"preferences": "no_such_either.jsonl"}), progress=False)


def test_real_preferences_take_the_place_of_the_judge(tiny_chat_folder: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    words = ["good food", "bad soup", "lovely room", "sad film", "great day", "poor hotel", "nice people", "ugly train"]
    lines = []
    for i in range(80):
        a, b = torch.randperm(8, generator=draw)[:2].tolist()
        good, bad = (a, b) if (a % 2, a) < (b % 2, b) else (b, a)
        row = {"prompt": f"it was {'very ' * (i % 20)}the", "chosen": words[good], "rejected": words[bad]}
        lines.append(json.dumps(row))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    config = _config(tiny_chat_folder, tmp_path / "run", preferences=str(file), prompts=None)
    result = run_demo(config, progress=False)
    assert result.metrics["attacks"] is None
    assert not (config.output / "samples.jsonl").exists()
    assert "no best-of-n" in str(result)
    text = (config.output / "report.html").read_text(encoding="utf-8")
    assert "No judge can score new responses" in text
    assert "Best-of-n: each reward" not in text
    assert [row["kind"] for row in result.metrics["distances"]] == list(KNOWN)


def test_too_few_preferences_for_a_trust_region_are_refused(tiny_chat_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"it was {i}", "chosen": "good", "rejected": "bad"} for i in range(11)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(tiny_chat_folder, tmp_path / "run", preferences=str(tmp_path / "few.jsonl"), prompts=None)
    with pytest.raises(ValueError, match=r"^preferences: expected at least 10 pairs to train on, .* got 9 beside 2"):
        run_demo(config, progress=False)


def test_our_prompts_are_a_few_hundred_different_ones() -> None:
    prompts = read_prompts(None, 32)
    assert 200 <= len(prompts) <= 400
    assert len({prompt.lower() for prompt in prompts}) == len(prompts)


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\none\n")
    assert read_prompts(tmp_path / "p.txt", 0) == ["one", "two"]
    with pytest.raises(ValueError, match=r"at least 5 different ones \(3 are held out\), got 2"):
        read_prompts(tmp_path / "p.txt", 3)


def test_prompts_that_cannot_be_read_are_named_without_an_errno(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    for name, reason in (
        ("absent.txt", r"cannot be read \(No such file or directory\)"),
        ("", r"cannot be read \(Is a directory\)"),
        ("latin.txt", "expected UTF-8, got .* at byte 3"),
    ):
        with pytest.raises(ValueError, match=f"^prompts: {tmp_path / name}: {reason}"):
            read_prompts(tmp_path / name, 3)
