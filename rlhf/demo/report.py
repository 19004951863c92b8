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
from ..evaluation.statistics import Bin, Interval
from ..job.log import read_metrics
from ..report.fit import fit_sentence
from ..report.page import render_page
from ..report.words import accuracy_cells, aligned, few_prompts, interval, plain_text, signed, verdict
from ..sampling.stored import Rollout
from . import pictures as own_pictures
from .candidates import MIXTURE, OWN, Candidates
from .distances import HELD_OUT, TRAINING
from .distances import table_rows as distance_table
from .ppo import ARMS
from .ppo import table_rows as table_of_runs
from .rewards import ENSEMBLE, SINGLE, TITLES, TRUST

REWARDS = (SINGLE, ENSEMBLE, TRUST)
SIGNALS = {
    "std": "predicted std of the nominal head",
    "disagreement": "disagreement of the heads",
    "small margin": "small margin",
}
_WIDTH, _MARGIN = 420, 14  # pixels of the strip that shows a response's heads


class Page(NamedTuple):
    """The parts of the page besides the metrics.

    examples: {"strips": responses with their heads, "picks": foreign candidates that the single head picked}.
    policies: responses before and after PPO (empty without PPO).
    """

    examples: dict[str, Any]
    policies: Sequence[Mapping[str, Any]] = ()


