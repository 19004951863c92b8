"""The aggregation of K Gaussian heads into one reward, written as a short string.

Examples: `tradeoff:0.4`, `lcb:1`, `uwo:0.5,source=mean`, `tradeoff:0.4,nominal=relative_std,centre=group`. Config
files, command line flags and model cards use the same string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# C++ gets the position in these tuples (csrc/kernels.h): append, never reorder.
KINDS = ("tradeoff", "nominal", "mean", "min", "max", "median", "lcb", "uwo", "softmin", "cvar", "head")
NOMINALS = ("least_std", "relative_std", "mean", "head")
SOURCES = ("sample", "mean")
CENTRES = ("none", "batch", "group")

# kind -> (name of its number, lowest, highest, whether the lowest is excluded, what the number means)
_COEFFICIENT = {
    "tradeoff": ("lambda", 0.0, 1.0, False, "1 = only the nominal head, 0 = only the worst head"),
    "lcb": ("c", 0.0, math.inf, False, "mean - c * std over heads"),
    "uwo": ("lambda", 0.0, math.inf, False, "mean - lambda * variance over heads"),
    "softmin": ("temperature", 0.0, math.inf, True, "-b log mean exp(-r / b)"),
    "cvar": ("q", 0.0, 1.0, True, "mean of the lowest ceil(q K) heads"),
}
_WITH_NOMINAL = ("tradeoff", "nominal")


@dataclass(frozen=True)
class Aggregation:
    """How K heads (mean_k, std_k, sample_k) become one reward per row.

    kind          reward
    tradeoff:lam  lam * nominal + (1 - lam) * min_k value_k       BRME (arXiv 2409.15360) eq. 7, per row as practised
    nominal       mean_{i*}, i* = argmin_k std_k                  BRME 5.1
    mean min max median    over value_k (median of an even K: the mean of the middle two)
    lcb:c         mean - c * std, population std                  Eisenstein et al. 2312.09244 (c = 1)
    uwo:lam       mean - lam * var, population variance           Coste et al. 2310.02743 eq. 5
    softmin:b     -b * log mean_k exp(-value_k / b)               b -> 0: min, b -> inf: mean
    cvar:q        mean of the lowest ceil(q * K) values
    head:i        value_i

    source        `sample` (default): value_k = sample_k if the op gets a seed, else mean_k. `mean`: mean_k.
    nominal       the nominal head: `least_std` (lowest index on a tie), `relative_std` (least std_k / std_ref_k, with
                  head k's typical std std_ref_k: a head whose std is always small does not win every row), `head:i`
                  (a fixed head), or `mean` (the mean of all heads' means instead).
    centre        `none`, `batch`, `group`: the reward minus its mean over the batch or its prompt's group.

    Raises ValueError for any string or value outside this table.
    """

    kind: str = "tradeoff"
    coefficient: float = 0.4
    source: str = "sample"
    nominal: str = "least_std"
    centre: str = "none"

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("source", self.source, SOURCES)
        _one_of("centre", self.centre, CENTRES)
        nominal, _, head = self.nominal.partition(":")
        _one_of("nominal", nominal, NOMINALS)
        if (nominal == "head") != head.isdecimal():
            raise ValueError(f"aggregation: nominal: expected 'head:INDEX', got {self.nominal!r}")
        if self.nominal != "least_std" and self.kind not in _WITH_NOMINAL:
            raise ValueError(
                f"aggregation: nominal={self.nominal} has no effect on {self.kind!r}, which uses no nominal head"
            )
        if self.kind != "head" and self.kind not in _COEFFICIENT:
            object.__setattr__(self, "coefficient", 0.0)  # so that Aggregation("mean") == Aggregation.parse("mean")
        _check_coefficient(self.kind, self.coefficient)

    @classmethod
    def parse(cls, text: str | Aggregation) -> Aggregation:
        """`kind[:number][,source=...][,nominal=...][,centre=...]` -> Aggregation; an Aggregation passes through."""
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ValueError(f"aggregation: expected a string such as 'tradeoff:0.4', got {type(text).__name__}")
        # dynamo warns about cached functions, and a trace parses the string only once anyway
        return _parse(text) if torch.compiler.is_compiling() else _parse_cached(text)

    def with_centre(self, centre: str | None) -> Aggregation:
        """The same spec with another centring; None keeps it."""
        return self if centre is None or centre == self.centre else replace(self, centre=centre)

    @property
    def nominal_head(self) -> int:
        """The fixed head of `nominal=head:i`; 0 otherwise."""
        return int(self.nominal[5:]) if self.nominal.startswith("head:") else 0

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError if the spec names a head that a model of `num_heads` heads does not have."""
        named = [int(self.coefficient)] if self.kind == "head" else []
        if self.kind in _WITH_NOMINAL and self.nominal.startswith("head:"):
            named.append(self.nominal_head)
        for head in named:
            if head >= num_heads:
                raise ValueError(f"aggregation {str(self)!r}: expected a head below {num_heads} (K), got {head}")

    def __str__(self) -> str:
        text = self.kind
        if self.kind == "head":
            text += f":{int(self.coefficient)}"
        elif self.kind in _COEFFICIENT:
            text += (
                f":{self.coefficient:g}"
                if float(f"{self.coefficient:g}") == self.coefficient
                else f":{self.coefficient!r}"
            )
        for name, default in (("source", "sample"), ("nominal", "least_std"), ("centre", "none")):
            value = getattr(self, name)
            if value != default:
                text += f",{name}={value}"
        return text


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"aggregation: {name}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_coefficient(kind: str, value: float) -> None:
    if kind == "head":
        if not (value >= 0 and float(value).is_integer()):
            raise ValueError(f"aggregation: head: expected 'head:INDEX' with a whole number from 0, got {value!r}")
    elif kind in _COEFFICIENT:
        name, low, high, open_low, meaning = _COEFFICIENT[kind]
        inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
        if not inside:
            bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
            raise ValueError(f"aggregation: {kind}: expected {name} in {bounds} ({meaning}), got {value!r}")


def _parse(text: str) -> Aggregation:
    head, *options = (part.strip() for part in text.split(","))
    kind, colon, number = head.partition(":")
    fields: dict[str, str | float] = {"kind": kind}
    takes_number = kind in _COEFFICIENT or kind == "head"
    if kind in KINDS and takes_number != bool(colon):
        expected = f"'{kind}:NUMBER'" if takes_number else f"{kind!r} without a number"
        raise ValueError(f"aggregation: expected {expected}, got {head!r}")
    if colon:
        try:
            fields["coefficient"] = float(number)
        except ValueError:
            raise ValueError(f"aggregation: expected a number after '{kind}:', got {number!r}") from None
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in ("source", "nominal", "centre"):
            raise ValueError(
                f"aggregation: expected source=, nominal= or centre= after the kind, got {option!r} in {text!r}"
            )
        if name in fields:
            raise ValueError(f"aggregation: {name} is given twice in {text!r}")
        fields[name] = value
    return Aggregation(**fields)  # type: ignore[arg-type]


_parse_cached = lru_cache(maxsize=256)(_parse)
