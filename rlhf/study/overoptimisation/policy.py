"""Policy gradient against the arms: one PPO run for each gold, arm, KL coefficient and seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from ...job.files import atomic_write_json, atomic_write_text
from ...job.log import read_metrics
from ...models.embedded import embedded_model
from ...ppo.config import KLConfig, PolicyConfig, PPOConfig, RewardConfig, UpdateConfig
from ...ppo.loop import run_ppo
from ...sampling.config import RolloutConfig
from ..processes import in_processes
from .candidates import Candidates, load_candidates
from .config import OveroptimisationConfig, View
from .heads import Setting, fit_setting
from .judge import save_judge
from .rewards import PLAIN, Arm, score
from .world import World

CURVES = ("gold/mean", "reward/mean", "kl/sequence")
BLOCK = 5  # steps in a point of a curve


class Run(NamedTuple):
    gold: str
    arm: Arm
    kl: float
    seed: int

    def __str__(self) -> str:
        return f"{self.gold}-{self.arm.name.replace(',', '').replace(' ', '-')}-kl-{self.kl:g}-seed-{self.seed}"


def policy_gradient(
    config: OveroptimisationConfig, views: dict[str, Any], *, progress: bool = True
) -> list[dict[str, Any]]:
    """Do every run that is not done; return a row for each: gold, arm, kl, seed and `_summary` of its curves."""
    given = config.policy_gradient
    view = given.view or config.views[-1]
    constants = {kind: found["chosen"] for kind, found in views[view]["constants"].items()}
    arms = [_arm(kind, constants) for kind in given.arms]
    seeds = range(config.first_seed, config.first_seed + given.seeds)
    runs = [Run(gold, arm, kl, seed) for seed in seeds for gold in given.golds for kl in given.kl for arm in arms]
    folder = config.output / "policy"
    if any(not (folder / _fit(gold, seed) / "judge.json").is_file() for gold in given.golds for seed in seeds):
        _prepare(config, View.parse(view), folder, seeds, progress)
    tasks = [(_ppo(config, folder, run).model_dump_json(), str(folder / _fit(run.gold, run.seed)), run) for run in runs]
    rows = in_processes(_work, tasks, config.processes, "PPO runs", progress)
    return [
        {"gold": run.gold, "arm": run.arm.name, "kl": run.kl, "seed": run.seed, **_summary(curves, given.window)}
        for run, curves in zip(runs, rows, strict=True)
    ]


def _arm(kind: str, constants: dict[str, float]) -> Arm:
    if kind in PLAIN:
        return Arm(kind)
    if kind not in constants or kind == "posterior LCB":
        known = [*PLAIN, *(name for name in constants if name != "posterior LCB")]
        raise ValueError(f"policy_gradient.arms: expected any of {'; '.join(known)}, got {kind!r}")
    return Arm(kind, constants[kind])


def _fit(gold: str, seed: int) -> str:
    return f"{gold}-{seed}"


def _prepare(config: OveroptimisationConfig, view: View, folder: Path, seeds: Sequence[int], progress: bool) -> None:
    """Fit the heads of every gold and seed; write the prompts, the golds' texts and what the rewards read."""
    given = config.policy_gradient
    found: Candidates = load_candidates(config, progress=progress)
    world = World(config)
    features = world.features(view.heads)
    atomic_write_text(folder / "prompts.txt", "".join(prompt + "\n" for prompt in found.training))
    atomic_write_json(folder / "training.json", found.training)
    for gold in given.golds:
        lines = (
            "from pathlib import Path",
            "",
            "from prudent.rlhf.study.overoptimisation.judge import load_gold",
            "",
            f"gold = load_gold(Path(__file__).parent, {gold!r})",
        )
        atomic_write_text(folder / f"{gold}.py", "\n".join(lines) + "\n")
        for seed in seeds:
            setting = Setting(gold, given.pairs, given.noise, seed)
            fitted = fit_setting(features, world.gold(gold).training, setting, config)
            save_judge(folder / _fit(gold, seed), found, view, fitted, score(fitted, features).unit, config)


def _ppo(config: OveroptimisationConfig, folder: Path, run: Run) -> PPOConfig:
    """The config of one run; its reward is a file beside the run's folder."""
    given, output = config.policy_gradient, folder / "runs" / str(run)
    return PPOConfig(
        model=config.model or str(embedded_model()),
        prompts=str(folder / "prompts.txt"),
        output=output,
        reward=RewardConfig(source=f"{output}.py:reward", kind="callable"),
        steps=given.steps,
        seed=run.seed,
        policy=PolicyConfig(mode=given.mode),
        rollout=RolloutConfig(
            prompts_per_step=given.prompts_per_step,
            samples_per_prompt=given.samples_per_prompt,
            max_new_tokens=config.samples.max_new_tokens,
            # the distance knows responses that were drawn in this way
            temperature=config.samples.temperature,
            top_k=config.samples.top_k,
            top_p=config.samples.top_p,
        ),
        kl=KLConfig(coef=run.kl),
        update=UpdateConfig(estimator="rloo", epochs=1, minibatches=1, lr=given.lr),
        gold=f"{folder / run.gold}.py:gold",
        save_every=given.steps,
        sample_every=given.steps,
    )


def _work(text: str, fit: str, given: tuple[Any, ...]) -> dict[str, list[float | None]]:
    """Start one run, or do nothing if it is done; return its curves."""
    run = Run(given[0], Arm(*given[1]), *given[2:])
    config = PPOConfig.model_validate_json(text)
    if not (config.output / "ppo.json").is_file():
        lines = (
            "from pathlib import Path",
            "",
            "from prudent.rlhf.study.overoptimisation.judge import RewardJudge",
            "from prudent.rlhf.study.overoptimisation.rewards import Arm",
            "",
            f"fit = Path(__file__).parents[1] / {Path(fit).name!r}",
            f"reward = RewardJudge(fit, Arm({run.arm.kind!r}, {run.arm.constant!r}))",
        )
        atomic_write_text(f"{config.output}.py", "\n".join(lines) + "\n")
        run_ppo(config, resume=config.output.exists(), progress=False)
    rows = read_metrics(config.output)
    return {name: [row.get(name) for row in rows] for name in CURVES}


def _summary(curves: dict[str, list[float | None]], window: int) -> dict[str, Any]:
    """final: mean of the last `window` steps. curves: means of BLOCK steps; a step without a number is left out."""

    def average(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(mean(known), 4) if known else None

    return {
        "final": {name: average(values[-window:]) for name, values in curves.items()},
        "curves": {
            name: [average(values[i : i + BLOCK]) for i in range(0, len(values), BLOCK)]
            for name, values in curves.items()
        },
    }
