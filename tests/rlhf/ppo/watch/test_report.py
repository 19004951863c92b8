"""The report of a PPO run: its conclusions follow from its numbers, missing metrics are left out, nothing is loaded."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the pictures are an extra: pip install 'prudent[report]'")

from prudent.rlhf.ppo.config import PPOConfig, RewardConfig
from prudent.rlhf.ppo.watch import findings as F
from prudent.rlhf.ppo.watch import pictures
from prudent.rlhf.ppo.watch.report import before_and_after, render, table
from prudent.rlhf.report.style import to_svg

from ...page import Reader


def config(**options: Any) -> PPOConfig:
    given = {"model": "base", "prompts": "p.txt", "output": Path("runs/ppo"), "reward": RewardConfig(source="m")}
    return PPOConfig(**{**given, **options})


def run(steps: int = 60, *, gold: str | None = "turns", proxy: float = 2.0, seed: int = 0) -> list[dict[str, Any]]:
    """A run whose gold reward rises, turns half way, falls, or is level; noise of 0.1 a step."""
    draw, rows = random.Random(seed), []
    for step in range(steps):
        x = step / max(1, steps - 1)
        row = {"step": step, "reward/mean": proxy * x + draw.gauss(0, 0.1), "kl/sequence": 20 * x + draw.gauss(0, 0.1)}
        shape = {"rises": x, "falls": -x, "level": 0.0, "turns": 1 - abs(2 * x - 1)}
        if gold is not None:
            row["gold/mean"] = shape[gold] + draw.gauss(0, 0.1)
        rows.append(row)
    return rows


def whole(steps: int = 30) -> list[dict[str, Any]]:
    """A run with every metric."""
    rest = {
        "reward/nominal": 0.5, "reward/worst": -0.2, "reward/gap": 0.7, "reward/head_std": 0.4,
        "reward/disagreement": 0.3, "reward/head_std_ratio": 1.4, "reward/disagreement_ratio": 2.1, "kl/token": 0.4,
        "kl/chi2": 30.0, "kl/coef": 0.0, "policy/entropy": 1.5, "policy/loss": -0.1, "policy/clip_fraction": 0.1,
        "policy/update_kl": 0.01, "policy/grad_norm": 1.0, "value/loss": 0.3, "value/explained_variance": 0.2,
        "text/length": 20.0, "text/truncated": 0.25, "text/foreign": 0.1, "reward/distance": 0.8,
        "reward/distance_reference": 0.7, "samples/dropped": 0, "update/skipped": 0,
    }  # fmt: skip
    return [row | rest for row in run(steps)]


def texts(steps: tuple[int, ...] = (0, 10, 20)) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "prompt": f"prompt {i}", "response": f"response {i} at {step}", "reward": 0.25 * i,
            "nominal": 0.5, "worst": -0.5, "head_std": 0.3, "distance": 0.9, "gold": -0.75, "length": 7,
            "stopped": i == 0,
        }
        for step in steps for i in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "proxy", "said"),
    [
        ("turns", 2.0, "Over-optimisation: after step"),
        ("turns", -2.0, "That is not over-optimisation"),
        ("turns", 0.0, "the proxy shows no change since"),
        ("falls", 2.0, "Over-optimisation: after step"),
        ("rises", 2.0, "No over-optimisation is shown."),
        ("rises", 0.0, "while the proxy shows no change ("),
        ("level", 2.0, "while the proxy rose ("),
        ("level", -2.0, "while the proxy fell ("),
        ("level", 0.0, "The gold reward shows no change ("),
        (None, 2.0, "The proxy reward rose"),
    ],
)
def test_the_headline_follows_from_gold_and_proxy(gold: str | None, proxy: float, said: str) -> None:
    assert said in F.headline(run(gold=gold, proxy=proxy))


def test_a_policy_that_leaves_the_known_texts_is_told_of_and_one_that_stays_is_not() -> None:
    draw = random.Random(0)
    leaves = [row | {"text/foreign": 0.05 + row["step"] / 100 + draw.gauss(0, 0.02)} for row in run()]
    stays = [row | {"text/foreign": 0.05 + draw.gauss(0, 0.02)} for row in run()]
    said = " ".join(F.findings(leaves))
    assert re.search(r"leaves what the reward knows: \d+ % of the responses were foreign .* 6\d % in the last", said)
    assert "foreign" not in " ".join(F.findings(stays))
    assert "foreign" not in " ".join(F.findings(run()))


def test_a_region_of_other_responses_is_told_of_at_the_start_and_a_policy_that_leaves_later_is_not() -> None:
    def rows(first: float) -> list[dict[str, Any]]:
        return [row | {"text/foreign": first if row["step"] == 0 else 0.9} for row in run()]

    told = "Before any update, 30 % of the policy's own responses lie beyond distance 1"
    assert told in F.faults(rows(0.3))
    for quiet in (rows(0.2), rows(float("nan")), rows(0.3)[1:], run()):
        assert "Before any update" not in F.faults(quiet)


def test_the_turn_is_named_where_it_is() -> None:
    step = int(re.search(r"after step (\d+)", F.headline(run(80)))[1])
    assert 30 <= step <= 50


def test_noise_alone_is_seldom_called_a_fall() -> None:
    """The peak was picked, and a fixed comparison is looked at too: at most 10 % of level runs."""
    for steps in (6, 12, 60):
        called = sum("after step" in F.headline(run(steps, gold="level", proxy=1.0, seed=seed)) for seed in range(300))
        assert called <= 0.1 * 300


@pytest.mark.parametrize("steps", [6, 12, 60])
def test_an_interval_covers_the_truth_about_as_often_as_it_says(steps: int) -> None:
    inside = 0
    for seed in range(400):
        found = F.change(F.series(run(steps, gold="level", seed=seed), "gold/mean"))
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_an_interval_is_a_students_t_of_the_noise_between_steps() -> None:
    """Six steps of 0, 1: variance 1/2, so a standard error of 3**-0.5; Student's t at 25/7 degrees has 2.9129."""
    found = F.change(F.Series(list(range(6)), [0.0, 1.0] * 3))
    assert found.value == pytest.approx(1 / 3)
    assert (found.high - found.low) / 2 == pytest.approx(2.9129 / 3**0.5, abs=1e-3)


