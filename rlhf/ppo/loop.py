"""The job behind `prudent ppo`: draw, score, shape, update, watch, and again; `_Run.go` reads top to bottom."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import atomic_folder, atomic_write_json, atomic_write_text
from ..given import load_tokenizer
from ..rollout import Turn
from ..runlog import RunLog, read_metrics
from .baseline import preference_texts
from .batch import Experience, Samples
from .checkpoint import Checkpoints, Saved
from .config import PPOConfig, open_folder, refuse_unread
from .monitor import TEXTS, Monitor, read_texts
from .policy import Policy
from .prompts import Prompt, load_prompts, longest_prompt, prompt_order
from .rewards import RewardSource, check_reading, open_gold, open_reward, resolve_kind
from .sampler import draw, open_sampler
from .score import score
from .shaping import KLController, shape
from .stop import Fired, StopRules
from .update import open_optimizer, set_learning_rates, update

__all__ = ["PPOConfig", "PPOResult", "run_ppo"]

SHOWN = (  # what ppo.json and the command's last lines tell of the first and the last step
    "reward/mean",
    "reward/gap",
    "reward/disagreement",
    "gold/mean",
    "kl/sequence",
    "policy/entropy",
    "text/length",
    "text/truncated",
)


@dataclass(frozen=True)
class PPOResult:
    """folder: the run folder. metrics: what ppo.json holds. finished_before: nothing was left to do."""

    folder: Path
    metrics: dict[str, Any]
    finished_before: bool = False

    def __str__(self) -> str:
        m = self.metrics
        head = "was finished before; nothing was done again" if self.finished_before else f"{m['steps']} steps done"
        lines = [f"{self.folder}: {head}", *([f"stopped early: {m['stopped']}"] if m["stopped"] else [])]
        shown = [name for name, value in m["last"].items() if value is not None and m["first"].get(name) is not None]
        lines += [f"  {name:<20} {m['first'][name]:>9.3f} -> {m['last'][name]:.3f}" for name in shown]
        return "\n".join([*lines, f"policy: {self.folder / 'policy'}", f"report: {self.folder / 'report.html'}"])


def run_ppo(
    config: PPOConfig, *, resume: bool = False, progress: bool = True, model: Any = None, tokenizer: Any = None
) -> PPOResult:
    """Train a policy against a reward by PPO, RLOO or group-relative advantages, on one device.

    The run folder (`config.output`): config.yaml (resolved), metrics.jsonl, tensorboard/, samples.jsonl (texts),
    checkpoints/step-%06d/, policy/ (the trained policy and its tokeniser), report.html, ppo.json (written last).
    Random numbers belong to seed and step, so that a run that was killed and resumed gives the numbers of one that was
    not: on a CPU the same bits. The caller's random state is left as it was.

    Args:
        config: see `PPOConfig`.
        resume: go on where a killed run stopped, or with more `steps` than it had; a folder that is not there yet is
            begun.
        progress: say what runs, and show a progress bar, on stderr.
        model, tokenizer: a causal language model and its tokeniser that are loaded already, instead of `config.model`.

    Raises:
        ValueError: for a config that cannot be used, a key that nothing reads, an output folder that holds another run
            or anything else; when `update.max_bad_steps` steps in a row gave no finite loss.
        OSError: when a checkpoint cannot be written; the last one is whole.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ppo: expected one process, got a launcher's several: the run folder has one writer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unread(config, device.type)
    finished = open_folder(config, resume)
    if finished is not None:
        return PPOResult(config.output, finished, finished_before=True)
    with torch.random.fork_rng(), RunLog(config.output) as log:
        torch.manual_seed(config.seed)  # what the adapters and the critic start from
        run = _Run(config, log, device, progress, model, tokenizer)
        with run.monitor:
            return PPOResult(config.output, run.go(resume))


