"""The aggregation of K Gaussian heads into one reward, written as a short string.

Examples: `tradeoff:0.4`, `lcb:1`, `uwo:0.5,source=mean`, `tradeoff:0.4,nominal=relative_std,centre=group`, `trust:1`,
`lcb:1,trust=3,from=1,power=1`. Config files, command line flags and model cards use the same string.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

# C++ gets the position in these tuples (csrc/kernels.h): append, never reorder.
KINDS = ("tradeoff", "nominal", "mean", "min", "max", "median", "lcb", "uwo", "softmin", "cvar", "head", "batch_worst")
NOMINALS = ("least_std", "relative_std", "mean", "head")
SOURCES = ("sample", "mean")
CENTRES = ("none", "batch", "group")
WORSTS = ("row", "batch")
HIGHEST_POWER = 4  # of the distance; each execution multiplies it out

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
    batch_worst   value_{k*}, k* = argmin_k of the batch's mean of value_k: one head for all rows      BRME eq. 6

    source        `sample` (default): value_k = sample_k if the op gets a seed, else mean_k. `mean`: mean_k.
    nominal       the nominal head: `least_std` (lowest index on a tie), `relative_std` (least std_k / std_ref_k, with
                  head k's typical std std_ref_k: a head whose std is always small does not win every row), `head:i`
                  (a fixed head), or `mean` (the mean of all heads' means instead).
    worst         of `tradeoff`: `row` (the least value of each row) or `batch` (eq. 6's head, as in `batch_worst`).
    centre        `none`, `batch`, `group`: the reward minus its mean over the batch or its prompt's group.
    trust, trust_from, trust_power      in a string `trust=c`, `from=a`, `power=p`: the reward loses the price of the
                  distance, c * unit * max(distance - a, 0)^p with c, a >= 0 and p in 1..4, which needs a `TrustRegion`.
                  trust None: no price. `trust:c` is short for `mean,trust=c`.

    Raises ValueError for any string or value outside this table.
    """

    kind: str = "tradeoff"
    coefficient: float = 0.4
    source: str = "sample"
    nominal: str = "least_std"
    worst: str = "row"
    centre: str = "none"
    trust: float | None = None
    trust_from: float = 0.0
    trust_power: int = 2

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("source", self.source, SOURCES)
        _one_of("worst", self.worst, WORSTS)
        _one_of("centre", self.centre, CENTRES)
        nominal, _, head = self.nominal.partition(":")
        _one_of("nominal", nominal, NOMINALS)
        if (nominal == "head") != head.isdecimal():
            raise ValueError(f"aggregation: nominal: expected 'head:INDEX', got {self.nominal!r}")
        if self.nominal != "least_std" and self.kind not in _WITH_NOMINAL:
            raise ValueError(
                f"aggregation: nominal={self.nominal} has no effect on {self.kind!r}, which uses no nominal head"
            )
        if self.worst != "row" and self.kind != "tradeoff":
            raise ValueError(
                f"aggregation: worst={self.worst} has no effect on {self.kind!r}: expected 'tradeoff:NUMBER'"
            )
        if self.kind != "head" and self.kind not in _COEFFICIENT:
            object.__setattr__(self, "coefficient", 0.0)  # so that Aggregation("mean") == Aggregation.parse("mean")
        _check_coefficient(self.kind, self.coefficient)
        _check_price(self.trust, self.trust_from, self.trust_power)
        object.__setattr__(self, "trust_power", int(self.trust_power))

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
    def of_batch(self) -> bool:
        """Whether a row's reward depends on the whole batch through eq. 6's worst head."""
        return self.kind == "batch_worst" or self.worst == "batch"

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
        short = self.kind == "mean" and self.trust is not None
        text = self.kind
        if short:
            text = f"trust:{_number(self.trust)}"
        elif self.kind == "head":
            text += f":{int(self.coefficient)}"
        elif self.kind in _COEFFICIENT:
            text += f":{_number(self.coefficient)}"
        for name, default in _WORDS.items():
            value = getattr(self, name)
            if value != default:
                text += f",{name}={value}"
        if self.trust is not None and not short:
            text += f",trust={_number(self.trust)}"
        if self.trust_from != 0:
            text += f",from={_number(self.trust_from)}"
        return text if self.trust_power == 2 else f"{text},power={self.trust_power}"


_WORDS = {"source": "sample", "nominal": "least_std", "worst": "row", "centre": "none"}  # option -> default
_NUMBERS = {"trust": "trust", "from": "trust_from", "power": "trust_power"}  # option -> field


def _number(value: float | None) -> str:
    assert value is not None
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


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


def _check_price(trust: float | None, start: float, power: float) -> None:
    if trust is None:
        if start != 0 or power != 2:
            raise ValueError("aggregation: from= and power= have no effect without trust=")
        return
    for name, value in (("trust", trust), ("from", start)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"aggregation: {name}: expected a finite number >= 0, got {value!r}")
    if power not in range(1, HIGHEST_POWER + 1):
        raise ValueError(f"aggregation: power: expected a whole number from 1 to {HIGHEST_POWER}, got {power!r}")


def _parse(text: str) -> Aggregation:
    head, *options = (part.strip() for part in text.split(","))
    kind, colon, number = head.partition(":")
    _one_of("kind", kind, (*KINDS, "trust"))
    takes_number = kind in _COEFFICIENT or kind in ("head", "trust")
    if takes_number != bool(colon):
        expected = f"'{kind}:NUMBER'" if takes_number else f"{kind!r} without a number"
        raise ValueError(f"aggregation: expected {expected}, got {head!r}")
    fields: dict[str, str | float] = {"kind": "mean" if kind == "trust" else kind}
    if colon:
        fields["trust" if kind == "trust" else "coefficient"] = _parse_number(number, f"{kind}:")
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or (name not in _WORDS and name not in _NUMBERS):
            known = ", ".join(f"{known}=" for known in (*_WORDS, *_NUMBERS))
            raise ValueError(f"aggregation: expected one of {known} after the kind, got {option!r} in {text!r}")
        field = _NUMBERS.get(name, name)
        if field in fields:
            raise ValueError(f"aggregation: {name} is given twice in {text!r}")
        fields[field] = value if name in _WORDS else _parse_number(value, f"{name}=")
    return Aggregation(**fields)  # type: ignore[arg-type]


def _parse_number(text: str, after: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"aggregation: expected a number after {after!r}, got {text!r}") from None


_parse_cached = lru_cache(maxsize=256)(_parse)
