"""The aggregation string: parsed and printed alike, and every wrong string refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prudent import Aggregation

SPECS = [
    "tradeoff:0.4", "tradeoff:0", "tradeoff:1", "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5",
    "softmin:0.01", "cvar:0.25", "head:3", "uwo:0.5,source=mean", "tradeoff:0.4,nominal=relative_std",
    "nominal,nominal=head:2", "tradeoff:0.2,source=mean,nominal=mean,centre=group",
]  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
def test_a_spec_is_printed_as_it_was_parsed(text: str) -> None:
    assert str(Aggregation.parse(text)) == text


@given(st.floats(0, 1))
def test_any_lambda_survives_print_and_parse_to_the_last_bit(lam: float) -> None:
    spec = Aggregation("tradeoff", lam)
    assert Aggregation.parse(str(spec)) == spec


def test_constructed_and_parsed_are_equal() -> None:
    assert Aggregation("mean") == Aggregation.parse("mean")
    assert Aggregation.parse(" lcb:2 , source=mean ") == Aggregation("lcb", 2.0, source="mean")


def test_an_aggregation_passes_through_parse() -> None:
    spec = Aggregation("min")
    assert Aggregation.parse(spec) is spec


def test_centre_can_be_replaced_and_none_keeps_it() -> None:
    spec = Aggregation.parse("min,centre=batch")
    assert str(spec.with_centre("group")) == "min,centre=group"
    assert spec.with_centre(None) is spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worst", "kind: expected one of tradeoff, nominal"),
        ("", "kind: expected one of"),
        ("tradeoff", "expected 'tradeoff:NUMBER', got 'tradeoff'"),
        ("mean:3", "expected 'mean' without a number"),
        ("tradeoff:much", "expected a number after 'tradeoff:', got 'much'"),
        ("tradeoff:1.5", r"tradeoff: expected lambda in \[0, 1\]"),
        ("tradeoff:nan", r"expected lambda in \[0, 1\]"),
        ("lcb:-1", r"expected c in \[0, inf\)"),
        ("lcb:inf", r"expected c in \[0, inf\)"),
        ("softmin:0", r"expected temperature in \(0, inf\)"),
        ("cvar:0", r"expected q in \(0, 1\]"),
        ("head:1.5", "expected 'head:INDEX'"),
        ("head:-1", "expected 'head:INDEX'"),
        ("min,source=sampled", "source: expected one of sample, mean"),
        ("min,center=batch", "expected source=, nominal= or centre="),
        ("min,centre=batch,centre=none", "centre is given twice"),
        ("nominal,nominal=head", "expected 'head:INDEX'"),
        ("min,nominal=mean", "has no effect on 'min'"),
        (0.4, "expected a string such as 'tradeoff:0.4', got float"),
        (["min"], "expected a string such as 'tradeoff:0.4', got list"),
    ],
)
def test_a_wrong_spec_is_refused_with_a_sentence(text: object, says: str) -> None:
    with pytest.raises(ValueError, match=f"aggregation.*{says}"):
        Aggregation.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["head:3", "nominal,nominal=head:3"])
def test_a_head_the_model_has_not_is_refused(text: str) -> None:
    Aggregation.parse(text).check_heads(4)
    with pytest.raises(ValueError, match=r"expected a head below 3 \(K\), got 3"):
        Aggregation.parse(text).check_heads(3)
