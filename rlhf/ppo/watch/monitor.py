"""Measure and log every step of a PPO run: metrics that give early signs of reward hacking, and sample texts."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...job.files import read_json_lines, repaired_json_lines, writing
from ...job.log import RunLog
from ..batch import Experience, Samples, Scored
from ..config import PPOConfig
from ..losses import chi2_estimate

logger = logging.getLogger(__name__)

RATIOS = {"reward/head_std": "reward/head_std_ratio", "reward/disagreement": "reward/disagreement_ratio"}
_BASELINE = (*RATIOS, "reward/distance")  # metrics whose value on the preference data, or at the start, is kept
TEXTS = 4  # prompts whose responses are logged


def experience_metrics(experience: Scored) -> dict[str, float]:
    """Metrics of one step's samples, named as in metrics.jsonl; NaN if no value is finite.

    reward/gap: mean of nominal - worst. reward/head_std: mean of the heads' stds. reward/disagreement: the (population)
    std of several heads' means on a sample, its mean over samples. reward/distance: mean distance from the responses
    that the reward was fitted to. text/foreign: share of responses beyond 1, the 95 % quantile of those. kl/sequence,
    kl/token: log pi / pi_ref, nats. kl/chi2: sqrt of `chi2_estimate`. text/length: tokens, the stop token included.
    text/truncated: share of responses that reached max_new_tokens.
    """
    kept = torch.isfinite(experience.reward)
    if isinstance(experience, Experience):
        kept &= ~experience.dropped
    mask = experience.mask & kept[:, None]
    tokens = mask.sum().double()
    log_ratio = torch.where(mask, experience.logprob - experience.ref_logprob, 0.0).sum(1)[kept].double()
    lengths = experience.mask.sum(1).double()
    values: dict[str, Tensor | float] = {"reward/mean": experience.reward[kept].double().mean()}
    if experience.nominal is not None and experience.worst is not None:
        nominal, worst = experience.nominal[kept].double().mean(), experience.worst[kept].double().mean()
        values |= {"reward/nominal": nominal, "reward/worst": worst, "reward/gap": nominal - worst}
    if experience.head_mean is not None and experience.head_std is not None:
        values["reward/head_std"] = experience.head_std[kept].double().mean()
        mean = experience.head_mean[kept].double()
        if mean.shape[1] > 1:  # one head agrees with itself
            values["reward/disagreement"] = (mean - mean.mean(1, keepdim=True)).square().mean(1).sqrt().mean()
    if experience.distance is not None:
        distance = experience.distance[kept].double()
        values |= {"reward/distance": distance.mean(), "text/foreign": (distance > 1).double().mean()}
    values |= {
        "kl/sequence": log_ratio.mean(),
        "kl/token": log_ratio.sum() / tokens,
        "kl/chi2": chi2_estimate(log_ratio).mean().clamp(min=0).sqrt(),
        "policy/entropy": torch.where(mask, experience.entropy, 0.0).double().sum() / tokens,
        "text/length": lengths.mean(),
        "text/truncated": 1 - sum(experience.samples.stopped) / len(experience.samples.stopped),
        "samples/dropped": (~kept).sum(),
    }
    if isinstance(experience, Experience) and experience.value is not None and experience.returns is not None:
        values["value/explained_variance"] = explained_variance(experience.value[mask], experience.returns[mask])
    return {name: float(value) for name, value in values.items()}


def explained_variance(value: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - value) / Var(returns) of [R] tokens: 1 is exact, 0 is a constant; NaN if Var(returns) is 0."""
    if returns.numel() < 2:
        return math.nan
    spread = returns.double().var()
    left = (returns.double() - value.double()).var()
    return float(1 - left / spread) if spread > 0 else math.nan


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**30 if os.uname().sysname == "Darwin" else 2**20)  # bytes there, KiB elsewhere


