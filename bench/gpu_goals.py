"""The goals of a GPU run, and the verdicts on a run's JSON. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"
_LOGITS = 4 * 16384 * 128256  # bytes of the [T, V] fp32 tensor that linear_logprob avoids

Row = Mapping[str, Any]  # one case of a report's "rows"; `kernels` and `device_us` if they were counted


def _ratio(variant: str) -> Callable[[Row], float | None]:
    """The variant's time over ours."""

    def read(row: Row) -> float | None:
        found: float | None = row.get("ratio", {}).get(variant)
        return found

    return read


def _over(variant: str) -> Callable[[Row], float | None]:
    """Our time over the variant's."""

    def read(row: Row) -> float | None:
        ratio = _ratio(variant)(row)
        return 1 / ratio if ratio else None

    return read


def _kept_over(variant: str) -> Callable[[Row], float | None]:
    """Our time with all numerators kept over the variant's."""

    def read(row: Row) -> float | None:
        kept, other = _ratio("ours kept")(row), _ratio(variant)(row)
        return kept / other if kept and other else None

    return read


def _memory(row: Row) -> float | None:
    extra = row.get("memory", {}).get("ours")
    return None if extra is None else extra / _LOGITS


class Goal(NamedTuple):
    """`quantity` of the benchmark case named `case` (bench/cases.py) must be at least, or at most, `limit`. `variant`:
    the variant that the quantity compares with, if any.
    """

    claim: str
    case: str
    quantity: Callable[[Row], float | None]
    at_least: bool
    limit: float
    unit: str  # "%", "x", "us" or "" for a count
    variant: str = ""

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def text(self, value: float) -> str:
        number = {"%": f"{100 * value:.1f} %", "x": f"{value:.2f}x", "us": f"{value:.1f} µs"}
        return number.get(self.unit, f"{value:.0f}")


def _share(row: Row) -> float | None:
    return row.get("bandwidth_share")


_NORM = "ensemble_reward, forward, norm, 65536 x 4096, bf16"
_PLAIN = "ensemble_reward, forward, 65536 x 4096, bf16"
BACKWARD = "ensemble_reward, backward, norm, 65536 x 4096, bf16"
LAST = "ensemble_reward, last tokens, norm, 256 x 1024 x 4096, bf16"
_LOGPROB = "linear_logprob, forward + backward, 16384 x 4096 x 128256, bf16"
_SHORT = "linear_logprob, forward + backward, 4096 x 4096 x 128256, bf16"
_FROZEN = "linear_logprob, forward + backward, frozen head, 4096 x 4096 x 128256, bf16"


def _slower(claim: str, case: str, variant: str, limit: float) -> Goal:
    """The variant takes at least `limit` times our time."""
    return Goal(claim, case, _ratio(variant), True, limit, "x", variant)


def _no_slower(claim: str, case: str, variant: str, limit: float) -> Goal:
    """We take at most `limit` times the variant's time."""
    return Goal(claim, case, _over(variant), False, limit, "x", variant)


# on an H200, as ratios in one run; the first one's case is timed first
GOALS = (
    Goal("forward with norm: share of the measured read bandwidth", _NORM, _share, True, 0.90, "%"),
    _slower("forward with norm: torch.compile takes", _NORM, "compiled", 3),
    _slower("forward with norm: torch.compile with max-autotune takes", _NORM, "autotuned", 3),
    _slower("forward with norm: eager takes", _NORM, "eager", 8),
    Goal("forward without norm: share of the measured read bandwidth", _PLAIN, _share, True, 0.90, "%"),
    Goal("backward: share of the measured read bandwidth at the bytes' floor", BACKWARD, _share, True, 0.85, "%"),
    Goal("256 last tokens: launches", LAST, lambda row: row.get("kernels"), False, 1, ""),
    Goal("256 last tokens: device time", LAST, lambda row: row.get("device_us"), False, 12, "us"),
    _slower("256 last tokens: eager takes", LAST, "eager", 8),
    Goal("linear_logprob: extra peak memory over the [T, V] fp32 tensor", _LOGPROB, _memory, False, 0.02, "%"),
    _no_slower("linear_logprob: our time over the unfused forward + backward", _LOGPROB, "eager", 1.15),
    _no_slower("linear_logprob: our time over liger-kernel", _LOGPROB, "liger", 1),
    _no_slower("linear_logprob: our time over cut-cross-entropy without its filter", _LOGPROB, "cce", 1),
    _no_slower("linear_logprob: our time over verl's op, which has the entropy too", _LOGPROB, "verl", 1),
    _no_slower("linear_logprob, T = 4096: our time over QuACK", _SHORT, "quack", 1),
    Goal(
        "linear_logprob, T = 4096, numerators kept: our time over QuACK",
        _SHORT, _kept_over("quack"), False, 1, "x", "quack",
    ),
    _no_slower("linear_logprob, T = 4096, frozen head: our time over QuACK", _FROZEN, "quack", 1),
)  # fmt: skip


