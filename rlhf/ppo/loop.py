"""Run `prudent ppo`: sample, score, compute advantages, update and monitor, step by step; the loop is `_learn`."""

from __future__ import annotations

import os
from typing import Any

import torch
from tqdm import tqdm

from ..job.folder import locked_folder
from ..job.log import RunLog
from ..sampling.prompts import prompt_order
from .advantages import shape
from .config import PPOConfig, refuse_unread
from .outcome import PPOResult, open_folder
from .rollout import draw
from .run import Run
from .set_up import set_up
from .update import set_learning_rates, update
from .watch.monitor import require_trackers

__all__ = ["PPOConfig", "PPOResult", "run_ppo"]


def run_ppo(
    config: PPOConfig, *, resume: bool = False, progress: bool = True, model: Any = None, tokenizer: Any = None
) -> PPOResult:
    """Train a policy against a reward by PPO, RLOO or group-relative advantages, on one device.

    The run folder (`config.output`): config.yaml (resolved), metrics.jsonl, tensorboard/, samples.jsonl (texts),
    checkpoints/step-%06d/, policy/ (the trained policy and its tokeniser), report.html, ppo.json (written last).
    Random numbers depend only on seed and step: a run that was killed and resumed gives the same numbers as an
    uninterrupted one, on a CPU bit for bit. The caller's random state is restored.

    Args:
        config: see `PPOConfig`.
        resume: continue a run that was killed, or that had fewer `steps`; in a new folder, start one.
        progress: describe the run and show a progress bar on stderr.
        model, tokenizer: a loaded causal language model and its tokeniser, instead of `config.model`.

    Raises:
        ValueError: for a config that cannot be used, a key that nothing reads, an output folder with another run or
            other files, or locked by another process; when `update.max_bad_steps` steps in a row skipped an update, or
            no step made one.
        ImportError: for a tracker that is not installed.
        OSError: when a file cannot be written; `resume` continues from the last checkpoint, which is complete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"ppo: expected one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: one process writes the run folder"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_unread(config, device.type)
    require_trackers(config)
    with locked_folder(config.output):
        finished = open_folder(config, resume)
        if finished is not None:
            return PPOResult(config.output, finished, finished_before=True)
        with torch.random.fork_rng(), RunLog(config.output) as log:
            torch.manual_seed(config.seed)  # for the adapters' initial weights
            run = set_up(config, log, device, progress=progress, model=model, tokenizer=tokenizer)
            with run.monitor:
                return PPOResult(config.output, _learn(run, resume))


def _learn(run: Run, resume: bool) -> dict[str, Any]:
    """Run the remaining steps and finish; return the content of ppo.json."""
    config, policy, monitor = run.config, run.policy, run.monitor
    first = run.begin(resume)
    fired, step = None, first - 1
    bar = tqdm(range(first, config.steps), "ppo", config.steps, initial=first, unit="step", disable=not run.progress)
    for step in bar:
        if step % config.sample_every == 0:
            run.keep_texts(step)
        kl_coef = run.controller.coef

        with monitor.clock("rollout"):
            indices = prompt_order(len(run.prompts), step, config.rollout.prompts_per_step, config.seed)
            samples = draw(run.sampler, policy, run.prompts, indices, config, step, progress=False)
        with monitor.clock("score"):
            experience = shape(run.score(samples, step), config, kl_coef)
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
    """A step's numbers for the progress bar."""
    names = {"reward": "reward/mean", "gold": "gold/mean", "kl": "kl/sequence", "length": "text/length"}
    names |= {"distance": "reward/distance", "foreign": "text/foreign"}
    return ", ".join(f"{short} {metrics[name]:.3g}" for short, name in names.items() if name in metrics)