def test_two_runs_differ_only_beyond_their_noise() -> None:
    level, risen = (F.series(run(gold=kind, seed=seed), "gold/mean") for kind, seed in (("level", 1), ("rises", 2)))
    assert F.difference(level, risen).verdict == "rises"
    assert F.difference(risen, level).verdict == "falls"
    again = F.series(run(gold="level", seed=3), "gold/mean")
    assert F.difference(level, again).verdict == "no change shown"
    assert F.difference(level, F.series(run(4), "gold/mean")) is None


def test_too_few_steps_say_so() -> None:
    assert F.findings(run(5))[0].startswith("5 steps: too few to tell")
    assert F.findings([]) == ["No step was finished."]


def test_what_was_dropped_and_skipped_is_told() -> None:
    rows = [row | {"samples/dropped": 2, "update/skipped": 1} for row in run(3)]
    assert "6 samples without a finite reward left out" in F.findings(rows)[-1]


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([1.0, 1.0], "4 updates skipped for a loss that was not finite."),
        ([None, None], "4 updates skipped because no sample was left."),
        ([None, 1.0], "2 updates skipped because no sample was left. 2 updates skipped for a loss that was not"),
    ],
)
def test_why_an_update_was_skipped_is_told(rewards: list[float | None], said: str) -> None:
    rows = [{"step": i, "reward/mean": reward, "update/skipped": 2} for i, reward in enumerate(rewards)]
    assert F.faults(rows).startswith(said)


def test_steps_that_the_numbers_are_not_of_are_named() -> None:
    assert F.faults(run(9)) == ""
    said = "metrics.jsonl lacks steps 0 to 2, 5: the numbers cover only the other steps."
    assert said in F.findings([row for row in run(9) if row["step"] not in (0, 1, 2, 5)])
    assert F.faults(run(9), steps=10).startswith("metrics.jsonl lacks step 9:")
    assert F.findings([], steps=9) == ["metrics.jsonl is empty: it shows nothing of the run."]