def goal_cases(goals: Sequence[Goal] = GOALS) -> list[str]:
    """The names of the goals' cases, each once, in order."""
    return list(dict.fromkeys(goal.case for goal in goals))


def verdicts(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[dict[str, str]]:
    """Each goal's claim, its limit, the measured value, and "holds", "does not hold" or "not measured"."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for goal in goals:
        row = by_name.get(goal.case)
        value = None if row is None else goal.quantity(row)
        asked = ("at least " if goal.at_least else "at most ") + goal.text(goal.limit)
        verdict = NOT_MEASURED if value is None else "holds" if goal.holds(value) else "does not hold"
        measured = NOT_MEASURED if value is None else goal.text(value)
        found.append({"claim": goal.claim, "asked": asked, "measured": measured, "verdict": verdict})
    return found


def goals_table(found: Sequence[Mapping[str, str]]) -> str:
    """The verdicts as Markdown."""
    lines = ["| goal | asked | measured | verdict |", "| --- | --- | --- | --- |"]
    lines += [f"| {v['claim']} | {v['asked']} | {v['measured']} | {v['verdict']} |" for v in found]
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The short report: machine, stages, goals, and every timed case."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    title = "GPU check" + (" (dry: on a CPU, nothing here is a GPU's number)" if report["dry"] else "")
    where = machine.get("name", "unknown machine")
    lines = [
        f"# {title}",
        "",
        f"{report['started']}, {where}, commit {report['commit']}, {versions or 'versions unknown'}.",
        "",
        "| stage | result | seconds | |",
        "| --- | --- | --- | --- |",
    ]
    for name, stage in report["stages"].items():
        lines.append(f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {'; '.join(stage['notes'])} |")
    if machine.get("bandwidth"):
        lines += ["", f"Measured read bandwidth: {machine['bandwidth'] / 1e9:.0f} GB/s."]
    lines += ["", goals_table(report["goals"])]
    if report["rows"]:
        lines += [
            "",
            "| case | ours, device | host | graph replay | share of read | others over ours | extra memory |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_case_line(row) for row in report["rows"]]
        notes = [f"- {row['name']}: {note}" for row in report["rows"] if row["timings"] for note in row["notes"]]
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _case_line(row: Row) -> str:
    timing = row.get("timings", {}).get("ours")
    if timing is None:
        check = row.get("check")
        failed = check is not None and not check["passed"]
        return f"| {row['name']} | {'check failed' if failed else NOT_MEASURED} | | | | {'; '.join(row['notes'])} | |"
    share, memory = row.get("bandwidth_share"), row.get("memory", {}).get("ours")
    others = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items() if value is not None)
    cells = (
        row["name"],
        f"{1e6 * timing['median']:.1f} µs",
        *(f"{1e6 * of['ours']:.1f} µs" if "ours" in of else "" for of in (row.get("host", {}), row.get("graph", {}))),
        NOT_MEASURED if share is None else f"{100 * share:.1f} %",
        others,
        "" if memory is None else f"{memory / 2**20:.1f} MiB",
    )
    return f"| {' | '.join(cells)} |"
