"""Run `prudent demo`: from a real language model to a report on what a pessimistic ensemble gains."""

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

from ...engine import EnsembleHead, EnsembleRewardModel, Scorer, calibrate
from ..data.gold import VaderGold
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
from ..evaluation.best_of_n import SINGLE, rewards, study
from ..evaluation.metrics import evaluate_heads
from ..evaluation.statistics import group_labels, pair_accuracy
from ..job.files import atomic_folder, atomic_write_json, atomic_write_text, read_json
from ..job.folder import locked_folder, open_run_folder
from ..job.log import RunLog
from ..models.embedded import embedded_model, wheel_folder
from ..models.features import compute_features
from ..models.loading import load_language_model, load_tokenizer
from ..report import style as plot_style
from ..report.fit import FIT_FILE
from ..reward.convex import RidgeFit
from ..reward.fit import PairFeatures
from ..reward.two_stage import fit_two_stages
from ..sampling.labelled_pairs import GoldPairs, make_pairs
from ..sampling.prompts import read_prompts
from ..sampling.stored import Request, Rollout, sample
from ..sampling.tokens import Sampling
from . import ppo as demo_ppo
from . import report
from .config import DemoConfig

STAGES = ("the language model", "responses", "preference pairs", "reward heads", "evaluation", "PPO", "report")
_HELD_OUT_PAIRS = 40  # per held-out prompt: with 32 prompts an accuracy is measured to about 2 %


@dataclass(frozen=True)
class DemoResult:
    """folder: the run folder. metrics: the content of metrics.json. str(): the closing table and the report's path."""

    folder: Path
    metrics: dict[str, Any]

    def __str__(self) -> str:
        return report.table(self.metrics) + f"\n\nreport: {self.folder / 'report.html'}"


def run_demo(config: DemoConfig, *, progress: bool = True) -> DemoResult:
    """Sample, label, train, evaluate, report. An interrupted run is continued.

    The run folder: config.yaml (resolved), samples.jsonl, features/, pairs.jsonl and held_out.jsonl (as `prudent train`
    and `prudent eval` read them), metrics.jsonl (training), checkpoints/, single/ (stage 1) and model/ (the ensemble,
    calibrated), both with the tokeniser, ppo/single and ppo/ensemble (run folders of `prudent ppo`), report.html, and
    metrics.json (written last).

    Raises:
        ValueError: for prompts, pairs or a model that cannot be used; for an output folder that holds another run.
        ImportError: naming the extra to install.
    """
    config = config.model_copy(update={"dtype": _dtype(config.dtype)})
    done = config.output / "metrics.json"
    with locked_folder(config.output):
        if open_run_folder(config, ("samples.jsonl", "features", "checkpoints", "metrics.json")) and done.exists():
            return DemoResult(config.output, read_json(done))
        plot_style.require_matplotlib()  # refuse before minutes of work
        if config.model is None:
            wheel_folder()
        with RunLog(config.output) as log:
            return DemoResult(config.output, _Run(config, log, progress).go())


