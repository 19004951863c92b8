"""Run `prudent demo`: from a real language model to a report on what a price on distance protects from."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine import EnsembleRewardModel, Scorer
from ...engine.likelihood import special_ids
from ...engine.trust import LEAST_ROWS
from ..data.pairs import (
    PairData,
    PreferencePair,
    both_sides,
    load_pairs,
    names_of_sides,
    readable_pairs,
    split_by_prompt,
    text_reader,
)
from ..evaluation.metrics import evaluate_heads
from ..evaluation.statistics import group_labels
from ..job.config import load_config
from ..job.files import atomic_write_json, atomic_write_text, read_json
from ..job.folder import has_run_files, locked_folder, open_run_folder
from ..job.log import RunLog
from ..models.embedded import embedded_model, wheel_folder
from ..models.features import compute_features
from ..models.loading import load_language_model, load_tokenizer, weights_without_bars
from ..report import style as plot_style
from ..sampling.labelled_pairs import GoldPairs, make_pairs
from ..sampling.prompts import read_prompts
from ..sampling.stored import Request, Rollout, sample
from ..sampling.tokens import Sampling
from . import attack, distances, report
from . import ppo as demo_ppo
from .candidates import SPREAD, Candidates, Policies, read_candidates
from .config import DemoConfig
from .judges import CAREFUL, judged_candidates, judges_of, proxies_of, tensor_of
from .machine import estimate, number_type
from .rewards import SINGLE, TRUST, Fitted, Reference, fit_rewards, rewards_of, save_rewards, taps_of

STAGES = ("the language model", "responses", "preference pairs", "rewards", "evaluation", "PPO", "report")
_RUN_FILES = ("samples.jsonl", "features", "checkpoints", "metrics.json")
_HELD_OUT_PAIRS = 40  # per held-out prompt: with 64 prompts an accuracy is measured to about 2 %
_DRAWN_PAIRS = 120  # per training prompt, of which `pairs` are kept


@dataclass(frozen=True)
class DemoResult:
    """folder: the run folder. metrics: the content of metrics.json. str(): the closing table and the report's path."""

    folder: Path
    metrics: dict[str, Any]

    def __str__(self) -> str:
        return report.table(self.metrics) + f"\n\nreport: {self.folder / 'report.html'}"


def run_demo(config: DemoConfig, *, progress: bool = True) -> DemoResult:
    """Sample, label, train, evaluate, report. An interrupted run is continued.

    The run folder: config.yaml (resolved), samples.jsonl, features/, foreign/, pairs.jsonl and held_out.jsonl (as
    `prudent train` and `prudent eval` read them), metrics.jsonl (training), checkpoints/, model/ (the single head with
    its trust region) and ensemble/ (BRME's heads), both with the tokeniser, ppo/single and ppo/trust (run folders of
    `prudent ppo`, with the trained policies' responses in judged/), report.html, and metrics.json (written last).

    Raises:
        ValueError: for prompts, pairs or a model that cannot be used; for an output folder that holds another run.
        ImportError: naming the extra to install.
    """
    config = config.model_copy(update={"dtype": number_type(config.dtype)})
    done = config.output / "metrics.json"
    with locked_folder(config.output):
        _refuse_other_version(config.output)
        if open_run_folder(config, _RUN_FILES) and done.exists():
            return DemoResult(config.output, read_json(done))
        plot_style.require_matplotlib()  # refuse before minutes of work
        if config.model is None:
            wheel_folder()
        with RunLog(config.output) as log, weights_without_bars():
            return DemoResult(config.output, _Run(config, log, progress).go())


def _refuse_other_version(folder: Path) -> None:
    """Raise ValueError for a run whose config.yaml this version cannot read."""
    saved = folder / "config.yaml"
    if not (saved.exists() and has_run_files(folder, _RUN_FILES)):
        return
    try:
        load_config(DemoConfig, saved)
    except ValueError as error:
        raise ValueError(
            f"output: expected a new folder or one of this version's demo, got {folder} of another version or job "
            f"({error}): choose another folder"
        ) from None


