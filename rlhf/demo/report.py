"""Report the demo's outcome: tables for the terminal, and one HTML page without external files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine import EnsembleHead
from ...kernels import EnsembleOutput
from ..data.pairs import PreferencePair
from ..evaluation import pictures
from ..evaluation.best_of_n import REFERENCES, SCORERS, SINGLE, TITLES, BestOfN, Study, findings
from ..evaluation.statistics import Bin, Interval
from ..job.log import read_metrics
from ..ppo.watch.pictures import over_optimisation
from ..report.fit import fit_sentence
from ..report.page import render_page
from ..report.words import accuracy_cells, aligned, few_prompts, interval, plain_text, signed, verdict
from ..sampling.stored import Rollout
from .ppo import table_rows as table_of_runs

SIGNALS = {
    "std": "predicted std of the nominal head",
    "disagreement": "disagreement of the heads",
    "small margin": "small margin",
}
_WIDTH, _MARGIN = 420, 14  # pixels of the strip that shows a response's heads


class Page(NamedTuple):
    """The parts of the page besides the metrics: the best-of-n study (None without gold), example responses with their
    heads, and the PPO runs as `demo.ppo.page` describes them (None without PPO)."""

    study: Study | None
    examples: dict[str, Any]
    ppo: dict[str, Any] | None = None


def study_as_dict(result: Study) -> dict[str, Any]:
    """The study as JSON: n, kl, each scorer's curves, comparisons, trends, findings."""

    def column(values: Tensor) -> list[float | None]:
        return [x if x == x else None for x in values.tolist()]

    def curve(values: BestOfN) -> dict[str, Any]:
        return {name: column(getattr(values, name)) for name in ("proxy", "gold", "gold_se")}

    return {
        "prompts": result.oracle.gold_per_prompt.shape[0],
        "n": result.oracle.n.tolist(),
        "kl": column(result.oracle.kl),
        "scorers": {name: curve(values) for name, values in result.curves.items()} | {"oracle": curve(result.oracle)},
        "comparisons": [
            {"scorer": c.scorer, "against": c.against, "n": c.n, **c.difference._asdict(), "verdict": c.verdict}
            for c in result.comparisons
        ],
        "trends": [
            {"scorer": t.scorer, "first": t.first, "last": t.last, **t.difference._asdict(), "verdict": t.verdict}
            for t in result.trends
        ],
        "findings": findings(result),
    }