class _Run:
    """One run: what is loaded once, and the loop."""

    def __init__(
        self, config: PPOConfig, log: RunLog, device: torch.device, progress: bool, model: Any, tokenizer: Any
    ) -> None:
        self.config, self.progress = config, progress
        self.tokenizer = load_tokenizer("model", config.model) if tokenizer is None else tokenizer
        self.policy = Policy.load(config, device=device, model=model)
        self.turn = Turn(self.tokenizer, self.policy.model)
        limit = longest_prompt(config.rollout, self.policy.model.config, self.turn)
        self.prompts = load_prompts(config.prompts, self.turn, limit, progress=progress)
        prompt_order(len(self.prompts), 0, config.rollout.prompts_per_step, config.seed)  # refuses too few
        texts = None
        if config.data is not None:
            texts = preference_texts(config.data, self.turn, self.policy.model.config, len(self.prompts), config.seed)
        known: list[Prompt] = [*self.prompts, *(texts.prompts if texts else [])]
        self.reward: RewardSource | None = None  # the policy's own heads
        kind = self.policy.reward_kind or resolve_kind(config.reward, self.policy.model)
        if self.policy.reward_kind is None:
            self.reward = open_reward(config, self.tokenizer, known, device, kind)
        else:
            check_reading(config.reward.source, self.tokenizer, self.policy.model)
        gold = None if config.gold is None else open_gold(config.gold, self.tokenizer, known)
        self.sampler = open_sampler(config.rollout, self.policy.model, self.turn.stop, device)
        self.optimizer = open_optimizer(self.policy, config)
        self.controller = KLController(config.kl.coef, config.kl.target, config.kl.horizon)
        self.rules = StopRules(config.stop_when)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.monitor = Monitor(config, log, device, gold, self.tokenizer.decode)
        self.texts = texts
        self.bad_steps = 0  # in a row
        self.combination = [
            self.policy.describe(),
            f"reward: {kind}, {config.reward.source}",
            f"sampling: {self.sampler.name}, {len(self.prompts)} prompts",
        ]

    def go(self, resume: bool) -> dict[str, Any]:
        """The steps that are not done yet; what ppo.json holds."""
        config, clock, rollout = self.config, self.monitor.clock, self.config.rollout
        first = self._restore() if resume else 0
        self._say(f"prudent ppo: {config.output}, steps {first} to {config.steps}", *self.combination)
        if self.texts is not None and not self.monitor.baseline:
            self.monitor.compare_with(self._score(self.texts.samples))
        if first == 0 and self.rules.rolls_back:
            self._save(0)
        fired, step = None, first - 1
        bar = tqdm(
            range(first, config.steps), "ppo", config.steps, initial=first, unit="step", disable=not self.progress
        )
        for step in bar:
            if step % config.sample_every == 0:
                self._keep_texts(step)
            kl_coef = self.controller.coef
            with clock("rollout"):
                numbers = prompt_order(len(self.prompts), step, rollout.prompts_per_step, config.seed)
                samples = draw(self.sampler, self.policy, self.prompts, numbers, config, step, progress=False)
            with clock("score"):
                experience = shape(self._score(samples), config, kl_coef)
            with clock("update"):
                set_learning_rates(self.optimizer, config, step)
                generator = torch.Generator().manual_seed((config.seed << 32) + step)  # minibatches and dropout
                learned = update(self.policy, self.optimizer, experience, config, kl_coef=kl_coef, generator=generator)
            metrics = self.monitor.observe(step, experience, learned, kl_coef)
            bar.set_postfix_str(_short(metrics))
            self.controller.update(metrics["kl/sequence"], len(samples.responses))
            self._refuse_bad(step, learned)
            fired = self.rules.observe(step, metrics)
            if fired is not None:
                break
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                self._save(step + 1)
        return self._finish(step + 1, fired)

    def _score(self, samples: Samples) -> Experience:
        return score(self.policy, self.reward, samples, self.config, closing=self.turn.closing, progress=False)

    def _keep_texts(self, step: int) -> None:
        """The present policy's responses to the first prompts, into samples.jsonl."""
        one = self.config.rollout.model_copy(update={"samples_per_prompt": 1})
        config = self.config.model_copy(update={"rollout": one})
        numbers = list(range(min(TEXTS, len(self.prompts))))
        samples = draw(self.sampler, self.policy, self.prompts, numbers, config, step, progress=False)
        self.monitor.texts(step, self._score(samples))

    def _refuse_bad(self, step: int, learned: dict[str, float]) -> None:
        """Count steps whose loss was not finite; after too many in a row the run ends, its last checkpoint whole."""
        self.bad_steps = self.bad_steps + 1 if learned["update/skipped"] else 0
        if self.bad_steps >= self.config.update.max_bad_steps:
            kept = self.checkpoints.steps()
            where = str(self.checkpoints.path(kept[-1])) if kept else "none was written yet"
            raise ValueError(
                f"ppo: stopped at step {step}: {self.bad_steps} steps in a row had a loss or rewards not finite; "
                f"a lower update.lr may help, or a look at the rewards; the last checkpoint: {where}"
            )

    def _save(self, step: int) -> None:
        """The checkpoint of the policy after `step` updates."""
        state = {
            "kl_coef": self.controller.coef,
            "bad_steps": self.bad_steps,
            "rules": self.rules.state(),
            "monitor": self.monitor.state(),
        }
        self.checkpoints.save(step, Saved(self.policy.trainable_state(), self.optimizer.state_dict(), state))
        self.checkpoints.prune(self.rules.bad_since)

    def _restore(self) -> int:
        """Take up the newest checkpoint; the step to go on with."""
        steps = self.checkpoints.steps()
        if not steps:
            return 0
        saved = self.checkpoints.load(steps[-1])
        self.policy.load_trainable_state(saved.policy)
        self.optimizer.load_state_dict(saved.optimizer)
        self.controller.coef = saved.state["kl_coef"]
        self.bad_steps = saved.state["bad_steps"]
        self.rules.load_state(saved.state["rules"])
        self.monitor.load_state(saved.state["monitor"])
        return steps[-1]

    def _finish(self, steps: int, fired: Fired | None) -> dict[str, Any]:
        """The policy as a folder, texts of it, the report, and last ppo.json."""
        folder, stopped = self.config.output, None if fired is None else str(fired)
        back = self.checkpoints.last_good(fired.since) if fired is not None and fired.rule.rollback else None
        if back is not None:
            self.policy.load_trainable_state(self.checkpoints.load(back).policy)
            stopped = f"{stopped}; the policy is the checkpoint of step {back} again"
        self._keep_texts(steps)
        with atomic_folder(folder / "policy") as temporary:
            self.policy.save(temporary)
            self.tokenizer.save_pretrained(temporary)
        rows = read_metrics(folder)
        outcome = {
            "steps": steps,
            "stopped": stopped,
            "rolled_back_to": back,
            "policy": self.combination[0],
            "reward": self.combination[1],
            "seconds": sum(row[name] for row in rows for name in ("time/rollout", "time/score", "time/update")),
            "first": {name: rows[0].get(name) for name in SHOWN},
            "last": {name: rows[-1].get(name) for name in SHOWN},
        }
        try:
            from .report import render

            page = render(self.config, rows, read_texts(folder), outcome)
            atomic_write_text(folder / "report.html", page)
        except ImportError as error:  # the numbers are all there without
            self._say(f"no report.html: {error}")
        atomic_write_json(folder / "ppo.json", outcome)
        return outcome

    def _say(self, *lines: str) -> None:
        if self.progress:
            tqdm.write("\n".join(lines).replace("\n", "\n  "), file=sys.stderr)


def _short(metrics: dict[str, float]) -> str:
    """What the progress bar shows of a step."""
    names = {"reward": "reward/mean", "gold": "gold/mean", "kl": "kl/sequence", "length": "text/length"}
    return ", ".join(f"{short} {metrics[name]:.3g}" for short, name in names.items() if name in metrics)
