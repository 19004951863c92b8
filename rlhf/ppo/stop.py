"""Rules over a run's metrics that end it early, such as "foreign > 0.2 for 3 then rollback"."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# all metrics of metrics.jsonl
METRICS = (
    "reward/mean",
    "reward/nominal",
    "reward/worst",
    "reward/gap",
    "reward/head_std",
    "reward/disagreement",
    "reward/head_std_ratio",
    "reward/disagreement_ratio",
    "reward/distance",
    "reward/distance_reference",
    "kl/sequence",
    "kl/token",
    "kl/chi2",
    "kl/coef",
    "policy/entropy",
    "policy/loss",
    "policy/clip_fraction",
    "policy/update_kl",
    "policy/grad_norm",
    "value/loss",
    "value/explained_variance",
    "text/length",
    "text/truncated",
    "text/foreign",
    "gold/mean",
    "samples/dropped",
    "update/skipped",
    "update/epochs",
    "update/steps",
    "time/rollout",
    "time/score",
    "time/update",
    "time/tokens_per_second",
    "memory/peak_gib",
)
SHORT = {
    "disagreement": "reward/disagreement",
    "gap": "reward/gap",
    "std": "reward/head_std",
    "distance": "reward/distance",
    "foreign": "text/foreign",
    "kl": "kl/sequence",
    "length": "text/length",
    "truncated": "text/truncated",
    "entropy": "policy/entropy",
}
_ADVICE = "to continue, use --resume with another stop_when"
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_FROM_ZERO = ("kl/sequence", "kl/token", "kl/chi2")  # 0 at the start, because the policy starts as the reference
_FORM = "NAME > VALUE for STEPS then stop (or: <, >=, <=; VALUEx for times its start; then rollback)"
_RULE = re.compile(
    r"(?P<name>[\w/]+)\s*(?P<compare>>=|<=|>|<)\s*(?P<value>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)(?P<times>x?)"
    r"(\s+for\s+(?P<steps>\d+)(\s+steps?)?)?(\s+then\s+(?P<action>stop|rollback))?"
)


class Rule(NamedTuple):
    """`metric` `compare` `value`, or `value` times its start, at `steps` steps in a row: then stop or roll back."""

    text: str
    metric: str
    compare: str
    value: float
    relative: bool
    steps: int = 1
    rollback: bool = False


class Fired(NamedTuple):
    """A rule that was true for its number of steps: since step `since`, with `value` at `step`."""

    rule: Rule
    since: int
    step: int
    value: float

    def __str__(self) -> str:
        rule = self.rule
        return f"{rule.text!r} held from step {self.since} to {self.step}, where {rule.metric} was {self.value:.4g}"


def parse_rule(text: str) -> Rule:
    """Parse a rule; raise ValueError with the form of rules, or the nearest metric, if `text` is not a rule."""
    text = " ".join(text.split())
    found = _RULE.fullmatch(text)
    if found is None:
        raise ValueError(f"stop_when: expected {_FORM}, got {text!r}")
    name = found["name"]
    metric = SHORT.get(name, name)
    if metric not in METRICS:
        near = difflib.get_close_matches(name, [*SHORT, *METRICS], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"the metrics are {', '.join([*SHORT, *METRICS])}"
        raise ValueError(f"stop_when: unknown metric {name!r} in {text!r}: {hint}")
    value, steps = float(found["value"]), int(found["steps"] or 1)
    if not math.isfinite(value) or (found["times"] and value <= 0):
        raise ValueError(f"stop_when: expected a finite number, above 0 before x, got {found['value']} in {text!r}")
    if found["times"] and metric in _FROM_ZERO:
        raise ValueError(
            f"stop_when: expected a number without x in {text!r}, because {metric} starts at 0, got {value:g}x"
        )
    if steps < 1:
        raise ValueError(f"stop_when: expected at least 1 step, got {steps} in {text!r}")
    return Rule(text, metric, found["compare"], value, bool(found["times"]), steps, found["action"] == "rollback")


@dataclass
class _Watch:
    """The state of one rule: its metric's start, and the step since which it has been true (None: it is not)."""

    rule: Rule
    start: float | None = None
    since: int | None = None

    def observe(self, step: int, metrics: Mapping[str, float]) -> Fired | None:
        rule = self.rule
        if rule.metric not in metrics:
            raise ValueError(
                f"stop_when: {rule.text!r} watches {rule.metric}, which this run does not measure; it measures "
                + ", ".join(name for name in METRICS if name in metrics)
                + "; "
                + _ADVICE
            )
        value = metrics[rule.metric]
        if rule.relative and self.start is None:
            if math.isnan(value):
                return None  # the first step that has a number is the start
            if value <= 0 or math.isinf(value):
                raise ValueError(
                    f"stop_when: expected {rule.metric} to start above 0, because {rule.text!r} multiplies its start, "
                    f"got {value:.4g} at step {step}: give a number without x; {_ADVICE}"
                )
            self.start = value
        bound = rule.value * (self.start or 0.0) if rule.relative else rule.value
        if not _COMPARE[rule.compare](value, bound):  # NaN compares false, infinity is more than any bound
            self.since = None
            return None
        self.since = step if self.since is None else self.since
        return Fired(rule, self.since, step, value) if step - self.since + 1 >= rule.steps else None


@dataclass
class StopRules:
    """All rules of a run; `observe` every step's metrics in turn."""

    texts: Sequence[str]
    _watches: list[_Watch] = field(init=False)

    def __post_init__(self) -> None:
        self._watches = [_Watch(parse_rule(text)) for text in self.texts]

    def observe(self, step: int, metrics: Mapping[str, float]) -> Fired | None:
        """The first rule that has now been true for long enough, if any; call it for every step.

        Raises:
            ValueError: for a metric that this run does not measure, or a start that is not above 0 in a rule with x.
                The user may resume with other rules.
        """
        fired = [found for watch in self._watches if (found := watch.observe(step, metrics)) is not None]
        return fired[0] if fired else None

    def refuse(self, unmeasured: Mapping[str, str]) -> None:
        """Raise ValueError for a rule over one of the `unmeasured` metrics (name -> what it needs)."""
        for rule in (watch.rule for watch in self._watches):
            if rule.metric in unmeasured:
                raise ValueError(
                    f"stop_when: {rule.text!r} watches {rule.metric}, which needs {unmeasured[rule.metric]}"
                )

    @property
    def rolls_back(self) -> bool:
        """Whether any rule may roll back to an earlier checkpoint."""
        return any(watch.rule.rollback for watch in self._watches)

    @property
    def bad_since(self) -> int | None:
        """The first step since which a rule that rolls back is true: good checkpoints are older; None without one."""
        steps = [watch.since for watch in self._watches if watch.rule.rollback and watch.since is not None]
        return min(steps, default=None)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, by the rules' texts: a rule that is added on resume starts without state."""
        return {watch.rule.text: {"start": watch.start, "since": watch.since} for watch in self._watches}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for watch in self._watches:
            known = state.get(watch.rule.text, {})
            watch.start, watch.since = known.get("start"), known.get("since")
