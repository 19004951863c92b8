"""The demo's pictures draw the numbers that they are given."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the pictures are an extra: pip install 'prudent[report]'")

from prudent.rlhf.demo.pictures import distances, gold_against_n, steps


def _attack(scale: float) -> dict[str, Any]:
    rows = [{"value": scale * x, "low": scale * x - 0.1, "high": scale * x + 0.1} for x in (0.1, 0.2, 0.4)]
    return {"n": [1, 4, 16], "scorers": {"trust": rows, "oracle": rows}}


def test_each_pool_has_a_panel_and_only_named_rewards_a_curve_with_its_interval() -> None:
    figure = gold_against_n({"own": _attack(1), "mixed": _attack(-1)}, {"trust": "trust region"}, "gold")
    left, right = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["own", "mixed"]
    (line,) = left.lines
    assert list(line.get_xdata()) == [1, 4, 16]
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.2, 0.4])
    assert list(right.lines[0].get_ydata()) == pytest.approx([-0.1, -0.2, -0.4])
    edges = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((0.0, 0.5))


def test_a_kind_of_text_is_drawn_at_its_quantiles() -> None:
    row = {"kind": "repeated", "low": 1.0, "lower": 1.5, "median": 2.0, "upper": 2.5, "high": 4.0}
    (axes,) = distances([{**row, "kind": "own"}, row], own=["own"], policies=[]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["own", "repeated"]
    drawn = [list(line.get_xdata()) for line in axes.lines[:3]]
    assert drawn == [[1.0, 4.0], [1.5, 2.5], [2.0]]
    assert axes.lines[0].get_color() != axes.lines[3].get_color(), "the model's own responses have another colour"


def test_each_run_s_steps_are_drawn_from_1_in_a_panel_for_each_measure() -> None:
    rows = [{"step": i, "reward/mean": float(i), "gold/mean": -float(i), "text/foreign": 0.1 * i} for i in range(3)]
    figure = steps({"tuned single head": rows, "trust region": rows[:2]}, "gold")
    proxy, gold, foreign = figure.axes[:3]
    assert [axes.get_title(loc="left") for axes in (proxy, gold, foreign)][1] == "gold"
    single, trust = gold.lines
    assert list(single.get_xdata()) == [1, 2, 3]
    assert list(single.get_ydata()) == [0, -1, -2]
    assert list(trust.get_xdata()) == [1, 2]
    assert list(foreign.lines[0].get_ydata()) == pytest.approx([0, 0.1, 0.2])
