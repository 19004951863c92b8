"""The aggregation string: parsed and printed alike, and every wrong string refused in one sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prudent import Aggregation

SPECS = [
    "tradeoff:0.4", "tradeoff:0", "tradeoff:1", "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5",
    "softmin:0.01", "cvar:0.25", "head:3", "uwo:0.5,source=mean", "tradeoff:0.4,nominal=relative_std",
    "nominal,nominal=head:2", "tradeoff:0.2,source=mean,nominal=mean,centre=group", "batch_worst",
    "tradeoff:0.4,worst=batch", "trust:1", "trust:0", "trust:3,from=1,power=1", "trust:1,source=mean,centre=batch",
    "lcb:1,trust=1", "tradeoff:0.4,worst=batch,centre=group,trust=0.5,from=0.25,power=4",
]  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
def test_a_spec_is_printed_as_it_was_parsed(text: str) -> None:
    assert str(Aggregation.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("mean,trust=1", "trust:1"), ("mean,trust=2,from=0,power=2", "trust:2"),
        ("trust:3,power=1,from=1", "trust:3,from=1,power=1"), ("min,power=3,trust=1", "min,trust=1,power=3"),
        ("tradeoff:0.4,worst=row", "tradeoff:0.4"), ("trust:1,centre=none", "trust:1"),
    ],
)  # fmt: skip
def test_other_spellings_are_printed_in_the_one_form(text: str, canonical: str) -> None:
    assert str(Aggregation.parse(text)) == canonical
    assert Aggregation.parse(canonical) == Aggregation.parse(text)


def test_the_short_form_is_the_mean_with_a_price() -> None:
    assert Aggregation.parse("trust:3,from=1,power=1") == Aggregation("mean", trust=3.0, trust_from=1.0, trust_power=1)
    assert Aggregation.parse("mean").trust is None


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_any_price_survives_print_and_parse_to_the_last_bit(c: float, start: float) -> None:
    spec = Aggregation("min", trust=c, trust_from=start)
    assert Aggregation.parse(str(spec)) == spec


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
        (
            "min,center=batch",
            "expected one of source=, nominal=, worst=, centre=, trust=, from=, power= after the kind",
        ),
        ("trust", "expected 'trust:NUMBER', got 'trust'"),
        ("trust:much", "expected a number after 'trust:', got 'much'"),
        ("trust:-1", "trust: expected a finite number >= 0, got -1.0"),
        ("min,trust=inf", "trust: expected a finite number >= 0, got inf"),
        ("min,trust=nan", "trust: expected a finite number >= 0, got nan"),
        ("min,trust=", "expected a number after 'trust=', got ''"),
        ("trust:1,trust=2", "trust is given twice"),
        ("trust:1,from=-1", "from: expected a finite number >= 0, got -1.0"),
        ("trust:1,power=1.5", "power: expected a whole number from 1 to 4, got 1.5"),
        ("trust:1,power=0", "power: expected a whole number from 1 to 4, got 0"),
        ("trust:1,power=5", "power: expected a whole number from 1 to 4"),
        ("min,from=1", "from= and power= have no effect without trust="),
        ("min,power=1", "from= and power= have no effect without trust="),
        ("min,worst=batch", "worst=batch has no effect on 'min'"),
        ("tradeoff:0.4,worst=all", "worst: expected one of row, batch"),
        ("batch_worst:1", "expected 'batch_worst' without a number"),
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
