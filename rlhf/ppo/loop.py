"""The job behind `prudent ppo`: draw, score, shape, update, watch; `_learn` reads top to bottom."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import atomic_write_text, read_json
from ..run_folder import claim_folder, held
from ..runlog import RunLog
from .config import FREE, PPOConfig, refuse_unread
from .monitor import require_trackers
from .prompts import prompt_order
from .run import Run
from .sampler import draw
from .shaping import shape
from .update import set_learning_rates, update

__all__ = ["PPOConfig", "PPOResult", "run_ppo"]

# what a run makes once it computes; other commands may have left the checkpoint of step 0
MADE = ("metrics.jsonl", "ppo.json", "checkpoints/step-*[1-9]*")


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
        lines += [m["faults"]] if m["faults"] else []
        if m["rolled_back_to"] is not None:
            lines.append(f"first and last step, before the policy was rolled back to step {m['rolled_back_to']}:")
        shown = [name for name, value in m["last"].items() if value is not None and m["first"].get(name) is not None]
        lines += [f"  {name:<20} {m['first'][name]:>9.3f} -> {m['last'][name]:.3f}" for name in shown]
        lines.append(f"policy: {self.folder / 'policy'}")
        return "\n".join([*lines, *([f"report: {self.folder / 'report.html'}"] if m["report"] else [])])


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
            or anything else, or is held by another process; when `update.max_bad_steps` steps in a row gave no finite
            loss, or no step of the run an update.
        ImportError: for a tracker that is not installed.
        OSError: when a file cannot be written; the last checkpoint is whole, and `resume` goes on from there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ppo: expected one process, got a launcher's several: the run folder has one writer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unread(config, device.type)
    require_trackers(config)
    with held(config.output):
        finished = open_folder(config, resume)
        if finished is not None:
            return PPOResult(config.output, finished, finished_before=True)
        with torch.random.fork_rng(), RunLog(config.output) as log:
            torch.manual_seed(config.seed)  # what the adapters start from
            run = Run(config, log, device, progress, model, tokenizer)
            with run.monitor:
                return PPOResult(config.output, _learn(run, resume))


def open_folder(config: PPOConfig, resume: bool) -> dict[str, Any] | None:
    """Claim the output folder. What ppo.json holds if the run in it is finished and all of it is there, else None.

    Raises:
        ValueError: for a folder with other files, a run without `resume`, or a run with another config.
    """
    folder = config.output
    if not claim_folder(config, MADE, free=FREE, resume=resume):
        # what another command left of its start (texts, the checkpoint of step 0) is not this one's
        (folder / "samples.jsonl").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints" / "step-000000", ignore_errors=True)
        return None
    outcome = _outcome(folder)
    if outcome is not None and outcome["stopped"] is None and config.steps > outcome["steps"]:
        outcome = None  # more steps were asked for
    if outcome is None:
        atomic_write_text(folder / "config.yaml", config.to_yaml())
    return outcome


def _outcome(folder: Path) -> dict[str, Any] | None:
    """What ppo.json holds; None if it, or what it speaks of, is gone: the newest checkpoint then gives it again."""
    try:
        found = read_json(folder / "ppo.json")
    except (OSError, ValueError):
        return None
    if not {"steps", "stopped", "rolled_back_to", "first", "last", "report", "faults"} <= found.keys():
        return None
    there = any((folder / "policy").glob("*")) and (not found["report"] or (folder / "report.html").exists())
    return found if there else None


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
        run.refuse_bad(step, metrics)
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
