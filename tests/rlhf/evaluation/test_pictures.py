"""The pictures show the numbers they were given, and come out as whole files."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from prudent.rlhf.evaluation import statistics as S

pytest.importorskip("matplotlib")
from prudent.rlhf.evaluation import pictures
from prudent.rlhf.report import style as plot_style


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scorers(count: int = 60) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    names = ("single head", "mean", "nominal", "worst", "tradeoff:0.4")
    return {name: (normal(count, seed=i) + 0.4, normal(count, seed=9 + i)) for i, name in enumerate(names)}


def every_picture():
    pairs, sure = scorers(), torch.arange(60) % 3 > 0
    signal = {"std": S.reliability(normal(60), sure), "small margin": S.reliability(normal(60, seed=1), sure, bins=4)}
    yield pictures.accuracy({name: S.pair_accuracy(*pair) for name, pair in pairs.items()})
    yield pictures.margins({name: S.normalised_margin(*pair) for name, pair in pairs.items()})
    yield pictures.coverage(pairs)
    curve = [{"l2": l2, "log_loss": 0.6 + l2, "standard_error": 0.01} for l2 in (0.001, 0.01)]
    yield pictures.penalties(curve, 0.001)
    yield pictures.reliability(signal, auroc={"std": S.Interval(0.61, 0.5, 0.7)})
    yield pictures.head_correlation({"rewards": S.correlation(normal(20, 5)), "margins": [[1.0, None], [None, 1.0]]})
    yield pictures.scoring({"nominal": 0.5, "worst": 0.9})
    yield pictures.training_curves([{"step": i, "train/loss": 1 / (i + 1), "time": 5.0} for i in range(20)])
    yield pictures.std_histogram({"preference data": normal(50).exp(), "policy samples": 2 * normal(30).exp()})


def labels(figure) -> list[str]:
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left"))]


def test_every_picture_has_labelled_axes_and_becomes_a_png(tmp_path):
    for index, figure in enumerate(every_picture()):
        path = pictures.save_png(figure, tmp_path / "deep" / f"{index}.png")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
    assert sorted(p.suffix for p in (tmp_path / "deep").iterdir()) == [".png"] * 9  # no temporary left


def test_an_svg_is_one_self_contained_element_and_the_same_every_time():
    first, second = (pictures.to_svg(pictures.coverage(scorers())) for _ in range(2))
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg")
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith(("#", "data:")), value


def test_a_scorer_has_one_colour_in_every_picture_and_no_two_share_one():
    names = ["single head", "mean", "nominal", "worst", "tradeoff:0.4", "nominal (relative std)", "longer"]
    looks = plot_style.looks_of(names)
    assert len({look["color"] for look in looks.values()}) == len(names)
    assert plot_style.looks_of(["worst"])["worst"] == looks["worst"]


def test_coverage_states_the_area_and_has_one_scale_on_all_axes():
    pairs = {"mean": (normal(500), normal(500, seed=1)), "worst": (3 * normal(500), 3 * normal(500, seed=1))}
    figure = pictures.coverage(pairs)
    areas = [f"area / own std²: {S.normalised_area(*pair):.2f}" for pair in pairs.values()]
    assert [axes.get_title(loc="left").split("\n")[1] for axes in figure.axes] == areas
    assert areas[0] == areas[1]  # the unit is the scorer's own
    assert len({axes.get_xlim() for axes in figure.axes} | {axes.get_ylim() for axes in figure.axes}) == 1
    small, large = (axes.patches[0].get_width() for axes in figure.axes)
    assert large == pytest.approx(3 * small)


def test_a_scorer_in_another_unit_does_not_shrink_the_others():
    pairs = {"mean": (normal(500), normal(500, seed=1)), "stage 1": (90 * normal(500), 90 * normal(500, seed=1))}
    mean, other = pictures.coverage(pairs).axes
    assert mean.get_xlim()[1] < 6
    assert other.get_xlim()[1] > 100
    assert pictures.coverage({"mean": (torch.ones(4), torch.ones(4))}).axes[0].get_xlim() == (0.96, 1.04)


def test_the_ellipse_lies_along_the_principal_axis():
    x = normal(2000)
    (axes,) = pictures.coverage({"mean": (2 * x, 2 * x + 0.1 * normal(2000, seed=1))}).axes
    ellipse = axes.patches[0]
    assert ellipse.get_angle() % 180 == pytest.approx(45, abs=2)
    assert ellipse.get_width() > 10 * ellipse.get_height()


def test_margins_part_right_from_wrong_at_zero():
    margin = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    (axes,) = pictures.margins({"mean": margin}).axes
    right = sum(
        p.get_height() for p in axes.patches if p.get_facecolor()[:3] != pytest.approx((0.741, 0.741, 0.741), abs=0.01)
    )
    assert right == pytest.approx(50)
    assert "50.0 % wrong" in axes.get_title(loc="left")


def test_training_curves_pair_train_and_eval_and_leave_out_what_is_no_number():
    history = [{"step": i, "train/loss": 1.0, "train/note": "x", "train/bad": None} for i in range(3)]
    history += [{"step": 2, "eval/loss": math.nan}, {"step": 2, "eval/loss": 0.5}, {"loss": 3.0}]
    (axes,) = pictures.training_curves(history).axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines} == {"train": [0, 1, 2], "eval": [2]}


def test_a_histogram_of_one_value_is_one_full_bin():
    (axes,) = pictures.std_histogram({"a": torch.ones(5), "b": torch.ones(3)}).axes
    assert max(p.get_xy()[:, 1].max() for p in axes.patches) == pytest.approx(100)


@pytest.mark.parametrize("draw", [pictures.coverage, pictures.margins, pictures.head_correlation])
def test_nothing_to_draw_is_refused(draw):
    with pytest.raises(ValueError, match="at least one series"):
        draw({})


def test_no_numbers_to_draw_is_refused():
    with pytest.raises(ValueError, match="expected records with 'step'"):
        pictures.training_curves([{"step": 1}])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"prudent\[report\]"):
        pictures.scoring({"mean": 0.5})


def test_a_picture_leaves_no_global_style_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.to_svg(pictures.scoring({"mean": 0.5}))
    assert dict(matplotlib.rcParams) == before
