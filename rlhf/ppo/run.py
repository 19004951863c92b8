"""The parts of a PPO run, and its work around the loop: sample texts, checkpoints, and the results."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ..job.files import atomic_folder, atomic_write_json, atomic_write_text
from ..job.log import read_metrics
from ..report.words import count
from ..sampling.prompts import Prompt
from ..sampling.sampler import Sampler
from ..sampling.turn import Turn
from .advantages import KLController
from .batch import Samples, Scored
from .checkpoint import Checkpoints, Saved, State
from .config import PPOConfig
from .policy.policy import Policy
from .rewards.reading import Reading
from .rewards.sources import RewardSource
from .rollout import draw
from .score import score
from .stop import Fired, StopRules
from .watch.baseline import PreferenceTexts
from .watch.findings import by_step, faults, total
from .watch.monitor import TEXTS, Monitor, read_texts

SHOWN = (  # metrics of the first and the last step in ppo.json and the command's last lines
    "reward/mean",
    "reward/gap",
    "reward/disagreement",
    "reward/distance",
    "text/foreign",
    "gold/mean",
    "kl/sequence",
    "policy/entropy",
    "text/length",
    "text/truncated",
)


@dataclass
class Run:
    """The parts of a run, and its work around the loop: sample texts, checkpoints, and the results."""

    config: PPOConfig  # as resolved by `set_up`
    policy: Policy
    tokenizer: Any
    turn: Turn
    prompts: list[Prompt]
    preferences: PreferenceTexts | None  # None without `config.data`
    bad_rows: dict[str, int]  # "prompts" or "data" -> number of rows skipped
    reward: RewardSource | None  # None: the heads on the policy's trunk
    reading: Reading | None  # encodes samples for those heads; None: a reward from outside
    sampler: Sampler
    optimizer: torch.optim.Optimizer
    controller: KLController
    rules: StopRules
    checkpoints: Checkpoints
    monitor: Monitor
    description: list[str]  # policy, reward and sampling in words
    progress: bool
    bad_steps: int = 0  # number of steps in a row that skipped an update

    def begin(self, resume: bool) -> int:
        """Describe the run, and restore the newest checkpoint if `resume`; return the first step."""
        first = self.restore() if resume else 0
        self.say(f"prudent ppo: {self.config.output}, steps {first} to {self.config.steps}", *self.description)
        if self.preferences is not None and not self.monitor.baseline:
            self.monitor.compare_with(self.score(self.preferences.samples))
        if first == 0 and self.rules.rolls_back:
            self.save(0)
        return first

    def score(self, samples: Samples, step: int | None = None) -> Scored:
        """Compute log-probabilities, values and rewards of `samples`.

        step: whose samples they are; sampled rewards then have the noise of (seed, step, row). None: samples that
        nothing learns from, whose rewards are of the heads' means.
        """
        return score(
            self.policy,
            self.reward,
            samples,
            self.config,
            closing=self.turn.closing,
            reading=self.reading,
            seed=None if step is None else (self.config.seed << 32) + step,
        )

    def keep_texts(self, step: int) -> None:
        """Write the current policy's responses to the first prompts into samples.jsonl."""
        one = self.config.rollout.model_copy(update={"samples_per_prompt": 1})
        config = self.config.model_copy(update={"rollout": one})
        numbers = list(range(min(TEXTS, len(self.prompts))))
        samples = draw(self.sampler, self.policy, self.prompts, numbers, config, step, progress=False)
        drawn = zip(samples.prompts, samples.responses, samples.stopped, strict=True)
        samples = samples._replace(texts=[self.turn.text(*row) for row in drawn])
        self.monitor.texts(step, self.score(samples))

    def refuse_bad(self, step: int, metrics: dict[str, float]) -> None:
        """Count steps that skipped an update; raise ValueError after `update.max_bad_steps` of them in a row."""
        self.bad_steps = self.bad_steps + 1 if metrics["update/skipped"] else 0
        if self.bad_steps >= self.config.update.max_bad_steps:
            kept = self.checkpoints.steps()
            where = str(self.checkpoints.path(kept[-1])) if kept else "none was written yet"
            cause = self._cause(no_reward=math.isnan(metrics["reward/mean"]))
            raise ValueError(
                f"ppo: stopped at step {step}: {self.bad_steps} steps in a row had an update skipped: {cause}; "
                f"the last checkpoint: {where}"
            )

    def _cause(self, no_reward: bool) -> str:
        """Say why updates were skipped, and what may help."""
        if no_reward:
            return f"no response had a finite reward from {self.config.reward.source}: check what it returns"
        return "the loss or its gradient was not finite; a lower update.lr may help"

    def _refuse_unmoved(self, rows: list[dict[str, Any]], steps: int) -> None:
        """Raise ValueError if no step made an update; skipped if `rows` lack a step's metrics."""
        if len(rows) < steps or total(rows, "update/steps"):
            return
        cause = self._cause(no_reward=all(row.get("reward/mean") is None for row in rows))
        if not total(rows, "update/skipped"):
            cause = "update.max_kl stopped every one"
        raise ValueError(f"ppo: no update was made in {count(steps, 'step')}, so nothing was learned: {cause}")

    def save(self, step: int) -> None:
        """Write the checkpoint of the policy after `step` updates."""
        state: State = {
            "kl_coef": self.controller.coef,
            "bad_steps": self.bad_steps,
            "rules": self.rules.state(),
            "monitor": self.monitor.state(),
        }
        self.checkpoints.save(step, Saved(self.policy.trainable_state(), self.optimizer.state_dict(), state))
        self.checkpoints.prune(self.rules.bad_since)

    def restore(self) -> int:
        """Restore the newest checkpoint; return the next step, 0 without a checkpoint."""
        found = self.checkpoints.newest()
        if found is None:
            return 0
        step, saved = found
        self.policy.load_trainable_state(saved.policy)
        self.optimizer.load_state_dict(saved.optimizer)
        self.controller.coef = saved.state["kl_coef"]
        self.bad_steps = saved.state["bad_steps"]
        self.rules.load_state(saved.state["rules"])
        self.monitor.load_state(saved.state["monitor"])
        return step

    def finish(self, steps: int, fired: Fired | None) -> dict[str, Any]:
        """Write the policy's folder, its texts, the report, and last ppo.json; return the content of ppo.json."""
        folder = self.config.output
        rows = by_step(read_metrics(folder))
        if fired is None:
            self._refuse_unmoved(rows, steps)
        stopped, back = self._stopped(fired)
        self.keep_texts(steps if back is None else back)
        with atomic_folder(folder / "policy") as temporary:
            self.policy.save(temporary)
            self.tokenizer.save_pretrained(temporary)
        outcome = {
            "steps": steps,
            "stopped": stopped,
            "rolled_back_to": back,
            "policy": self.description[0],
            "reward": self.description[1],
            "seconds": sum(row.get(f"time/{name}") or 0.0 for row in rows for name in ("rollout", "score", "update")),
            "updates": total(rows, "update/steps"),
            "skipped": total(rows, "update/skipped"),
            "dropped": total(rows, "samples/dropped"),
            "bad_rows": self.bad_rows,
            "faults": faults(rows, steps),
            "first": {name: rows[0].get(name) if rows else None for name in SHOWN},
            "last": {name: rows[-1].get(name) if rows else None for name in SHOWN},
        }
        outcome["report"] = self._report(rows, outcome)
        atomic_write_json(folder / "ppo.json", outcome)
        return outcome

    def _stopped(self, fired: Fired | None) -> tuple[str | None, int | None]:
        """(why the run ended early, the step it was rolled back to), each None if not; restores that step's policy."""
        if fired is None or not fired.rule.rollback:
            return None if fired is None else str(fired), None
        found = self.checkpoints.newest(fired.since)
        if found is None:
            return f"{fired}; no checkpoint is older, so the policy was not rolled back", None
        self.policy.load_trainable_state(found[1].policy)
        return f"{fired}; the policy was rolled back to the checkpoint of step {found[0]}", found[0]

    def _report(self, rows: list[dict[str, Any]], outcome: dict[str, Any]) -> bool:
        """Write report.html; return False, with a note to the user, if a package that it needs is missing."""
        folder = self.config.output
        try:
            from .watch.report import render

            page = render(self.config, rows, read_texts(folder), outcome)
        except ImportError as error:  # all numbers are in metrics.jsonl and ppo.json too
            self.say(f"no report.html: {error}")
            return False
        atomic_write_text(folder / "report.html", page)
        return True

    def say(self, *lines: str) -> None:
        """Write lines to stderr, unless the command has --quiet."""
        if self.progress:
            tqdm.write("\n".join(lines).replace("\n", "\n  "), file=sys.stderr)
