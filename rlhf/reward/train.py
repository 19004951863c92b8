"""The job behind `prudent train`: preference pairs to a pessimistic reward model, in two stages, as one run folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine import EnsembleHead, EnsembleRewardModel, Scorer, calibrate
from ...kernels import Aggregation
from ..data.pairs import PreferencePair, load_pairs, split_by_prompt
from ..evaluation.statistics import hidden_norms, pair_correct
from ..job.files import atomic_folder, atomic_write_json, read_json
from ..job.folder import locked_folder
from ..job.log import RunLog
from ..models.adapter import save_head
from ..models.features import compute_features
from ..models.loading import load_reward_model, load_tokenizer, load_trunk
from .config import TrainConfig, refuse_unread
from .fit import FitConfig, PairFeatures
from .losses import partition
from .outcome import TrainResult, open_folder
from .pet.stage import PETStage
from .start import check_given, load_reward, load_stage1
from .trunk import train_trunk
from .two_stage import fit_two_stages, preference_probability

__all__ = ["TrainConfig", "TrainResult", "run_train"]

_CALIBRATION_PAIRS = 2000  # a mean and a std to about 1.6 %; where features must be computed anew for it


def run_train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Train a reward model on preference pairs.

    The run folder (`config.output`): config.yaml (resolved), data.json (counts), metrics.jsonl, tensorboard/,
    features/, checkpoints/, stage1/ (the single-head model: its reward differences are Bradley-Terry logits), model/
    (the final model, calibrated on training features, with its tokeniser), adapter/ (mode lora: the final model's LoRA,
    unmerged, and its heads: `reward_adapter`), train.json (final metrics; written last). Stage pet adds reference/ (the
    samples it is pessimistic against) and, of an ensemble trained in this run, start/ (what it was before); its model/
    keeps the calibration of what it started from, so that rewards before and after have one unit.

    Args:
        config: see `TrainConfig`.
        resume: go on where a killed run stopped; a run folder that is not there yet is begun.
        progress: show progress bars on stderr.

    Raises:
        ValueError: for data or a config that cannot be used, a key that the mode does not read included; for an output
            folder that holds another run or anything else, or in which another process trains; for a loss that is not
            finite.
        OSError: for a file that cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train: expected one process, got a launcher's several: the run folder has one writer")
    refuse_unread(config, _mode(config))
    with locked_folder(config.output):
        finished = open_folder(config, resume)
        if finished is not None:
            return TrainResult(config.output, finished, finished_before=True)
        with RunLog(config.output) as log:
            return TrainResult(config.output, _Run(config, log, resume, progress).go())


def _mode(config: TrainConfig) -> str:
    """What `auto` is on this machine: head on a CPU and for stage pet, else lora on a GPU."""
    if config.mode != "auto":
        return config.mode
    return "lora" if torch.cuda.is_available() and config.stage != "pet" else "head"


class _Run:
    """One training run: data, model and folder; `go` does what is not done yet."""

    def __init__(self, config: TrainConfig, log: RunLog, resume: bool, progress: bool) -> None:
        self.config, self.log, self.resume, self.progress = config, log, resume, progress
        self.folder = config.output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.mode = _mode(config)
        check_given(config, self.mode)
        given = ("model", config.model) if config.stage1 is None else ("stage1", config.stage1)
        reward = ("model", config.model) if config.start is None else ("pet.start", config.start)
        self.tokenizers = {"stage1": load_tokenizer(*given), "model": load_tokenizer(*reward)}
        self.tokenizers["start"] = self.tokenizers["model"]
        seeds = {"bt": config.seed + config.bt.seed, "brme": config.seed + config.brme.seed}
        self.bt: FitConfig = config.bt.model_copy(update={"seed": seeds["bt"]})
        self.brme: FitConfig = config.brme.model_copy(update={"seed": seeds["brme"]})
        data = load_pairs(
            config.data,
            min_score_gap=config.min_score_gap,
            skip_bad_rows=config.skip_bad_rows,
            limit=config.limit,
            progress=progress,
        )
        self.train, self.held_out = split_by_prompt(data.pairs, config.eval_fraction, config.seed)
        if config.supervised == "brme":
            Aggregation.parse(config.aggregation).check_heads(config.brme.num_heads)
            if config.brme.num_heads > len(self.train):
                raise ValueError(
                    f"brme.num_heads: expected at most the {len(self.train)} training pairs, "
                    f"got {config.brme.num_heads}"
                )
        self.pet: dict[str, Any] = {}
        self.dropped = {name: data.counts[name] for name in ("bad_rows", "duplicates", "equal", "below_gap")}
        self._write_counts(data.counts)

    def _write_counts(self, counts: dict[str, int]) -> None:
        digest = hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:16]
        summary = {
            "data": self.config.data,
            "fingerprint": digest,
            **counts,
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.held_out),
            "held_out_prompts": len({pair.prompt_key for pair in self.held_out}),
        }
        path = self.folder / "data.json"
        if path.exists() and read_json(path).get("fingerprint") != digest:
            raise ValueError(
                f"data: {self.config.data} has changed since {self.folder} was begun: choose another folder"
            )
        atomic_write_json(path, summary)

    def go(self) -> dict[str, Any]:
        """Every stage, the saved models and the final metrics."""
        scored = self._frozen() if self.mode == "head" else self._trained()
        metrics = {
            "mode": self.mode,
            "train_pairs": len(self.train),
            "held_out_pairs": len(self.held_out),
            "dropped": self.dropped,
            "accuracy": self._accuracies(scored) if self.held_out else {},
            **self.pet,
        }
        atomic_write_json(self.folder / "train.json", metrics)
        return metrics

    # mode head

    def _frozen(self) -> dict[str, _Scored]:
        """The trunk frozen: every stage on its features, each text computed once."""
        config, scored = self.config, {}
        model = self._first_model()
        chosen, rejected = self._features("model", model, self.train)
        held = self._features("model", model, self.held_out) if self.held_out else None
        self.log.metrics(0, hidden_norms(chosen, rejected), prefix="features/train")
        if held is not None:
            self.log.metrics(0, hidden_norms(*held), prefix="features/eval")
        evaluation = None if held is None else PairFeatures(*held, None, self._margins(self.held_out))
        data = PairFeatures(chosen, rejected, None, self._margins(self.train))
        final = model.score
        if config.supervised is not None:
            heads = fit_two_stages(
                data,
                config.bt,
                config.brme if config.supervised == "brme" else None,
                seed=config.seed,
                stage1=None if config.stage1 is None else model.score,
                evaluation=evaluation,
                aggregation=config.aggregation,
                on_stage1=lambda head: self._save("stage1", model, head),
                checkpoints=self.folder / "checkpoints",
                log=self.log,
                progress=self.progress,
            )
            scored["single"] = _Scored(heads.single, held)
            final = heads.final
            final = final.frozen_copy()
            calibrate(final, torch.cat([chosen, rejected]))
        if config.stage == "pet":
            if config.supervised == "brme":
                self._save("start", model, final)
            scored["start"] = _Scored(final, held)
            margins = (self._margins(self.train), self._margins(self.held_out))
            scorer, stage = self._scorer("model", model), self._pet_stage(final)
            final, self.pet["pet"] = stage.heads(scorer, final, (chosen, rejected), held, margins)
        self._save("model", model, final)
        return {**scored, "final": _Scored(final, held)}

    def _first_model(self) -> EnsembleRewardModel:
        """What the run begins with: a bare trunk, or a reward model that was given."""
        config = self.config
        if config.start is not None:
            return self._placed(load_reward("pet.start", config.start, config).requires_grad_(False))
        return self._load(1) if config.stage1 is None else self._placed(load_stage1(config))

    def _pet_stage(self, start: EnsembleHead) -> PETStage:
        config = self.config
        aggregation = "mean" if start.num_heads == 1 else config.aggregation
        Aggregation.parse(aggregation).check_heads(start.num_heads)
        seed = config.seed + config.pet.seed
        return PETStage(config, seed, aggregation, self.train, self.held_out, self.log, self.progress, self.device)

    def _margins(self, pairs: list[PreferencePair]) -> Tensor | None:
        margins = _margins(pairs)
        return None if margins is None else margins.to(self.device)

    # modes lora and full

    def _trained(self) -> dict[str, _Scored]:
        """The trunk trained in each stage, both from the base model as in the paper ("we train a single-head RM and a
        5-head BRME starting from" it): stage 1 stays a model of its own, and p_hat is the only thing handed over."""
        stage1 = self._saved("stage1")
        if stage1 is None:
            if self.config.stage1 is None:
                stage1 = self._train_stage(self.bt, (None, None))
            else:
                stage1 = self._placed(load_stage1(self.config))
            self._save("stage1", stage1, stage1.score)
        single = _Scored(stage1.score, self._features("stage1", stage1, self.held_out) if self.held_out else None)
        model = self._saved("model")
        if model is None:
            model = stage1
            if self.config.stage == "brme":
                p_hat = preference_probability(stage1.score, *self._features("stage1", stage1, self.train))
                held_p = None if single.features is None else preference_probability(stage1.score, *single.features)
                del stage1, model  # the memory of one trunk at a time
                model = self._train_stage(self.brme, (p_hat, held_p))
            model.score = model.score.frozen_copy()
            calibrate(model.score, torch.cat(self._features("model", model, self.train[:_CALIBRATION_PAIRS])))
            self._save("model", model, model.score)
        self._save_adapter(model)
        held = self._features("model", model, self.held_out) if self.held_out else None
        return {"single": single, "final": _Scored(model.score, held)}

    def _saved(self, name: str) -> EnsembleRewardModel | None:
        """A finished stage's model, if it is there."""
        folder = self.folder / name
        return self._placed(load_reward_model("output", str(folder))) if folder.exists() else None

    def _train_stage(self, losses: FitConfig, p_hat: tuple[Tensor | None, Tensor | None]) -> EnsembleRewardModel:
        model = self._load(losses.num_heads, losses)
        scorer = self._scorer("model", model)
        heads = partition(len(self.train), losses.num_heads, losses.seed).tolist()
        return train_trunk(
            model,
            _rows(scorer, self.train, heads, p_hat[0], self.progress),
            _rows(scorer, self.held_out, [0] * len(self.held_out), p_hat[1], self.progress),
            losses,
            self.config.trunk,
            "lora" if self.mode == "lora" else "full",
            self.folder / "checkpoints" / losses.stage,
            log=self.log,
            resume=self.resume,
            progress=self.progress,
        )

    # both

    def _load(self, num_heads: int, losses: FitConfig | None = None) -> EnsembleRewardModel:
        config = self.config
        dtype = "float32" if config.dtype == "auto" and self.mode == "full" else config.dtype
        torch.manual_seed(config.seed if losses is None else losses.seed)
        model = load_trunk(
            "model",
            config.model,
            num_heads=num_heads,
            aggregation="mean" if num_heads == 1 else config.aggregation,
            std_floor=None if losses is None else losses.std_floor,
            append_eos=config.append_eos,
            max_score_length=config.max_length,
            dtype=dtype,
        )
        return self._placed(model)

    def _placed(self, model: Any) -> EnsembleRewardModel:
        placed: EnsembleRewardModel = model.to(self.device).eval()
        return placed

    def _scorer(self, name: str, model: EnsembleRewardModel) -> Scorer:
        """Reads what the model in the folder `name` reads: config.max_length if given, else what is saved with it."""
        config, tokenizer = self.config, self.tokenizers[name]
        return Scorer(model, tokenizer, batch_tokens=config.batch_tokens, max_length=config.max_length, progress=False)

    def _features(
        self, name: str, model: EnsembleRewardModel, pairs: Sequence[PreferencePair]
    ) -> tuple[Tensor, Tensor]:
        """Features of chosen and of rejected, [P, D] each, on the model's device."""
        items = [pair.items() for pair in pairs]
        texts = [chosen for chosen, _ in items] + [rejected for _, rejected in items]
        names = [f"{_name(pair, i)}, {side}" for side in ("chosen", "rejected") for i, pair in enumerate(pairs)]
        folder = self.config.features or self.folder / "features"
        found = compute_features(self._scorer(name, model), texts, folder, self.progress, names)
        features = found.features.to(self.device)
        return features[: len(pairs)], features[len(pairs) :]

    def _save(self, name: str, model: EnsembleRewardModel, head: EnsembleHead) -> None:
        target = self.folder / name
        if target.exists():
            return
        whole = EnsembleRewardModel.from_trunk(
            model.model,
            head=head,
            pooling=model.config.pooling,
            append_eos=model.config.append_eos,
            max_score_length=model.config.max_score_length,
        )
        with atomic_folder(target) as folder:
            whole.save_pretrained(folder)
            self.tokenizers[name].save_pretrained(folder)

    def _save_adapter(self, model: EnsembleRewardModel) -> None:
        """The final stage's LoRA with its calibrated heads, for a policy on the same trunk."""
        target, trained = self.folder / "adapter", self.folder / "checkpoints" / self.config.stage / "adapter"
        if target.exists() or not trained.exists():  # a stage 1 that was given has no LoRA here
            return
        with atomic_folder(target) as folder:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
            save_head(model.score, folder, append_eos=model.config.append_eos)
            self.tokenizers["model"].save_pretrained(folder)

    def _accuracies(self, scored: dict[str, _Scored]) -> dict[str, float]:
        result = {"single head (stage 1)": scored["single"].accuracy("mean")} if "single" in scored else {}
        heads = scored["final"].head.num_heads
        names = ("nominal", "mean", "min", self.config.aggregation) if heads > 1 else ("mean",)
        labels = {"min": "worst", "mean": "mean of heads"} if heads > 1 else {"mean": "single head"}
        for name in dict.fromkeys(names):
            label = labels.get(name, name)
            if self.config.stage == "pet":
                if heads > 1 or "single" not in scored:
                    result[f"{label}, before PET"] = scored["start"].accuracy(name)
                result[f"{label}, after PET"] = scored["final"].accuracy(name)
            elif heads > 1:
                result[label] = scored["final"].accuracy(name)
        return result


@dataclass(frozen=True)
class _Scored:
    """A head and the features of the held-out pairs."""

    head: EnsembleHead
    features: tuple[Tensor, Tensor] | None

    @torch.no_grad()
    def accuracy(self, aggregation: str) -> float:
        assert self.features is not None
        # centring each side on its own would move one against the other
        chosen, rejected = (self.head(side, aggregation=aggregation, centre="none").reward for side in self.features)
        return float(pair_correct(chosen, rejected).double().mean())


def _margins(pairs: list[PreferencePair]) -> Tensor | None:
    """[P] margins; a pair without one among pairs with has margin 0. None if no pair has one."""
    if all(pair.margin is None for pair in pairs):
        return None
    return torch.tensor([pair.margin or 0.0 for pair in pairs])


def _name(pair: PreferencePair, index: int) -> str:
    return pair.where or f"pair {index}"


def _rows(
    scorer: Scorer, pairs: list[PreferencePair], heads: list[int], p_hat: Tensor | None, progress: bool
) -> list[dict[str, Any]]:
    """Tokenised pairs as `collate` takes them."""
    margins = _margins(pairs)
    rows = []
    bar = tqdm(pairs, desc="tokenising", unit="pair", delay=1, disable=not progress)
    for i, (pair, head) in enumerate(zip(bar, heads, strict=True)):
        chosen, rejected = pair.items()
        rows.append(
            {
                "chosen": scorer.encode(chosen, f"{_name(pair, i)}, chosen"),
                "rejected": scorer.encode(rejected, f"{_name(pair, i)}, rejected"),
                "head": head,
                "p_hat": None if p_hat is None else float(p_hat[i]),
                "margin": None if margins is None or p_hat is not None else float(margins[i]),
            }
        )
    return rows
