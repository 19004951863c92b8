"""A PPO run around its loop: everything loaded and checked before the first step, checkpoints, and the end."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from tqdm import tqdm

from ..job.files import atomic_folder, atomic_write_json, atomic_write_text
from ..job.log import RunLog, read_metrics
from ..models.adapter import peft_hushed
from ..models.loading import load_tokenizer
from ..report.words import count
from ..sampling.config import RolloutConfig
from ..sampling.prompts import Prompt, load_prompts, longest_prompt, prompt_order
from ..sampling.sampler import open_sampler
from ..sampling.turn import Turn
from .advantages import KLController
from .batch import Samples, Scored
from .checkpoint import Checkpoints, Saved, State
from .config import PPOConfig
from .memory import limit_memory, with_micro_tokens
from .policy.describe import describe_policy
from .policy.policy import Policy
from .rewards.resolve import RewardSource, check_reading, open_gold, open_reward
from .rollout import draw
from .score import score
from .stop import Fired, StopRules
from .update import open_optimizer
from .watch.baseline import preference_texts
from .watch.findings import by_step, faults, total
from .watch.monitor import TEXTS, Monitor, read_texts

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


class Run:
    """What a run loads once, and what it does besides learning: texts, checkpoints, the end."""

    def __init__(
        self, config: PPOConfig, log: RunLog, device: torch.device, progress: bool, model: Any, tokenizer: Any
    ) -> None:
        self.progress = progress
        self.tokenizer = load_tokenizer("model", config.model) if tokenizer is None else tokenizer
        limit_memory(config, device)
        with peft_hushed():
            self.policy = Policy.load(config, device=device, model=model)
        self.turn = Turn(self.tokenizer, self.policy.model)
        limit = longest_prompt(config.rollout, self.policy.model.config, self.turn)
        self.prompts = load_prompts(config.prompts, self.turn, limit, progress=progress)
        longest = max(len(prompt.ids) for prompt in self.prompts)
        own, kind = self.policy.reward_head, self.policy.source_kind
        assert kind is not None  # a run has a reward: its config wants one
        self.config = config = with_micro_tokens(
            config, self.policy.model.config, device, longest, kind, 0 if own is None else own.num_heads
        )
        prompt_order(len(self.prompts), 0, config.rollout.prompts_per_step, config.seed)  # refuses too few
        texts = None
        if config.data is not None:
            texts = preference_texts(config.data, self.turn, self.policy.model.config, len(self.prompts), config.seed)
        known: list[Prompt] = [*self.prompts, *(texts.prompts if texts else [])]
        self.reward: RewardSource | None = None  # the policy's own heads
        if self.policy.reward_kind is None:
            self.reward = open_reward(config, self.tokenizer, known, device, kind)
            if texts is not None and self.reward.num_heads is None:
                raise ValueError("data: has no effect with a reward without heads, which has no doubt to compare")
        else:
            check_reading(config.reward.source, self.tokenizer, self.policy.model)
        gold = None if config.gold is None else open_gold(config.gold, self.tokenizer, known)
        with self.policy.sampling() as sampled:
            self.sampler = open_sampler(config.rollout, sampled, self.turn.stop, device)
        self.optimizer = open_optimizer(self.policy, config)
        self.controller = KLController(config.kl.coef, config.kl.target, config.kl.horizon)
        self.rules = StopRules(config.stop_when)
        heads = self.policy.reward_head if self.reward is None else self.reward
        self.rules.refuse(unmeasured(config, None if heads is None else heads.num_heads))
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.monitor = Monitor(config, log, device, gold, self.tokenizer.decode)
        self.texts = texts
        self.bad_steps = 0  # in a row
        self.combination = [
            describe_policy(self.policy),
            f"reward source: {config.reward.source} ({kind})",
            f"sampling: {self.sampler.name}, {len(self.prompts)} prompts{_truncated(config)}",
        ]

    def begin(self, resume: bool) -> int:
        """Say what runs, and make ready: from the newest checkpoint, or from the start. -> the first step"""
        first = self.restore() if resume else 0
        self.say(f"prudent ppo: {self.config.output}, steps {first} to {self.config.steps}", *self.combination)
        if self.texts is not None and not self.monitor.baseline:
            self.monitor.compare_with(self.score(self.texts.samples))
        if first == 0 and self.rules.rolls_back:
            self.save(0)
        return first

    def score(self, samples: Samples) -> Scored:
        """Log-probabilities, values and rewards of `samples`."""
        return score(self.policy, self.reward, samples, self.config, closing=self.turn.closing, progress=False)

    def keep_texts(self, step: int) -> None:
        """The present policy's responses to the first prompts, into samples.jsonl."""
        one = self.config.rollout.model_copy(update={"samples_per_prompt": 1})
        config = self.config.model_copy(update={"rollout": one})
        numbers = list(range(min(TEXTS, len(self.prompts))))
        samples = draw(self.sampler, self.policy, self.prompts, numbers, config, step, progress=False)
        self.monitor.texts(step, self.score(samples))

    def refuse_bad(self, step: int, metrics: dict[str, float]) -> None:
        """Count steps whose loss was not finite; after too many in a row the run ends, its last checkpoint whole."""
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
        """Why an update was skipped, and what may help."""
        if no_reward:
            return f"no response had a finite reward from {self.config.reward.source}, which is to be looked at"
        return "its loss or gradient was not finite, where a lower update.lr may help"

    def _refuse_unmoved(self, rows: list[dict[str, Any]], steps: int) -> None:
        """Raise ValueError for a run that made no update; `rows` of all its steps, or nothing is known."""
        if len(rows) < steps or total(rows, "update/steps"):
            return
        cause = self._cause(no_reward=all(row.get("reward/mean") is None for row in rows))
        if not total(rows, "update/skipped"):
            cause = "update.max_kl held every one back"
        raise ValueError(f"ppo: no update was made in {count(steps, 'step')}, so nothing was learned: {cause}")

    def save(self, step: int) -> None:
        """The checkpoint of the policy after `step` updates."""
        state: State = {
            "kl_coef": self.controller.coef,
            "bad_steps": self.bad_steps,
            "rules": self.rules.state(),
            "monitor": self.monitor.state(),
        }
        self.checkpoints.save(step, Saved(self.policy.trainable_state(), self.optimizer.state_dict(), state))
        self.checkpoints.prune(self.rules.bad_since)

    def restore(self) -> int:
        """Take up the newest checkpoint; the step to go on with."""
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
        """The policy as a folder, texts of it, the report, and last ppo.json."""
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
            "policy": self.combination[0],
            "reward": self.combination[1],
            "seconds": sum(row.get(f"time/{name}") or 0.0 for row in rows for name in ("rollout", "score", "update")),
            "updates": total(rows, "update/steps"),
            "skipped": total(rows, "update/skipped"),
            "dropped": total(rows, "samples/dropped"),
            "faults": faults(rows, steps),
            "first": {name: rows[0].get(name) if rows else None for name in SHOWN},
            "last": {name: rows[-1].get(name) if rows else None for name in SHOWN},
        }
        outcome["report"] = self._report(rows, outcome)
        atomic_write_json(folder / "ppo.json", outcome)
        return outcome

    def _stopped(self, fired: Fired | None) -> tuple[str | None, int | None]:
        """Why the run ends early, and the step whose policy it takes up again, where a rule asks for that."""
        if fired is None or not fired.rule.rollback:
            return None if fired is None else str(fired), None
        found = self.checkpoints.newest(fired.since)
        if found is None:
            return f"{fired}; no checkpoint is from before, so the policy stays as it is", None
        self.policy.load_trainable_state(found[1].policy)
        return f"{fired}; the policy is the checkpoint of step {found[0]} again", found[0]

    def _report(self, rows: list[dict[str, Any]], outcome: dict[str, Any]) -> bool:
        """Write report.html; False, and a word to the user, without what it needs."""
        folder = self.config.output
        try:
            from .watch.report import render

            page = render(self.config, rows, read_texts(folder), outcome)
        except ImportError as error:  # the numbers are all there without
            self.say(f"no report.html: {error}")
            return False
        atomic_write_text(folder / "report.html", page)
        return True

    def say(self, *lines: str) -> None:
        """Tell the user on stderr, unless they asked for quiet."""
        if self.progress:
            tqdm.write("\n".join(lines).replace("\n", "\n  "), file=sys.stderr)


def unmeasured(config: PPOConfig, num_heads: int | None) -> dict[str, str]:
    """Metrics that a run cannot have -> what would give them. num_heads: None of a function or server, which may bring
    heads or not."""
    missing = {} if config.gold is not None else {"gold/mean": "a gold scorer: set gold"}
    if config.critic == "none":
        missing |= dict.fromkeys(("value/loss", "value/explained_variance"), "a critic: estimator gae has one")
    if num_heads == 1:
        names = ("nominal", "worst", "gap", "disagreement", "disagreement_ratio")
        missing |= dict.fromkeys((f"reward/{name}" for name in names), "a reward of several heads, not one")
    return missing


def _truncated(config: PPOConfig) -> str:
    """What samples of a truncated distribution do to the update's numbers, which are those of the whole one."""
    plain = RolloutConfig()
    cuts = [
        name for name in ("top_k", "top_p", "min_new_tokens") if getattr(config.rollout, name) != getattr(plain, name)
    ]
    if not cuts:
        return ""
    return f" ({', '.join(cuts)}: the update takes samples for those of the whole distribution, so KL and ratios lean)"