def test_a_gold_scorer_that_gave_no_number_is_not_one_that_is_missing() -> None:
    rows = [row | {"gold/mean": None} for row in run(12, gold=None)]
    lines = F.findings(rows)
    assert "Without a finite gold reward, reward hacking cannot" in lines[0]
    assert lines[-1] == "The gold scorer gave no finite number in 12 steps."
    text = Reader(render(config(gold="mine.py:judge"), rows, [], {})).text
    assert "The gold reward is missing: the gold scorer (mine.py:judge) gave no finite number." in text
    assert "no gold scorer was given" not in text
    assert "no gold scorer was given" in Reader(render(config(), run(12, gold=None), [], {})).text


def test_after_a_rollback_the_report_says_that_the_end_is_a_discarded_policys() -> None:
    rows = [{"step": step, "kl/sequence": 10.0 * step, "reward/mean": 0.0} for step in range(5)]
    lines = F.findings(rows, rolled_back_to=1)
    kept = "The kept policy is that of step 1 (KL 10.00 nats a response)"
    assert lines[1] == f"{kept}; the table's end is a later policy, which was discarded."
    outcome = {"stopped": "a rule", "rolled_back_to": 10, "steps": 30}
    text = Reader(render(config(), whole(), texts(), outcome)).text
    assert "at step 0 (left) and step 10 (right)" in text
    assert "response 1 at 10" in text
    assert "response 1 at 20" not in text
    back = Reader(render(config(), whole(), texts(), outcome | {"rolled_back_to": 0})).text
    assert "Responses at step 0." in back
    assert "response 1 at 20" not in back


def test_a_run_that_went_back_counts_a_step_once_the_later_way() -> None:
    rows = [{"step": 0, "x": 1.0}, {"step": 1, "x": 2.0}, {"step": 1, "x": 5.0, "y": None}, {"step": 2, "x": None}]
    assert F.series(F.by_step(rows), "x") == F.Series([0, 1], [1.0, 5.0])


def test_of_a_single_head_nothing_is_said_that_needs_several() -> None:
    rows = [
        row | {"reward/disagreement": 0.0, "reward/gap": 0.0, "reward/nominal": row["reward/mean"]} for row in whole()
    ]
    text = Reader(render(config(), rows, [], {"stopped": None})).text
    assert "nominal" not in text.split("What to watch")[0]
    assert "disagree" not in text.split("What to watch")[0]
    assert "predicted std, relative to the start1.4001.400" in text


def test_the_page_is_whole_loads_nothing_and_shows_texts_and_conclusions() -> None:
    rows = whole()
    outcome = {"stopped": None, "policy": "LoRA rank 16", "seconds": 75.0}
    page = render(config(gold="vader", update={"epochs": 3}), rows, texts(), outcome)
    reader = Reader(page)
    assert all(load.startswith(("#", "data:")) for load in reader.loads)
    assert "script" not in reader.tags
    assert page.count("<svg") == 3
    for line in F.findings(rows):
        assert line in reader.text
    assert "response 1 at 0" in reader.text
    assert "response 1 at 20" in reader.text
    assert "response 1 at 10" not in reader.text
    assert "update.epochs: 3" in reader.text
    assert "update.lam" not in reader.text.split("All settings")[0], "a default is no setting that differs"
    assert "Stopped early" not in reader.text


def test_what_stopped_the_run_is_said() -> None:
    page = render(config(), whole(), [], {"stopped": "disagreement > 3x for 5, at step 12"})
    assert "Stopped early: disagreement > 3x for 5, at step 12" in Reader(page).text


def _without(*prefixes: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(prefixes)} for row in whole()]