def _dtype(dtype: Literal["auto", "float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """bfloat16 if the hardware multiplies it; a CPU that does not is slower in it than in float32."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


class _Run:
    """One start of a run; `go` does the work that earlier starts have not finished."""

    def __init__(self, config: DemoConfig, log: RunLog, progress: bool) -> None:
        self.config, self.log, self.progress = config, log, progress
        self.folder = config.output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds: dict[str, float] = {}
        self.model: Any = None
        self.tokenizer: Any = None
        self.fit: dict[str, Any] | None = None  # how the single head's penalty was chosen, if it was

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
        metrics, page = self._with_gold(prompts) if data is None else self._with_preferences(data)
        if self.fit is not None:
            metrics["fit"] = self.fit
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

    # sampled responses, labelled by gold

    def _with_gold(self, prompts: list[str]) -> tuple[dict[str, Any], report.Page]:
        config = self.config
        gold_scorer = VaderGold()
        held = sorted(random.Random(config.seed).sample(range(len(prompts)), config.held_out_prompts))
        with self._stage(1):
            rollouts = self._sample(prompts, held)
        with self._stage(2):
            gold = [torch.tensor(gold_scorer(rollout.responses), dtype=torch.float64) for rollout in rollouts]
            training = [i for i in range(len(prompts)) if i not in set(held)]
            pairs = make_pairs(gold, training, config.pairs_per_prompt, config.label_noise, config.seed)
            test = make_pairs(gold, held, _HELD_OUT_PAIRS, config.label_noise, config.seed + 1)
            for name, part, noisy in (("pairs", pairs, True), ("held_out", test, False)):
                rows = part.rows(rollouts, gold, noisy)
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                atomic_write_text(self.folder / f"{name}.jsonl", "".join(lines))
        with self._stage(3):
            reference = torch.cat([rollouts[i].features for i in training])
            training_pairs = PairFeatures(*pairs.features(rollouts, True), prompts=torch.tensor(pairs.prompt))
            single, ensemble = self._train(training_pairs, test.features(rollouts, False), reference)
        with self._stage(4):
            metrics = self._accuracy(single, ensemble, test.features(rollouts, False), test.prompt, test.flipped)
            metrics["counts"] = _counts(prompts, rollouts, pairs, test)
            held_gold = torch.stack([gold[i] for i in held])
            features = torch.stack([rollouts[i].features for i in held])
            flat = rewards(single, ensemble, features.flatten(0, 1))
            result = study({name: value.view(len(held), -1) for name, value in flat.items()}, held_gold)
            metrics["best_of_n"] = report.study_as_dict(result)
            metrics["gold"] = {"name": gold_scorer.name, "meaning": gold_scorer.meaning}
            shown = report.examples(ensemble, [rollouts[i] for i in held], held_gold, flat)
        metrics["ppo"] = self._ppo([prompts[i] for i in held])
        runs = None if metrics["ppo"] is None else demo_ppo.page(self.folder, metrics["ppo"])
        return metrics, report.Page(result, shown, runs)

    def _ppo(self, prompts: list[str]) -> dict[str, Any] | None:
        """Run PPO with both rewards, on prompts on which no head was trained; None if ppo.steps is 0."""
        config = self.config
        if config.ppo.steps == 0:
            return None
        with self._stage(5):
            dtype: Literal["float32", "bfloat16"] = "bfloat16" if config.dtype == "bfloat16" else "float32"
            self.model = None  # each PPO run loads its own
            start = demo_ppo.Start(self.source, dtype, config.temperature, config.seed)
            return demo_ppo.run_arms(config.ppo, start, self.folder, prompts, self.progress)

    def _sample(self, prompts: list[str], held: list[int]) -> list[Rollout]:
        config = self.config
        requests = [
            Request(prompt, config.best_of if i in set(held) else config.samples_per_prompt)
            for i, prompt in enumerate(prompts)
        ]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
        return sample(
            self.model,
            self.tokenizer,
            requests,
            self.folder,
            sampling,
            seed=config.seed,
            batch_rows=config.batch_rows,
            taps=config.features,
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
        with self._stage(1):
            chosen, rejected = self._features(train + held)
        with self._stage(2):
            sizes = {"pairs": len(train), "held_out_pairs": len(held)}
            sizes |= {name: data.counts[name] for name in ("prompts", "bad_rows")}
        with self._stage(3):
            cut = len(train)
            reference = torch.cat([chosen[:cut], rejected[:cut]])
            test = (chosen[cut:], rejected[cut:])
            labels = group_labels(pair.prompt_key for pair in train)
            single, ensemble = self._train(PairFeatures(chosen[:cut], rejected[:cut], prompts=labels), test, reference)
        with self._stage(4):
            prompts = group_labels(pair.prompt_key for pair in held).tolist()
            metrics = self._accuracy(single, ensemble, test, prompts, None)
            metrics["counts"] = sizes
            metrics["best_of_n"] = metrics["gold"] = metrics["ppo"] = None
        return metrics, report.Page(None, report.pair_examples(ensemble, held, test), None)

    def _features(self, pairs: list[PreferencePair]) -> tuple[Tensor, Tensor]:
        model = EnsembleRewardModel.from_trunk(self.model, taps=self.config.features)
        scorer = Scorer(model, self.tokenizer, progress=False)
        folder = self.folder / "features"
        both = compute_features(scorer, both_sides(pairs), folder, self.progress, names_of_sides(pairs)).features
        return both[: len(pairs)], both[len(pairs) :]

    # both

    def _train(
        self, pairs: PairFeatures, held_out: tuple[Tensor, Tensor], reference: Tensor
    ) -> tuple[EnsembleHead, EnsembleHead]:
        """Train the single head and the ensemble, calibrate both on `reference`, and save them."""
        heads = fit_two_stages(
            pairs,
            self.config.bt,
            self.config.brme,
            seed=self.config.seed,
            evaluation=PairFeatures(*held_out),
            on_fit=self._note_fit,
            checkpoints=self.folder / "checkpoints",
            log=self.log,
            progress=self.progress,
        )
        for name, head in zip(("single", "model"), heads, strict=True):
            calibrate(head, reference)
            self._save(name, head)
        return heads.single, heads.final

    def _note_fit(self, fit: RidgeFit) -> None:
        self.fit = fit.summary()

    def _save(self, name: str, head: EnsembleHead) -> None:
        if (self.folder / name).exists():
            return
        with atomic_folder(self.folder / name) as folder:
            model = EnsembleRewardModel.from_trunk(self.model, head=head, taps=self.config.features)
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if name == "single" and self.fit is not None:
                atomic_write_json(folder / FIT_FILE, self.fit)

    def _accuracy(
        self,
        single: EnsembleHead,
        ensemble: EnsembleHead,
        held_out: tuple[Tensor, Tensor],
        prompts: Sequence[int],
        flipped: Tensor | None,
    ) -> dict[str, Any]:
        """Evaluate on the held-out pairs: `evaluate_heads` on the true labels, and the accuracies on the noisy ones."""
        with torch.no_grad():
            sides = [ensemble(side, aggregation="mean") for side in held_out]
        compared = [rewards(single, ensemble, side) for side in held_out]
        metrics = {
            "pairs": evaluate_heads(
                *sides,
                std_ref=ensemble.std_ref,
                prompts=prompts,
                compare={SINGLE: (compared[0][SINGLE], compared[1][SINGLE])},
                features=held_out,
            )
        }
        if flipped is not None:
            groups = group_labels(prompts)
            noisy = {}
            for name in compared[0]:
                a, b = compared[0][name], compared[1][name]
                chosen, rejected = torch.where(flipped, b, a), torch.where(flipped, a, b)
                noisy[name] = pair_accuracy(chosen, rejected, groups)._asdict()
            metrics["noisy_accuracy"] = noisy
        return metrics


def _counts(prompts: list[str], rollouts: list[Rollout], pairs: GoldPairs, test: GoldPairs) -> dict[str, int]:
    return {
        "prompts": len(prompts),
        "responses": sum(len(rollout.responses) for rollout in rollouts),
        "stopped": sum(sum(rollout.stopped) for rollout in rollouts),
        "pairs": len(pairs.better),
        "flipped": int(pairs.flipped.sum()),
        "ties": pairs.ties,
        "held_out_pairs": len(test.better),
        "held_out_flipped": int(test.flipped.sum()),
        "held_out_ties": test.ties,
    }
