"""Report the metrics of `evaluate_heads` as short aligned tables and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..report.fit import fit_rows, fit_sentence
from ..report.words import accuracy_cells, aligned, count, few_prompts
from .scored_pairs import SINGLE, Pairs
from .statistics import Bin, Interval, normalised_margin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGER = "longer response"  # a baseline that prefers the longer response


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format the dictionary of `evaluate_heads` as text of about 30 lines.

    `metrics["data"]` may hold the counts of `load_pairs`.
    """
    m = metrics
    opening = [f"{count(m['pairs'], 'pair')}, {count(m['prompts'], 'prompt')}, {count(m['heads'], 'head')}"]
    if m["excluded"]:
        opening.append(f"left out, for rewards that are not finite: {m['excluded']}")
    opening += [_dropped("data", m.get("data", {})), _dropped("foreign", m.get("foreign_data", {}))]
    opening.append(few_prompts(m["prompts"]))
    rows = [["", "accuracy, %", "95 % interval", "margin", "coverage / std²"]]
    for name, found in m["accuracy"].items():
        margin = f"{m['margin'][name]['mean']:.2f} ± {m['margin'][name]['std']:.2f}"
        area = "" if name == LONGER else f"{m['coverage'][name]['normalised_area']:.2f}"  # a length has no coverage
        rows.append([name, *accuracy_cells(found), margin, area])
    blocks = ["\n".join(filter(None, opening)), aligned(rows)]
    differences = {name: found for name, found in m["difference"].items() if not name.endswith(f" - {LONGER}")}
    if differences:
        rows = [["accuracy, paired", "points", "95 % interval"]]
        rows += [[name, *accuracy_cells(found, sign=True)] for name, found in differences.items()]
        blocks.append(aligned(rows))
    blocks.append(aligned(_signal_rows(m)))
    if m["distance"] is not None:
        rows = [["distance (1: 95 % of reference responses)", "median", "95 %", "beyond 1"]]
        for name, found in m["distance"].items():
            rows.append([name, f"{found['median']:.2f}", f"{found['p95']:.2f}", f"{100 * found['beyond']:.1f} %"])
        blocks.append(aligned(rows))
    if m["scoring"] is not None:
        rows = [["given scores", "under-scored", "rank correlation"]]
        for name, found in m["scoring"]["scorers"].items():
            rows.append([name, f"{100 * found['under']:.1f} %", _number(found["rank_correlation"])])
        blocks.append(aligned(rows))
    if m.get("fit") and m["fit"]["curve"]:
        blocks.append(aligned(fit_rows(m["fit"])))
    closing = [fit_sentence(m["fit"])] if "fit" in m else []
    if m["heads"] > 1:
        shares = ", ".join(f"{100 * share:.0f} %" for share in m["head_summary"]["nominal_share"])
        off = _off_diagonal(m["head_summary"]["correlation"]["margin"])
        closing.append(f"heads: correlation of margins {_number(off)} on average; nominal on {shares} of responses")
    if m["features"] is not None:
        norm = m["features"]["norm"]
        closing.append(
            f"features: effective rank {_number(m['features']['effective_rank'], 1)} of {m['features']['width']} "
            f"({m['features']['effective_rank_rows']} rows), norm {norm['mean']:.3g} ± {norm['std']:.2g}"
        )
    if closing:
        blocks.append("\n".join(closing))
    return "\n\n".join(blocks)


def _dropped(key: str, counts: Mapping[str, int]) -> str:
    """Say in one line what `load_pairs` left out of the data that the config key `key` names; "" if nothing."""
    names = {
        "bad_rows": "broken rows",
        "duplicates": "duplicates",
        "equal": "equal responses",
        "below_gap": "below the score gap",
    }
    found = [f"{name} {counts[key]}" for key, name in names.items() if counts.get(key)]
    return f"{key}: left out of {counts['rows']} rows: {', '.join(found)}" if found else ""


def _signal_rows(m: Mapping[str, Any]) -> list[list[str]]:
    own_or_foreign = m["signals"]["own_or_foreign"]
    first = m["signals"]["right_or_wrong"]
    targets = list(first["small margin"])
    rows = [["AUROC (0.5: chance)", *(f"{target} wrong" for target in targets)]]
    if own_or_foreign is not None:
        rows[0].append("data foreign")
    for name, found in first.items():
        if found is None:
            continue
        row = [name, *(_auroc(found[target]) for target in targets)]
        if own_or_foreign is not None:
            row.append(_auroc(own_or_foreign[name]))
        rows.append(row)
    if own_or_foreign is not None and "distance" in own_or_foreign:
        rows.append(["distance", *["-"] * len(targets), _auroc(own_or_foreign["distance"])])
    return rows


def _auroc(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['value']:.2f}{interval}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _off_diagonal(matrix: Sequence[Sequence[float | None]]) -> float | None:
    values = [x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j and x is not None]
    return sum(values) / len(values) if values else None


def draw(
    folder: Path,
    metrics: Mapping[str, Any],
    pairs: Pairs,
    compare: Mapping[str, tuple[Tensor, Tensor]],
    foreign: Pairs | None,
    sources: Tensor | None,
) -> list[Path]:
    """Write the pictures to `folder`, each atomically; return their paths.

    sources: [P] int64, the groups in which margins are standardised (`metrics.source_labels`), as in the metrics.
    """
    from . import pictures

    rewards = _rewards(pairs, compare)
    right_or_wrong = metrics["signals"]["right_or_wrong"]
    first = SINGLE if pairs.num_heads == 1 else "nominal"
    bins = {
        name: [Bin(**{**row, "accuracy": Interval(**row["accuracy"])}) for row in rows]
        for name, rows in metrics["reliability"].items()
        if rows is not None and len(rows) > 1
    }
    accuracy = {
        name: Interval(found["value"], found["low"], found["high"]) for name, found in metrics["accuracy"].items()
    }
    figures: dict[str, Figure] = {
        "accuracy": pictures.accuracy(accuracy),
        "margin": pictures.margins({name: normalised_margin(*pair, sources) for name, pair in rewards.items()}),
        "coverage": pictures.coverage(rewards),
    }
    if bins:
        auroc = {name: Interval(**found[first]) for name, found in right_or_wrong.items() if found is not None}
        figures["reliability"] = pictures.reliability(bins, auroc=auroc)
    if pairs.num_heads > 1:
        matrices = metrics["head_summary"]["correlation"]
        figures["head_correlation"] = pictures.head_correlation(
            {f"{name}s": matrix for name, matrix in matrices.items()}
        )
    if metrics["scoring"] is not None:
        under = {name: found["under"] for name, found in metrics["scoring"]["scorers"].items() if name != LONGER}
        figures["scoring"] = pictures.scoring(under)
    if foreign is not None and pairs.num_heads > 1:
        samples = {"this data": pairs.foreignness()["std"], "foreign data": foreign.foreignness()["std"]}
        figures["std"] = pictures.std_histogram(samples)
    if metrics.get("fit") and metrics["fit"]["curve"]:
        figures["fit"] = pictures.penalties(metrics["fit"]["curve"], metrics["fit"]["l2"])
    return [pictures.save_png(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _rewards(pairs: Pairs, compare: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    chosen, rejected = pairs.scorers(pairs.chosen, heads=False), pairs.scorers(pairs.rejected, heads=False)
    return {name: (chosen[name], rejected[name]) for name in chosen} | dict(compare)