def examples(
    ensemble: EnsembleHead, rollouts: Sequence[Rollout], gold: Tensor, rewards: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Example responses to held-out prompts: where the heads agree and disagree most, and what each scorer picks.

    rollouts: P prompts with N responses; gold [P, N]; rewards: scorer -> [P * N].
    """
    prompts, samples = gold.shape
    with torch.no_grad():
        heads = ensemble(torch.cat([rollout.features for rollout in rollouts]), aggregation="mean")
    texts = [(rollout.prompt, response) for rollout in rollouts for response in rollout.responses]
    strips = [
        _strip(heads, i, prompt=texts[i][0], response=texts[i][1], gold=float(gold.flatten()[i]))
        for i in _extremes(heads.mean, [i // samples for i in range(prompts * samples)])
    ]
    picks = []
    for p in range(min(4, prompts)):  # the first four, not selected
        chosen = {name: int(values.view(prompts, samples)[p].argmax()) for name, values in rewards.items()}
        chosen["oracle"] = int(gold[p].argmax())
        by_response: dict[int, list[str]] = {}
        for name, i in chosen.items():
            by_response.setdefault(i, []).append(TITLES[name])
        rows = [
            {"scorers": names, "response": rollouts[p].responses[i], "gold": float(gold[p, i])}
            for i, names in by_response.items()
        ]
        picks.append({"prompt": rollouts[p].prompt, "rows": rows})
    return {"strips": _scaled(strips), "picks": picks}


def pair_examples(
    ensemble: EnsembleHead, pairs: Sequence[PreferencePair], features: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Like `examples`, for given held-out pairs: chosen responses on which the heads agree and disagree most."""
    with torch.no_grad():
        heads = ensemble(features[0], aggregation="mean")
    keys: dict[str, int] = {}
    labels = [keys.setdefault(pair.prompt_key, len(keys)) for pair in pairs]
    rows = [
        _strip(heads, i, prompt=plain_text(pairs[i].prompt), response=plain_text(pairs[i].chosen), gold=None)
        for i in _extremes(heads.mean, labels)
    ]
    return {"strips": _scaled(rows), "picks": []}


def _extremes(mean: Tensor, prompt: Sequence[int], count: int = 3) -> list[int]:
    """Numbers of the `count` rows with the least spread over heads, then of the `count` with the most, each of another
    prompt."""
    order = mean.std(dim=1, correction=0).argsort().tolist()
    result: list[int] = []
    for rows in (order, order[::-1]):
        seen: set[int] = set()
        for row in rows:
            if prompt[row] not in seen and len(seen) < count:
                seen.add(prompt[row])
                result.append(row)
    return result


def _strip(heads: EnsembleOutput, row: int, **text: Any) -> dict[str, Any]:
    mean, std = heads.mean[row].tolist(), heads.std[row].tolist()
    nominal, worst = std.index(min(std)), mean.index(min(mean))
    return {
        **text,
        "mean": mean,
        "std": std,
        "nominal": nominal,
        "worst": worst,
        "average": sum(mean) / len(mean),
        "tradeoff": 0.4 * mean[nominal] + 0.6 * mean[worst],
        "spread": float(heads.mean[row].std(correction=0)),
    }


def _scaled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the pixel positions of every strip on one common axis."""
    low = min(m - s for row in rows for m, s in zip(row["mean"], row["std"], strict=True))
    high = max(m + s for row in rows for m, s in zip(row["mean"], row["std"], strict=True))
    scale = (_WIDTH - 2 * _MARGIN) / ((high - low) or 1.0)

    def x(value: float) -> float:
        return float(round(_MARGIN + (value - low) * scale, 1))

    for row in rows:
        row["heads"] = [
            {"x": x(m), "from": x(m - s), "to": x(m + s), "nominal": k == row["nominal"], "worst": k == row["worst"]}
            for k, (m, s) in enumerate(zip(row["mean"], row["std"], strict=True))
        ]
        row["tradeoff_x"], row["average_x"] = x(row["tradeoff"]), x(row["average"])
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e9) if (high - low) / s <= 9)
    first = int(-(-low // step))
    ticks = [{"x": x(i * step), "label": f"{i * step:g}"} for i in range(first, int(high // step) + 1)]
    return {"rows": rows, "ticks": ticks, "width": _WIDTH, "agree": len(rows) // 2}


def table(metrics: Mapping[str, Any]) -> str:
    """The closing tables of the terminal, each with its headline."""
    curves = metrics["best_of_n"]
    no_gold = "Given preferences have no gold scorer, so there is no best-of-n and no PPO."
    text = [aligned(table_rows(metrics)), "", curves["findings"][0] if curves else no_gold]
    if metrics.get("ppo"):
        text += ["", aligned(table_of_runs(metrics["ppo"])), "", metrics["ppo"]["findings"][0]]
    return "\n".join(text)


def table_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a row for each reward: accuracy on pairs, and the gold reward of its picks at three n; as text."""
    accuracy, noisy = metrics["pairs"]["accuracy"], metrics.get("noisy_accuracy")
    curves = metrics["best_of_n"]
    places = sorted({0, len(curves["n"]) // 2, len(curves["n"]) - 1}) if curves else []
    rows = [["reward used", "pair accuracy, %", "95 % interval"]]
    rows[0] += ["noisy labels, %"] if noisy else []
    rows[0] += [f"gold, n={curves['n'][i]}" for i in places]
    for name in (*SCORERS, "oracle") if curves else SCORERS:
        cells = ["", ""] if name == "oracle" else accuracy_cells(accuracy[name])
        if noisy:
            cells.append("" if name == "oracle" else accuracy_cells(noisy[name])[0])
        rows.append([TITLES[name], *cells, *(f"{curves['scorers'][name]['gold'][i]:+.3f}" for i in places)])
    return rows


def accuracy_rows(pairs: Mapping[str, Any]) -> list[list[str]]:
    """A header, then each aggregation's accuracy minus the single head's, paired, and the interval's verdict."""
    rows = [["pair accuracy minus the single head's", "points", "95 % interval", ""]]
    for name in SCORERS[1:]:
        gap = pairs["difference"].get(f"{name} - {SINGLE}")
        if gap is not None:
            rows.append([TITLES[name], *accuracy_cells(gap, sign=True), verdict(_values(gap))])
    return rows


def signal_rows(pairs: Mapping[str, Any]) -> list[list[str]]:
    """A header, then each signal's AUROC for errors of the nominal reward, and the interval's verdict."""
    rows = [["signal of an error", "AUROC", "95 % interval", ""]]
    words = ("higher on errors", "lower on errors: misleading", "not shown to differ from chance, 0.5")
    for signal, targets in pairs["signals"]["right_or_wrong"].items():
        found = (targets or {}).get("nominal")
        if found is not None and found["value"] is not None:
            shown = verdict(_values(found), *words, reference=0.5)
            rows.append([SIGNALS[signal], f"{found['value']:.2f}", interval(_values(found)), shown])
    return rows


def best_of_n_rows(curves: Mapping[str, Any]) -> list[list[str]]:
    """A header, then each reward's gold at the largest n minus both references', and its change over the last n."""
    gaps = {(row["scorer"], row["against"]): signed(_values(row), 3) for row in curves["comparisons"]}
    trend = curves["trends"][0]
    head = [f"gold reward at n={trend['last']}", *(f"minus {TITLES[r]}" for r in REFERENCES)]
    rows = [[*head, f"minus its own at n={trend['first']}"]]
    for row in curves["trends"]:
        cells = [gaps.get((row["scorer"], reference), "") for reference in REFERENCES]
        rows.append([TITLES[row["scorer"]], *cells, signed(_values(row), 3)])
    return rows


def _values(found: Mapping[str, Any]) -> tuple[float | None, ...]:
    return found["value"], found["low"], found["high"]


def _figures(metrics: Mapping[str, Any], page: Page, folder: Path) -> dict[str, str]:
    pairs = metrics["pairs"]
    kept = {name: Interval(*(pairs["accuracy"][name][k] for k in Interval._fields)) for name in SCORERS}
    bins = {
        name: [Bin(**{**row, "accuracy": Interval(**row["accuracy"])}) for row in rows]
        for name, rows in pairs["reliability"].items()
    }
    auroc = {name: Interval(**found["nominal"]) for name, found in pairs["signals"]["right_or_wrong"].items()}
    figures = {
        "accuracy": pictures.accuracy({TITLES[name]: value for name, value in kept.items()}),
        "reliability": pictures.reliability(bins, auroc=auroc),
    }
    if metrics.get("fit") and metrics["fit"]["curve"]:
        figures["fit"] = pictures.penalties(metrics["fit"]["curve"], metrics["fit"]["l2"])
    losses = ("step", "bt/loss", "bt/eval_loss", "brme/loss", "brme/eval_loss", "brme/std")
    history = [{k: v for k, v in row.items() if k in losses} for row in read_metrics(folder)]
    if any(len(row) > 1 for row in history):
        figures["training"] = pictures.training_curves(history)
    if page.study is not None:
        curves = {TITLES[name]: curve for name, curve in page.study.curves.items()}
        figures["best_of_n"] = pictures.best_of_n(curves, gold_label=f"gold reward ({metrics['gold']['name']})")
    if page.ppo is not None:
        figures["ppo"] = over_optimisation(page.ppo["rows"], gold_label=f"gold reward ({metrics['gold']['name']})")
    return {name: pictures.to_svg(figure) for name, figure in figures.items()}


def render(config: Any, metrics: Mapping[str, Any], page: Page) -> str:
    """Render the report as HTML. `config`: the run's DemoConfig."""
    return render_page(
        "demo_template.html",
        config=config,
        metrics=metrics,
        counts=metrics["counts"],
        curves=metrics["best_of_n"],
        gold=metrics["gold"],
        table=table_rows(metrics),
        figures=_figures(metrics, page, config.output),
        ppo=page.ppo,
        accuracy_rows=accuracy_rows(metrics["pairs"]),
        signal_rows=signal_rows(metrics["pairs"]),
        best_of_n_rows=best_of_n_rows(metrics["best_of_n"]) if metrics["best_of_n"] else [],
        fit=fit_sentence(metrics["fit"]) if "fit" in metrics else "",
        few_prompts=few_prompts(metrics["pairs"]["prompts"]),
        strips=page.examples["strips"],
        picks=page.examples["picks"],
        settings=config.model_dump(mode="json"),
        model="SmolLM2-135M-Instruct" if config.model is None else config.model,
        heads=metrics["pairs"]["heads"],
    )
