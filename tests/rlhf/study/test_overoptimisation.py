"""`prudent study overoptimisation`: judges, foreign texts, pairs, arms, best-of-n, constants, resuming."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prudent.rlhf.evaluation.best_of_n import best_of_n_curve
from prudent.rlhf.evaluation.crossed import crossed_interval
from prudent.rlhf.job.config import load_config
from prudent.rlhf.sampling.foreign import AGAIN, ATTACKS, OTHERS, foreign_texts
from prudent.rlhf.study.overoptimisation import golds
from prudent.rlhf.study.overoptimisation.attacks import best_of_n, pools
from prudent.rlhf.study.overoptimisation.candidates import load_candidates
from prudent.rlhf.study.overoptimisation.cells import arms_of, settings
from prudent.rlhf.study.overoptimisation.config import OveroptimisationConfig, View
from prudent.rlhf.study.overoptimisation.heads import draw_pairs
from prudent.rlhf.study.overoptimisation.judge import RewardJudge, load_gold
from prudent.rlhf.study.overoptimisation.report import findings
from prudent.rlhf.study.overoptimisation.rewards import GRIDS, PLAIN, Arm, Scored, reported_arms, reward
from prudent.rlhf.study.overoptimisation.study import run_overoptimisation
from prudent.rlhf.study.overoptimisation.world import World, _rotation

_QUICK = (
    "samples.held_out=3",
    "samples.candidates=16",
    "samples.training=6",
    "samples.max_new_tokens=8",
    "samples.temperature=1.0",
    "samples.top_k=0",
    "samples.top_p=1.0",
    "samples.dtype=float32",
    "seeds=2",
    "tuning_seeds=1",
    "golds=[sentiment]",
    "tuning_golds=[linear]",
    "pairs=[50]",
    "noise=[0.25]",
    "shares=[0.25]",
    "others=2",
    "taps=['last:-1', 'mean:1/2']",
    "views=['last:-1 | mean:1/2']",
    "measured_directions=[0]",
    "directions=4",
    "bt.solver=adamw",
    "bt.epochs=1",
    "brme.epochs=1",
    "pet.epochs=1",
    "resamples=100",
)


class _Tokenizer:
    all_special_ids = (0,)

    def __len__(self) -> int:
        return 40

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"t{i}" for i in ids)


def test_the_lexicon_pays_each_occurrence_and_variety_none() -> None:
    pytest.importorskip("vaderSentiment")
    assert golds.lexicon(["good good good", "good bad", "the table"]) == [3.0, 0.0, 0.0]
    assert golds.variety(["a big dog ran.", "big big big big", ""]) == pytest.approx([1.5, 0.25 - 2 / 3, 0.0])


def test_linear_is_the_same_direction_in_every_call() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(golds.linear(x), golds.linear(x.view(5, 1, 7))[:, 0])


def test_foreign_texts_are_the_same_each_time_and_as_many_as_asked_of_each_kind() -> None:
    responses = [["we ate red apples today", "the sea was calm and wide"], ["a dog ran to the old gate", "no"]]
    texts = foreign_texts(["p one two", "q"], responses, _Tokenizer(), 4, 2, 0)
    assert texts == foreign_texts(["p one two", "q"], responses, _Tokenizer(), 4, 2, 0)
    for number in (0, 1):
        kinds = [text.kind for text in texts if text.prompt == number]
        assert kinds[:4] == ["repeated", "shuffled"] * 2
        assert {kind: kinds.count(kind) for kind in (*ATTACKS, *OTHERS, AGAIN)} == dict.fromkeys(
            (*ATTACKS, *OTHERS, AGAIN), 2
        )
    for text in texts:
        if text.kind == "shuffled":
            assert sorted(text.text.split()) in [sorted(said.split()) for said in responses[text.prompt]]
        if text.kind == "repeated":
            assert len(set(text.text.split())) < len(text.text.split())
        if text.kind == AGAIN:
            assert text.text in responses[text.prompt]


def test_foreign_texts_begin_with_a_blank_where_responses_do() -> None:
    texts = foreign_texts(["p"], [[" a dog ran home", " the cat sat down"]], _Tokenizer(), 2, 1, 0)
    assert all(text.text.startswith(" ") for text in texts)


def test_pairs_of_a_seed_are_the_beginning_of_more_and_ordered_by_gold() -> None:
    gold = torch.randn(6, 8)
    many, few = draw_pairs(gold, 60, 0.0, 3), draw_pairs(gold, 20, 0.0, 3)
    assert all(torch.equal(a[:20], b) for a, b in zip(many, few, strict=True))
    assert bool((gold[many.prompt, many.chosen] > gold[many.prompt, many.rejected]).all())
    noisy = draw_pairs(gold, 60, 0.25, 3)
    assert int((gold[noisy.prompt, noisy.chosen] < gold[noisy.prompt, noisy.rejected]).sum()) == 15
    unordered = {(p, *sorted((a, b))) for p, a, b in zip(*(column.tolist() for column in many), strict=True)}
    assert len(unordered) == 60


def test_ties_make_no_pair() -> None:
    gold = torch.tensor([[0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match=r"pairs: expected at most 2, .* got 3"):
        draw_pairs(gold, 3, 0.0, 0)


def test_a_mixture_has_as_many_candidates_of_which_a_share_is_foreign() -> None:
    found = pools(100, 10, (0.1, 0.01))
    assert {name: (len(pool), int((pool >= 100).sum())) for name, pool in found.items()} == {
        "reference": (100, 0),
        "10% foreign": (100, 10),
        "1% foreign": (100, 1),
    }
    with pytest.raises(ValueError, match=r"shares: expected at most 0\.1, got 0\.2"):
        pools(100, 10, (0.2,))


def test_best_of_n_of_many_rewards_is_the_unbiased_estimate_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(3, 4, 32, generator=generator), torch.randn(4, 32, generator=generator)
    picked, units = best_of_n(proxy, gold, [1, 4, 32])
    for arm in range(3):
        curve = best_of_n_curve(proxy[arm], gold, [1, 4, 32])
        torch.testing.assert_close(picked[arm], curve.gold_per_prompt)
        expected = (curve.proxy - curve.proxy[0]) / curve.proxy_spread
        torch.testing.assert_close(units[arm], expected)


def test_an_interval_spans_seeds_and_prompts() -> None:
    flat = crossed_interval(torch.full((3, 5), 2.0))
    assert flat == pytest.approx((2.0, 2.0, 2.0))
    by_seed = torch.tensor([[0.0] * 50, [1.0] * 50, [2.0] * 50])
    assert crossed_interval(by_seed) == pytest.approx((1.0, 0.0, 2.0))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["views=['last:-1']"], r"views: expected the heads' taps \| the distance's taps, got 'last:-1'"),
        (["views=['last:-1 | mean:3']"], r"views: expected taps of the key taps .* got mean:3"),
        (["golds=[taste]"], r"golds: expected different ones of .* got taste"),
        (["tuning_golds=[careful]"], "tuning_golds: expected golds that are not reported"),
        (["noise=[0.5]"], r"noise: expected values from 0 to below 0\.5"),
        (["pairs=[20]"], "pairs: expected at least 50, got 20"),
        (["policy_gradient.view='a | b'"], r"policy_gradient\.view: expected one of the key views, got a \| b"),
        (["policy_gradient.golds=[linear]"], r"policy_gradient\.golds: expected golds that read texts, .* got linear"),
    ],
)
def test_a_config_that_means_nothing_is_refused(sets: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_config(OveroptimisationConfig, None, sets)


def test_constants_are_chosen_on_other_golds_and_other_seeds() -> None:
    config = OveroptimisationConfig()
    reported, tuning = settings(config, tuning=False), settings(config, tuning=True)
    assert len(reported) == 3 * 4 * 2 * 5
    assert not {s.gold for s in reported} & {s.gold for s in tuning}
    assert not {s.seed for s in reported} & {s.seed for s in tuning}


def test_a_price_counts_in_units_of_the_head_and_a_hinge_leaves_the_inside_alone() -> None:
    mean = {"tuned": torch.tensor([[[1.0], [2.0]]]), "ensemble": torch.tensor([[[0.0, 2.0], [1.0, 1.0]]])}
    mean["brme"] = mean["ensemble"]
    scored = Scored(
        mean, torch.tensor([[[0.1, 0.2], [0.2, 0.1]]]), torch.tensor([[0.5, 1.0]]), {"tuned": 2.0, "brme": 1.0}
    )
    distance = torch.tensor([[0.5, 3.0]])
    found = {arm: reward(arm, scored, distance)[0].tolist() for arm in (
        Arm("trust quad", 1.0), Arm("trust hinge", 3.0), Arm("UWO", 0.5), Arm("posterior LCB", 2.0),
        Arm("ensemble WCO"), Arm("BRME nominal"), Arm("BRME worst"), Arm("trust quad, tradeoff:0.4", 1.0),
    )}  # fmt: skip
    assert found == {
        ("trust quad", 1.0): pytest.approx([1 - 2 * 0.25, 2 - 2 * 9]),
        ("trust hinge", 3.0): pytest.approx([1.0, 2 - 3 * 2 * 2]),
        ("UWO", 0.5): pytest.approx([1 - 0.5, 1.0]),
        ("posterior LCB", 2.0): pytest.approx([0.0, 0.0]),
        ("ensemble WCO", 0.0): pytest.approx([0.0, 1.0]),
        ("BRME nominal", 0.0): pytest.approx([0.0, 1.0]),
        ("BRME worst", 0.0): pytest.approx([0.0, 1.0]),
        ("trust quad, tradeoff:0.4", 1.0): pytest.approx([-0.25, 1 - 9]),
    }


def test_a_table_has_every_kind_with_its_usual_and_its_chosen_constant() -> None:
    arms = reported_arms({kind: grid[0] for kind, grid in GRIDS.items()})
    assert [arm.kind for arm in arms[: len(PLAIN)]] == list(PLAIN)
    assert [arm.constant for arm in arms if arm.kind == "trust quad"] == [1.0, GRIDS["trust quad"][0]]
    config = OveroptimisationConfig()
    views = {at for at, arm in arms_of(("last:-1",), config) if arm.kind == "trust hinge"}
    assert views == {"last:-1 | last:-1", "last:-1 | mean:2/3"}


def test_a_projection_keeps_the_geometry_and_gives_columns_one_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(2000, 40, generator=generator) * torch.logspace(0, -2, 40)
    rows = inner @ torch.randn(40, 800, generator=generator)
    rows = rows - rows.mean(dim=0)
    turned = rows @ _rotation(rows)
    assert turned.shape == (2000, 512)
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-3, atol=0)
    variance = turned.double().var(dim=0)
    assert float(variance.max() / variance.min()) == pytest.approx(1, abs=1e-2)


def _numbers(difference: list[float], trend: list[float]) -> dict[str, Any]:
    return {"difference": difference, "trend": trend}


def test_the_page_says_what_the_intervals_say() -> None:
    zero, up, down = [0.0, -0.1, 0.1], [0.5, 0.2, 0.8], [-0.5, -0.8, -0.2]

    def attacks(mixed: list[float]) -> dict[str, Any]:
        arms = {"single, tuned": _numbers(zero, down), "single, shipped before": _numbers(down, zero)}
        chosen = {f"{kind} {grid[0]:g}": _numbers(zero, zero) for kind, grid in GRIDS.items()}
        reference, mixture = {**arms, **chosen}, {**arms, **chosen}
        mixture["trust hinge 1"] = mixture["trust quad 0.1"] = _numbers(mixed, zero)
        return {"reference": reference, "10% foreign": mixture}

    numbers = {
        "constants": {kind: {"chosen": grid[0]} for kind, grid in GRIDS.items()},
        "golds": {"careful": attacks(up), "lexicon": attacks(down)},
    }
    lines = findings({"views": {"a | b": numbers}, "n": [1, 64], "attacks": ["reference", "10% foreign"]})
    assert "brings more gold (careful +0.50 [+0.20, +0.80]" in lines[0]
    assert "with 10% foreign candidates more gold (careful" in lines[1]
    assert "less gold (lexicon -0.50 [-0.80, -0.20])" in lines[1]
    assert "gold falls over the last factor 4 of n for single, tuned (careful), single, tuned (lexicon)" in lines[3]
    assert lines[-1] == (
        "When to use trust hinge 1: where a policy can leave the reference's text and the true reward is like "
        "careful; not where it is like lexicon, which keeps paying there; on the reference's own candidates no loss is "
        "shown."
    )


def _config(model: Path, output: Path, *sets: str) -> OveroptimisationConfig:
    words = output.parent / "prompts.txt"
    things = ("day", "food", "hotel", "train", "film", "soup", "room", "people", "service", "pain", "calm", "love")
    words.write_text("".join(f"the {thing} {verb}\n" for thing in things for verb in ("was", "is")))
    given = [*_QUICK, f"samples.prompts={words}", *sets]
    return load_config(OveroptimisationConfig, None, given, model=str(model), output=output)


@pytest.mark.slow
def test_policy_gradient_is_judged_by_the_gold_and_its_signals_are_kept(tiny_chat_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    sets = (
        "policy_gradient.steps=2",
        "policy_gradient.arms=['single, tuned', trust quad]",
        "policy_gradient.golds=[sentiment]",
        "policy_gradient.kl=[0.1]",
        "policy_gradient.seeds=2",
        "policy_gradient.pairs=50",
        "policy_gradient.prompts_per_step=2",
        "policy_gradient.samples_per_prompt=2",
    )
    config = _config(tiny_chat_folder, tmp_path / "study", *sets)
    metrics = run_overoptimisation(config, progress=False).metrics
    runs = metrics["policy_gradient"]
    chosen = metrics["views"]["last:-1 | mean:1/2"]["constants"]["trust quad"]["chosen"]
    assert [run["arm"] for run in runs] == ["single, tuned", f"trust quad {chosen:g}"] * 2
    assert all(run["final"]["gold/mean"] is not None for run in runs)
    folder = tmp_path / "study" / "policy" / "runs"
    written = sorted(folder.glob("*/metrics.jsonl"))
    assert len(written) == 4
    for file in written:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 2
        assert all(row["reward/distance"] > 0 and 0 <= row["text/foreign"] <= 1 for row in rows)
        assert all(row["reward/head_std"] > 0 and row["reward/disagreement"] > 0 for row in rows)
    drawn = yaml.safe_load((written[0].parent / "config.yaml").read_text())["rollout"]
    keys = ("temperature", "top_k", "top_p")  # of the responses that the distance knows
    assert {key: drawn[key] for key in keys} == config.samples.model_dump(include={*keys})
    assert "### Gold: sentiment, KL coefficient 0.1" in (tmp_path / "study" / "overoptimisation.md").read_text()
    # what PPO maximises and what judges it are the study's own numbers
    world, view, fit = World(config), View.parse("last:-1 | mean:1/2"), folder.parent / "sentiment-0"
    found = load_candidates(config, progress=False)
    prompt, responses = next(iter(found.held_out.items()))
    judge = RewardJudge(fit, Arm("trust quad", 2.0))
    x = world.features(view.heads).candidates[0, : len(responses)]
    distance = world.distance(view.distance).candidates[0, : len(responses)]
    unit = json.loads((fit / "judge.json").read_text())["unit"]["tuned"]
    expected = judge._heads["tuned"](x).reward / unit - 2 * distance.square()
    given = judge([prompt] * len(responses), responses)["rewards"]
    torch.testing.assert_close(torch.tensor(given), expected.detach(), rtol=1e-3, atol=1e-3)
    gold = load_gold(folder.parent, "sentiment")([prompt] * len(responses), responses)
    torch.testing.assert_close(torch.tensor(gold).double(), world.gold("sentiment").candidates[0, : len(responses)])
    before = {file: os.stat(file).st_mtime_ns for file in written}
    assert run_overoptimisation(config, progress=False).metrics == metrics
    assert {file: os.stat(file).st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_a_study_from_end_to_end_is_resumed_not_repeated(tiny_chat_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    output = tmp_path / "study"
    result = run_overoptimisation(_config(tiny_chat_folder, output), progress=False)
    cells = sorted((output / "cells").rglob("*.safetensors"))
    assert len(cells) == 3  # two seeds of one setting, one of the tuning gold
    before = {cell: os.stat(cell).st_mtime_ns for cell in cells}
    again = run_overoptimisation(_config(tiny_chat_folder, output), progress=False)
    assert {cell: os.stat(cell).st_mtime_ns for cell in cells} == before
    assert again.metrics == result.metrics
    more = run_overoptimisation(_config(tiny_chat_folder, output, "noise=[0.25, 0]"), progress=False)
    assert {cell: os.stat(cell).st_mtime_ns for cell in cells} == before
    saved = json.loads((output / "overoptimisation.json").read_text())
    assert saved == more.metrics
    table = saved["views"]["last:-1 | mean:1/2"]["golds"]["sentiment"]
    assert set(table) == {"reference", "25% foreign"}
    assert table["reference"]["single, tuned"]["difference"] == [0, 0, 0]
    assert set(table["reference"]["single, tuned"]["settings"]) == {"50-0.25", "50-0"}
    assert "Gold: sentiment\n" in (output / "overoptimisation.md").read_text()
    assert (output / "overoptimisation.png").stat().st_size > 10_000
    world = World(_config(tiny_chat_folder, output))
    reference = world.gold("sentiment").training
    assert float(reference.mean()) == pytest.approx(0, abs=1e-9)
    assert float(reference.std(correction=0)) == pytest.approx(1)
    assert float((world.distance(View.parse("last:-1 | mean:1/2").distance).training <= 1).double().mean()) > 0.9
    with pytest.raises(ValueError, match=r"holds a run with another samples\.training \(6 there, 7 here\)"):
        run_overoptimisation(_config(tiny_chat_folder, output, "samples.training=7"), progress=False)