class _Run:
    """One start of a run; `go` does the work that earlier starts have not finished."""

    def __init__(self, config: DemoConfig, log: RunLog, progress: bool) -> None:
        self.config, self.log, self.progress = config, log, progress
        self.folder = config.output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds: dict[str, float] = {}
        self.model: Any = None
        self.tokenizer: Any = None

    def go(self) -> dict[str, Any]:
        """Run all seven stages; return the metrics."""
        config = self.config
        # read first, to refuse a broken file before a model is loaded
        prompts = [] if config.preferences else read_prompts(config.prompts, config.held_out_prompts)
        data = (
            load_pairs(
                config.preferences,
                limit=config.limit,
                skip_bad_rows=config.skip_bad_rows,
                progress=self.progress,
                key="preferences",
            )
            if config.preferences
            else None
        )
        with self._stage(0):
            self._load_model()
            if data is None and self.progress:
                tqdm.write(estimate(self.model, self.tokenizer, prompts, config), file=sys.stderr)
        metrics, page = self._with_gold(prompts) if data is None else self._with_preferences(data)
        with self._stage(6):
            metrics["seconds"] = dict(self.seconds)
            atomic_write_text(self.folder / "report.html", report.render(self.config, metrics, page))
        metrics["seconds"] = dict(self.seconds)
        atomic_write_json(self.folder / "metrics.json", metrics)  # last: it marks the run as finished
        return metrics

    @contextmanager
    def _stage(self, number: int) -> Iterator[None]:
        if self.progress:
            tqdm.write(f"[{number + 1}/{len(STAGES)}] {STAGES[number]}", file=sys.stderr)
        start = time.monotonic()
        yield
        self.seconds[STAGES[number]] = round(time.monotonic() - start, 1)

    def _load_model(self) -> None:
        self.source = str(embedded_model()) if self.config.model is None else self.config.model
        self.tokenizer = load_tokenizer("model", self.source)
        model = load_language_model("model", self.source, getattr(torch, self.config.dtype))
        self.model = model.to(self.device).eval()
        self.taps = taps_of(self.model, self.config.features)

    @property
    def _sampling(self) -> Sampling:
        config = self.config
        return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)

    # sampled responses, labelled by a judge

    def _with_gold(self, prompts: list[str]) -> tuple[dict[str, Any], report.Page]:
        config = self.config
        held = sorted(random.Random(config.seed).sample(range(len(prompts)), config.held_out_prompts))
        training = [i for i in range(len(prompts)) if i not in set(held)]
        with self._stage(1):
            rollouts = self._sample(prompts, held)
            candidates = self._candidates([rollouts[i] for i in held])
        with self._stage(2):
            judges = judges_of([rollouts[i] for i in training])
            gold = {name: [tensor_of(judge, r.prompt, r.responses) for r in rollouts] for name, judge in judges.items()}
            drawn = {name: [self._pairs(gold[name], training, draw) for draw in range(config.draws)] for name in judges}
            test = make_pairs(gold[CAREFUL], held, _HELD_OUT_PAIRS, 0.0, config.seed + 1)
            for name, part, noisy in (("pairs", drawn[CAREFUL][0], True), ("held_out", test, False)):
                rows = part.rows(rollouts, gold[CAREFUL], noisy)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                atomic_write_text(self.folder / f"{name}.jsonl", "".join(lines))
        with self._stage(3):
            sizes = torch.tensor([len(rollouts[i].responses) for i in training])
            features = torch.cat([rollouts[i].features for i in training])
            reference = Reference.fit(features, torch.tensor(training).repeat_interleave(sizes), self.taps)
            sides = test.features(rollouts, False)
            fitted = self._fit_all(drawn, rollouts, reference, sides)
        with self._stage(4):
            first = fitted[CAREFUL][0]
            metrics = self._accuracy(first, sides, test.prompt)
            metrics["counts"] = _counts(prompts, rollouts, drawn[CAREFUL][0], test)
            metrics["choice"] = first.choice
            judged = {name: judged_candidates(judge, candidates) for name, judge in judges.items()}
            proxies = {
                name: [proxies_of(one, candidates, config.price) for one in all_] for name, all_ in fitted.items()
            }
            metrics["attacks"] = {
                name: {
                    pool: attack.as_dict(attack.curves(proxies[name], judged[name], rows))
                    for pool, rows in candidates.pools.items()
                }
                for name in judges
            }
            metrics["findings"] = attack.findings(metrics["attacks"], config.foreign)
            metrics["foreign_picks"] = report.foreign_picks(candidates, proxies[CAREFUL][0])
            metrics["gold"] = {"name": judges[CAREFUL].name, "meaning": judges[CAREFUL].meaning}
        policies = self._ppo(candidates.prompts)
        metrics["distances"] = distances.distance_rows(distances.measure(first, reference, candidates, policies))
        metrics["ppo"], said = None, []
        own = judged[CAREFUL][:, : config.best_of]
        if policies is not None:
            metrics["ppo"] = demo_ppo.as_dict(policies, own, judges[CAREFUL], first, self.folder)
            said = demo_ppo.samples(policies, [rollouts[i] for i in held], first)
        shown = report.examples(first.ensemble, [rollouts[i] for i in held], own)
        far = distances.of_candidates(first, candidates)
        shown["picks"] = report.picks(candidates, proxies[CAREFUL][0], far, judged[CAREFUL])
        return metrics, report.Page(shown, said)

    def _candidates(self, rollouts: list[Rollout]) -> Candidates:
        config = self.config
        return read_candidates(
            self.model,
            self.tokenizer,
            rollouts,
            config.foreign,
            self.taps,
            self.folder / "foreign",
            seed=config.seed,
            progress=self.progress,
        )

    def _pairs(self, gold: list[Tensor], training: list[int], draw: int) -> GoldPairs:
        config = self.config
        seed = config.seed + 1000 * draw
        return make_pairs(gold, training, _DRAWN_PAIRS, config.label_noise, seed, at_most=config.pairs)

    def _fit_all(
        self,
        drawn: dict[str, list[GoldPairs]],
        rollouts: list[Rollout],
        reference: Reference,
        held_out: tuple[Tensor, Tensor],
    ) -> dict[str, list[Fitted]]:
        """The rewards of every judge and draw; the careful judge's first are saved, and their training logged."""
        found: dict[str, list[Fitted]] = {name: [] for name in drawn}
        for name, parts in drawn.items():
            for draw, part in enumerate(parts):
                kept = (name, draw) == (CAREFUL, 0)
                one = self._fit(part.features(rollouts, True), part.prompt, reference, draw, held_out if kept else None)
                found[name].append(one)
        self._save(found[CAREFUL][0])
        return found

    def _fit(
        self,
        sides: tuple[Tensor, Tensor],
        prompts: Sequence[int],
        reference: Reference,
        draw: int,
        held_out: tuple[Tensor, Tensor] | None,
    ) -> Fitted:
        """Both rewards of one draw; with held-out pairs their training is shown, logged, and resumed after a kill."""
        kept = held_out is not None
        return fit_rewards(
            *sides,
            prompts,
            reference,
            self.config.brme,
            seed=self.config.seed + draw,
            held_out=held_out,
            checkpoints=self.folder / "checkpoints" if kept else None,
            log=self.log if kept else None,
            progress=self.progress and kept,
        )

    def _ppo(self, prompts: list[str]) -> Policies | None:
        """Run PPO with both rewards, on prompts on which no head was trained; None if ppo.steps is 0."""
        config = self.config
        if config.ppo.steps == 0:
            return None
        with self._stage(5):
            dtype: Literal["float32", "bfloat16"] = "bfloat16" if config.dtype == "bfloat16" else "float32"
            self.model = None  # each PPO run loads its own
            start = demo_ppo.Start(self.source, dtype, self._sampling, config.seed, config.batch_rows)
            return demo_ppo.run_arms(config.ppo, start, self.folder, prompts, config.price, self.taps, self.progress)

    def _sample(self, prompts: list[str], held: list[int]) -> list[Rollout]:
        config = self.config
        requests = [
            Request(prompt, config.best_of if i in set(held) else config.samples_per_prompt)
            for i, prompt in enumerate(prompts)
        ]
        return sample(
            self.model,
            self.tokenizer,
            requests,
            self.folder,
            self._sampling,
            seed=config.seed,
            batch_rows=config.batch_rows,
            spread=SPREAD,
            taps=self.taps,
            progress=self.progress,
        )

    # given preferences

    def _with_preferences(self, data: PairData) -> tuple[dict[str, Any], report.Page]:
        config = self.config
        readers = [text_reader(self.tokenizer)]
        (pairs,) = readable_pairs(
            [data.pairs], readers, data.counts, skip_bad_rows=config.skip_bad_rows, key="preferences"
        )
        train, held = split_by_prompt(pairs, config.eval_fraction, config.seed)
        if 2 * len(train) < LEAST_ROWS:
            raise ValueError(
                f"preferences: expected at least {LEAST_ROWS // 2} pairs to train on, for a trust region of their "
                f"{LEAST_ROWS} responses, got {len(train)} beside {len(held)} that are held out"
            )
        with self._stage(1):
            chosen, rejected = self._features(train + held)
        with self._stage(2):
            sizes = {"pairs": len(train), "held_out_pairs": len(held)}
            sizes |= {name: data.counts[name] for name in ("prompts", "bad_rows")}
        with self._stage(3):
            cut = len(train)
            labels = group_labels(pair.prompt_key for pair in train)
            reference = Reference.fit(torch.cat([chosen[:cut], rejected[:cut]]), torch.cat([labels, labels]), self.taps)
            test = (chosen[cut:], rejected[cut:])
            fitted = self._fit((chosen[:cut], rejected[:cut]), labels.tolist(), reference, 0, test)
            self._save(fitted)
        with self._stage(4):
            prompts = group_labels(pair.prompt_key for pair in held)
            metrics = self._accuracy(fitted, test, prompts.tolist())
            metrics["counts"], metrics["choice"] = sizes, fitted.choice
            metrics["attacks"] = metrics["findings"] = metrics["gold"] = metrics["ppo"] = None
            metrics["distances"] = distances.distance_rows(
                distances.of_pairs(fitted, reference, torch.cat(test), torch.cat([prompts, prompts]))
            )
        return metrics, report.Page(report.pair_examples(fitted.ensemble, held, test))

    def _features(self, pairs: list[PreferencePair]) -> tuple[Tensor, Tensor]:
        skips = special_ids(self.tokenizer)
        model = EnsembleRewardModel.from_trunk(self.model, taps=self.taps, logprob_skips=skips)
        scorer = Scorer(model, self.tokenizer, progress=False)
        folder = self.folder / "features"
        both = compute_features(scorer, both_sides(pairs), folder, self.progress, names_of_sides(pairs)).features
        return both[: len(pairs)], both[len(pairs) :]

    # both

    def _save(self, fitted: Fitted) -> None:
        save_rewards(fitted, self.folder, self.model, self.tokenizer, self.taps, self.config.price)

    def _accuracy(self, fitted: Fitted, held_out: tuple[Tensor, Tensor], prompts: Sequence[int]) -> dict[str, Any]:
        """Evaluate on the held-out pairs, by their true labels."""
        sides = [side.float() for side in held_out]
        rewards = [rewards_of(fitted, side, self.config.price) for side in sides]
        with torch.no_grad():
            chosen, rejected = (fitted.ensemble(side, aggregation="mean") for side in sides)
        found = evaluate_heads(
            chosen,
            rejected,
            std_ref=fitted.ensemble.std_ref,
            prompts=prompts,
            compare={name: (rewards[0][name], rewards[1][name]) for name in (SINGLE, TRUST)},
            features=(sides[0], sides[1]),
        )
        return {"pairs": found}


def _counts(prompts: list[str], rollouts: list[Rollout], pairs: GoldPairs, test: GoldPairs) -> dict[str, int]:
    return {
        "prompts": len(prompts),
        "responses": sum(len(rollout.responses) for rollout in rollouts),
        "stopped": sum(sum(rollout.stopped) for rollout in rollouts),
        "pairs": len(pairs.better),
        "flipped": int(pairs.flipped.sum()),
        "held_out_pairs": len(test.better),
        "held_out_ties": test.ties,
    }