@pytest.mark.parametrize(
    "rows",
    [
        _without("gold"),
        _without("value"),
        _without("reward/nominal", "reward/worst", "reward/gap", "reward/disagreement"),
        _without("kl"),
        _without("reward", "kl", "policy", "text", "gold", "value"),
        [{k: v if k == "step" else None for k, v in row.items()} for row in whole()],
        [{k: v if k == "step" or i % 2 else math.nan for k, v in row.items()} for i, row in enumerate(whole())],
        whole(1),
        whole(2),
        [],
    ],
    ids=["no gold", "no critic", "one head", "no KL", "next to nothing", "all null", "half NaN", "1 step", "2", "none"],
)
def test_the_page_does_without_what_is_missing(rows: list[dict[str, Any]]) -> None:
    text = Reader(render(config(), rows, texts((0,)), {"stopped": None})).text
    assert "nan" not in text.lower()
    assert "None" not in text.split("All settings")[0]


def test_texts_are_escaped() -> None:
    evil = "<script>alert(1)</script> & <b>"
    rows = [row | {"prompt": evil, "response": evil} for row in texts((0, 3))]
    page = render(config(model=evil, prompts=evil), whole(8), rows, {"stopped": evil, "policy": evil, "reward": evil})
    assert "<script" not in page
    assert Reader(page).text.count(evil) >= 6


def test_samples_stand_side_by_side_first_against_last() -> None:
    found = before_and_after(texts())
    assert [pair["prompt"] for pair in found] == ["prompt 0", "prompt 1"]
    assert (found[0]["before"]["step"], found[0]["after"]["step"]) == (0, 20)
    facts = "gold -0.75, reward +0.25, worst case -0.50, std 0.30, distance 0.90, 7 tokens, cut off"
    assert found[1]["after"]["facts"] == facts
    assert before_and_after([]) == []
    assert before_and_after(texts((4,)))[0]["after"] is None
    chat = [{"role": "user", "content": "hello"}]
    bare = {"step": 0, "prompt": chat, "response": "", "reward": None, "gold": None, "length": 0, "stopped": True}
    (pair,) = before_and_after([bare])
    assert (pair["prompt"], pair["before"]["facts"]) == ("hello", "0 tokens")


def test_the_table_gives_start_end_and_change() -> None:
    lines = {line[0]: line[1:] for line in table(run(60, gold="rises"))["rows"]}
    start, end, moved = lines["gold reward"]
    assert float(start) < 0.2
    assert float(end) > 0.8
    assert re.fullmatch(r"\+0\.\d{3} \[\+0\.\d{3}, \+[01]\.\d{3}\]", moved)
    assert table(run(3))["rows"][0][3] == ""


def test_a_share_changes_by_1_at_most() -> None:
    cut = [1.0, 0.9, 1.0, 0.0, 0.1, 0.0]
    rows = [{"step": step, "text/truncated": share, "text/length": 9 * share} for step, share in enumerate(cut)]
    lines = {line[0]: line[3] for line in table(rows)["rows"]}
    assert re.fullmatch(r"-0\.933 \[-1\.000, -0\.\d{3}\]", lines["share cut off"])
    assert "[-1.000" not in lines["length, tokens"]


def test_the_picture_draws_the_runs_way_through_kl_and_reward() -> None:
    rows = run(12)
    figure = pictures.over_optimisation({"policy": rows})
    left, right = figure.axes
    assert list(left.lines[0].get_xdata()) == [row["kl/sequence"] for row in rows]
    assert list(right.lines[0].get_ydata()) == [row["gold/mean"] for row in rows]
    assert len(pictures.over_optimisation({"policy": run(12, gold=None)}).axes) == 1
    two = pictures.over_optimisation({"single head": rows, "tradeoff λ=0.4": run(12, seed=1)})
    assert [text.get_text() for text in two.legends[0].get_texts()] == ["single head", "tradeoff λ=0.4"]


def test_smoothing_keeps_a_line_and_the_length() -> None:
    line = [0.5 * i for i in range(60)]
    assert list(pictures.smooth(line)[5:-5]) == pytest.approx(line[5:-5])
    assert list(pictures.smooth([3.0, 1.0])) == [3.0, 1.0]


def test_only_what_was_measured_gets_a_panel() -> None:
    assert len(pictures.watched(F.by_step(whole()))) == 11
    assert list(pictures.watched(run(5, gold=None))) == ["reward", "KL, nats a response"]
    assert to_svg(pictures.watch(whole(1))).startswith("<svg")