class Clock:
    """Measure the seconds of a step's phases; on a GPU a phase ends with a synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block as time/`phase`, replacing the previous step's value."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        """time/rollout, time/score and time/update in seconds, and sampled tokens per second of their sum."""
        total = sum(self.seconds.values())
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return {**seconds, "time/tokens_per_second": tokens / max(total, 1e-9)}


class Monitor:
    """Measure each step and log it to metrics.jsonl, TensorBoard, other trackers and samples.jsonl."""

    def __init__(
        self,
        config: PPOConfig,
        log: RunLog,
        device: torch.device,
        gold: Callable[[Samples], Any] | None,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.config, self.log, self.device, self.gold, self.decode = config, log, device, gold, decode
        self.clock = Clock(device)
        self.baseline: dict[str, float] = {}  # of the metrics in _BASELINE
        self._gold_failed = False
        self._trackers = open_trackers(config)
        self._texts = TextLog(config.output / "samples.jsonl")

    def compare_with(self, experience: Scored) -> None:
        """Compare later steps with the head std, disagreement and distance of `experience`, if measured."""
        measured = experience_metrics(experience)
        self.baseline = {name: measured[name] for name in _BASELINE if name in measured}

    def observe(
        self, step: int, experience: Experience, learned: Mapping[str, float], kl_coef: float
    ) -> dict[str, float]:
        """Measure, log and return all metrics of `step`."""
        metrics = experience_metrics(experience)
        if not self.baseline:
            self.baseline = {name: metrics[name] for name in _BASELINE if math.isfinite(metrics.get(name, math.nan))}
        for name, ratio in RATIOS.items():
            if name in metrics:
                start = self.baseline.get(name, math.nan)
                metrics[ratio] = metrics[name] / start if start else math.nan
        if "reward/distance" in metrics:
            metrics["reward/distance_reference"] = self.baseline.get("reward/distance", math.nan)
        if self.gold is not None:
            metrics["gold/mean"] = self._gold_mean(step, self.gold(experience.samples).reward)
        metrics |= {"kl/coef": kl_coef, **learned, **self.clock.metrics(int(experience.mask.sum()))}
        metrics["memory/peak_gib"] = peak_gib(self.device)
        self.log.metrics(step, metrics)
        for tracker in self._trackers:
            tracker.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)
        return metrics

    def _gold_mean(self, step: int, scores: Tensor) -> float:
        """The mean of the finite scores; without any, NaN, on which no stop rule fires, and one warning per run."""
        finite = scores[torch.isfinite(scores)]
        if not len(finite) and not self._gold_failed:
            logger.warning(
                "gold: %s gave no finite number for any of the %d responses of step %d",
                self.config.gold,
                len(scores),
                step,
            )
            self._gold_failed = True
        return float(finite.double().mean())

    def texts(self, step: int, experience: Scored) -> None:
        """Log the samples of `experience` as texts of the policy after `step` updates."""
        samples = experience.samples
        gold = None if self.gold is None else self.gold(samples).reward
        std = None if experience.head_std is None else experience.head_std.mean(dim=1)
        columns = {
            "reward": experience.reward,
            "nominal": experience.nominal,
            "worst": experience.worst,
            "head_std": std,
            "distance": experience.distance,
            "gold": gold,
        }
        for i, response in enumerate(samples.responses):
            text = self.decode(response[:-1] if samples.stopped[i] else response)
            text = text if samples.texts is None else samples.texts[i]
            numbers = {name: None if column is None else _finite(column[i]) for name, column in columns.items()}
            texts = {"prompt": self.decode(samples.prompts[i]), "response": text}
            self._texts.add(step, i, {**texts, **numbers, "length": len(response), "stopped": samples.stopped[i]})

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"baseline": self.baseline}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.baseline = dict(state["baseline"])

    def close(self) -> None:
        """Close the trackers and samples.jsonl; the owner of the run's log closes it."""
        for tracker in self._trackers:
            tracker.finish()
        self._texts.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TextLog:
    """Write samples.jsonl: one line per step and response, without duplicates after a resume."""

    def __init__(self, path: Path) -> None:
        self._written = Counter(row["step"] for row in repaired_json_lines(path))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def add(self, step: int, number: int, row: Mapping[str, Any]) -> None:
        """Append response `number` of `step` unless the file has it."""
        if number >= self._written[step]:
            with writing(self._path):
                self._file.write(json.dumps({"step": step, **row}, ensure_ascii=False, allow_nan=False) + "\n")
                self._file.flush()
            self._written[step] = number + 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_texts(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of `folder`/samples.jsonl; [] without the file. ValueError naming a line that is not JSON."""
    return read_json_lines(folder / "samples.jsonl")


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def require_trackers(config: PPOConfig) -> None:
    """Raise ImportError, naming what to install, if one of `config.trackers` is not installed."""
    if not config.trackers:
        return
    try:
        from accelerate.tracking import get_available_trackers
    except ImportError:
        raise ImportError("trackers: they need accelerate: pip install 'prudent[train]'") from None
    missing = [name for name in config.trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise ImportError(f"trackers: {', '.join(missing)} not installed: pip install {' '.join(missing)}")


def open_trackers(config: PPOConfig) -> list[Any]:
    """Start the trackers of accelerate that `config.trackers` names, with the run's config; see `require_trackers`."""
    require_trackers(config)
    if not config.trackers:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers' logging requires it
    trackers = []
    for name in config.trackers:
        tracker = LOGGER_TYPE_TO_CLASS[name]("prudent")
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(config.model_dump(mode="json"))
        trackers.append(tracker)
    return trackers