def examples(ensemble: EnsembleHead, rollouts: Sequence[Rollout], gold: Tensor) -> dict[str, Any]:
    """Responses to held-out prompts on which the heads agree and disagree most.

    rollouts: P prompts with N responses; gold [P, N].
    """
    prompts, samples = gold.shape
    with torch.no_grad():
        heads = ensemble(torch.cat([rollout.features for rollout in rollouts]).float(), aggregation="mean")
    texts = [(rollout.prompt, response) for rollout in rollouts for response in rollout.responses]
    strips = [
        _strip(heads, i, prompt=texts[i][0], response=texts[i][1], gold=float(gold.flatten()[i]))
        for i in _extremes(heads.mean, [i // samples for i in range(prompts * samples)])
    ]
    return {"strips": _scaled(strips), "picks": []}


def picks(
    candidates: Candidates, rewards: Mapping[str, Tensor], distance: Tensor, gold: Tensor, count: int = 3
) -> list[dict[str, Any]]:
    """The first prompts at which the single head picked a foreign candidate of the mixture: every reward's pick there.

    rewards: name -> [P, N + A], of one draw.   distance, gold: [P, N + A].
    """
    pool = candidates.pools[MIXTURE]
    found: list[dict[str, Any]] = []
    for p, prompt in enumerate(candidates.prompts):
        chosen = {name: int(pool[int(values[p, pool].argmax())]) for name, values in rewards.items()}
        if not candidates.kinds[p][chosen[SINGLE]] or len(found) == count:
            continue
        by_response: dict[int, list[str]] = {}
        for name, i in chosen.items():
            by_response.setdefault(i, []).append(TITLES[name])
        rows = [
            {
                "rewards": names,
                "response": candidates.texts[p][i],
                "kind": candidates.kinds[p][i],
                "distance": float(distance[p, i]),
                "single": float(rewards[SINGLE][p, i]),
                "trust": float(rewards[TRUST][p, i]),
                "gold": float(gold[p, i]),
            }
            for i, names in by_response.items()
        ]
        found.append({"prompt": prompt, "rows": rows})
    return found


def foreign_picks(candidates: Candidates, rewards: Mapping[str, Tensor]) -> dict[str, int]:
    """At how many prompts each reward picks a foreign candidate of the whole mixture."""
    pool = candidates.pools[MIXTURE]
    return {
        name: sum(bool(candidates.kinds[p][int(pool[int(row[pool].argmax())])]) for p, row in enumerate(values))
        for name, values in rewards.items()
    }


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


def _extremes(mean: Tensor, prompt: Sequence[int], count: int = 2) -> list[int]:
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
    """The closing tables of the terminal, each with what it shows."""
    text = [aligned(table_rows(metrics))]
    if not metrics["attacks"]:
        return "\n".join([*text, "", "Given preferences have no judge, so there is no best-of-n and no PPO."])
    text += ["", *metrics["findings"]]
    if metrics["ppo"]:
        text += ["", aligned(table_of_runs(metrics["ppo"])), "", metrics["ppo"]["findings"][0]]
    return "\n".join(text)


def table_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a row for each reward: accuracy on pairs, and the gold of its picks, as text."""
    accuracy, attacks = metrics["pairs"]["accuracy"], (metrics["attacks"] or {}).get("careful")
    rows = [["reward used", "pair accuracy, %", "95 % interval"]]
    if attacks:
        last = attacks[OWN]["n"][-1]
        rows[0] += ["gold, n=1", f"own, n={last}", f"mixture, n={last}", "foreign picks"]
    for name in (*REWARDS, "oracle") if attacks else REWARDS:
        cells = ["", ""] if name == "oracle" else accuracy_cells(accuracy[name])
        if attacks:
            own, mixed = (attacks[pool]["scorers"][name] for pool in (OWN, MIXTURE))
            cells += [f"{row['value']:+.3f}" for row in (own[0], own[-1], mixed[-1])]
            picked = metrics["foreign_picks"].get(name)
            cells.append("" if picked is None else f"{picked} of {attacks[OWN]['prompts']}")
        rows.append([TITLES[name], *cells])
    return rows


def comparison_rows(attacks: Mapping[str, Any]) -> list[list[str]]:
    """A header, then the trust region's gold at the largest n less each other reward's, by judge and pool."""
    rows = [["judge, candidates", *(f"trust region minus {TITLES[name]}" for name in (SINGLE, ENSEMBLE))]]
    for judge, pools in attacks.items():
        for pool, found in pools.items():
            title = f"{JUDGES[judge]}, {POOLS[pool]}, n={found['n'][-1]}"
            rows.append([title, *(signed(_values(row), 3) for row in found["comparisons"].values())])
    return rows


JUDGES = {"careful": "careful judge", "vader": "VADER"}
POOLS = {OWN: "the model's own", MIXTURE: "mixture"}


def accuracy_rows(pairs: Mapping[str, Any]) -> list[list[str]]:
    """A header, then each reward's accuracy minus the single head's, paired, and the interval's verdict."""
    rows = [["pair accuracy minus the tuned single head's", "points", "95 % interval", ""]]
    gap = pairs["difference"].get(f"{ENSEMBLE} - {SINGLE}")
    if gap is not None:
        rows.append([TITLES[ENSEMBLE], *accuracy_cells(gap, sign=True), verdict(_values(gap))])
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


def _values(found: Mapping[str, Any]) -> tuple[float | None, ...]:
    return found["value"], found["low"], found["high"]


def _figures(metrics: Mapping[str, Any], folder: Path) -> dict[str, str]:
    pairs = metrics["pairs"]
    kept = {name: Interval(*(pairs["accuracy"][name][k] for k in Interval._fields)) for name in REWARDS}
    bins = {
        name: [Bin(**{**row, "accuracy": Interval(**row["accuracy"])}) for row in rows]
        for name, rows in pairs["reliability"].items()
    }
    auroc = {name: Interval(**found["nominal"]) for name, found in pairs["signals"]["right_or_wrong"].items()}
    policies = [row["kind"] for row in metrics["distances"] if row["kind"].startswith("PPO")]
    own = (TRAINING, HELD_OUT, "read again")
    figures = {
        "accuracy": pictures.accuracy({TITLES[name]: value for name, value in kept.items()}),
        "reliability": pictures.reliability(bins, auroc=auroc),
        "distances": own_pictures.distances(metrics["distances"], own, policies),
    }
    if metrics["choice"]["curve"]:
        figures["fit"] = pictures.penalties(metrics["choice"]["curve"], metrics["choice"]["l2"])
    losses = ("step", "brme/loss", "brme/eval_loss", "brme/std")
    history = [{k: v for k, v in row.items() if k in losses} for row in read_metrics(folder)]
    if any(len(row) > 1 for row in history):
        figures["training"] = pictures.training_curves(history)
    for judge, pools in (metrics["attacks"] or {}).items():
        titles = {pool: _panel(pool, found) for pool, found in pools.items()}
        figures[f"gold_{judge}"] = own_pictures.gold_against_n(
            {titles[pool]: found for pool, found in pools.items()},
            {name: TITLES[name] for name in REWARDS},
            f"gold reward ({JUDGES[judge]})",
        )
    if metrics["ppo"]:
        runs = {TITLES[reward]: read_metrics(folder / "ppo" / name) for name, reward in ARMS.items()}
        figures["ppo"] = own_pictures.steps(runs, "gold reward (careful judge)")
    return {name: pictures.to_svg(figure) for name, figure in figures.items()}


def _panel(pool: str, found: Mapping[str, Any]) -> str:
    return f"{found['n'][-1]} of the model's own" if pool == OWN else f"{found['n'][-1]}, some of them foreign"


def render(config: Any, metrics: Mapping[str, Any], page: Page) -> str:
    """Render the report as HTML. `config`: the run's DemoConfig."""
    attacks = metrics["attacks"]
    return render_page(
        "demo_template.html",
        config=config,
        metrics=metrics,
        counts=metrics["counts"],
        attacks=attacks,
        gold=metrics["gold"],
        table=table_rows(metrics),
        comparisons=comparison_rows(attacks) if attacks else [],
        figures=_figures(metrics, config.output),
        ppo=None if not metrics["ppo"] else {"table": table_of_runs(metrics["ppo"]), **metrics["ppo"]},
        policies=page.policies,
        fit=fit_sentence(metrics["choice"]),
        distances=distance_table(metrics["distances"]),
        accuracy_rows=accuracy_rows(metrics["pairs"]),
        signal_rows=signal_rows(metrics["pairs"]),
        few_prompts=few_prompts(metrics["pairs"]["prompts"]),
        strips=page.examples["strips"],
        picks=page.examples["picks"],
        settings=config.model_dump(mode="json"),
        model="SmolLM2-135M-Instruct" if config.model is None else config.model,
        heads=metrics["pairs"]["heads"],
    )
