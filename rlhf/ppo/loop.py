"""The job behind `prudent ppo`: draw, score, shape, update, watch; `_learn` reads top to bottom."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..runlog import RunLog
from .config import PPOConfig, open_folder, refuse_unread
from .prompts import prompt_order
from .run import Run
from .sampler import draw
from .shaping import shape
from .update import set_learning_rates, update

__all__ = ["PPOConfig", "PPOResult", "run_ppo"]


@dataclass(frozen=True)
class PPOResult:
    """folder: the run folder. metrics: what ppo.json holds. finished_before: nothing was left to do."""

    folder: Path
    metrics: dict[str, Any]
    finished_before: bool = False

    def __str__(self) -> str:
        m = self.metrics
        done = f"{m['steps']} step{'s' * (m['steps'] != 1)} done"
        head = "was finished before; nothing was done again" if self.finished_before else done
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
        torch.manual_seed(config.seed)  # what the adapters start from
        run = Run(config, log, device, progress, model, tokenizer)
        with run.monitor:
            return PPOResult(config.output, _learn(run, resume))


def _learn(run: Run, resume: bool) -> dict[str, Any]:
    """The steps that are not done yet; what ppo.json holds."""
    config, policy, monitor = run.config, run.policy, run.monitor
    first = run.begin(resume)
    fired, step = None, first - 1
    bar = tqdm(range(first, config.steps), "ppo", config.steps, initial=first, unit="step", disable=not run.progress)
    for step in bar:
        if step % config.sample_every == 0:
            run.keep_texts(step)
        kl_coef = run.controller.coef

        with monitor.clock("rollout"):
            asked = prompt_order(len(run.prompts), step, config.rollout.prompts_per_step, config.seed)
            samples = draw(run.sampler, policy, run.prompts, asked, config, step, progress=False)
        with monitor.clock("score"):
            experience = shape(run.score(samples), config, kl_coef)
        with monitor.clock("update"):
            set_learning_rates(run.optimizer, config, step)
            generator = torch.Generator().manual_seed((config.seed << 32) + step)  # minibatches and dropout
            learned = update(policy, run.optimizer, experience, config, kl_coef=kl_coef, generator=generator)

        metrics = monitor.observe(step, experience, learned, kl_coef)
        bar.set_postfix_str(_short(metrics))
        run.controller.update(metrics["kl/sequence"], len(samples.responses))
        run.refuse_bad(step, learned)
        fired = run.rules.observe(step, metrics)
        if fired is not None:
            break
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            run.save(step + 1)
    return run.finish(step + 1, fired)


def _short(metrics: dict[str, float]) -> str:
    """What the progress bar shows of a step."""
    names = {"reward": "reward/mean", "gold": "gold/mean", "kl": "kl/sequence", "length": "text/length"}
    return ", ".join(f"{short} {metrics[name]:.3g}" for short, name in names.items() if name in metrics)
