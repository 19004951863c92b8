"""Set up a PPO run: load and check everything that it needs, before its first step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...engine import Scorer
from ..data.reading import check_source
from ..job.log import RunLog
from ..models.adapter import peft_hushed
from ..models.loading import load_tokenizer
from ..sampling.config import RolloutConfig
from ..sampling.prompts import Prompt, check_prompts, load_prompts, longest_prompt, prompt_order
from ..sampling.sampler import open_sampler
from ..sampling.turn import Turn
from .advantages import KLController
from .checkpoint import Checkpoints
from .config import PPOConfig, refuse_unread_by_reward
from .memory import limit_memory, resolve_micro_tokens
from .policy.describe import describe_policy
from .policy.load import load_model
from .policy.policy import Policy
from .rewards.open import open_gold, open_source
from .rewards.reading import HeadEncoder, Reading
from .rewards.resolve import open_encoder, resolve_reward
from .rewards.sources import Texts
from .run import Run
from .stop import StopRules
from .update import open_optimizer
from .watch.baseline import PreferenceTexts, preference_texts
from .watch.monitor import Monitor


def set_up(
    config: PPOConfig,
    log: RunLog,
    device: torch.device,
    *,
    progress: bool = True,
    model: Any = None,
    tokenizer: Any = None,
) -> Run:
    """Set up the run that `config` describes, ready for its first step.

    Args:
        config: already checked by `refuse_unread`.
        log: of the run folder.
        device: of the policy and a reward model.
        progress: show progress bars and describe the run on stderr.
        model, tokenizer: loaded already, instead of `config.model`; the model is changed in place.

    Raises:
        ValueError: for a model, prompt, reward or rule that cannot be used, and for too little memory.
    """
    check_prompts(config.prompts)
    if config.data is not None:
        check_source("data", config.data)
    limit_memory(config, device)
    tokenizer = load_tokenizer("model", config.model) if tokenizer is None else tokenizer
    model = load_model(config, device, model)
    turn = Turn(tokenizer, model)

    reward = resolve_reward(config.reward, model, device)
    refuse_unread_by_reward(config, reward.kind)
    rules = StopRules(config.stop_when)
    rules.refuse(unmeasured(config, reward.num_heads, reward.measures_distance))
    encoder = None if reward.on_trunk is None else open_encoder(config.reward.source, model)

    data = _read_data(config, turn, model, encoder or reward.scorer, progress)
    texts = Texts(tokenizer, [*data.prompts, *(data.preferences.prompts if data.preferences else [])])
    source = open_source(config.reward, reward, texts)
    gold = None if config.gold is None else open_gold(config.gold, texts)

    # the run's config from here on: auto has become a number
    longest = max(len(prompt.ids) for prompt in data.prompts)
    config = resolve_micro_tokens(
        config,
        model.config,
        device,
        longest=longest,
        kind=reward.kind,
        heads=reward.num_heads or 0,
        features=(reward.on_trunk and reward.on_trunk.taps) or "last",
    )
    with peft_hushed():
        policy = Policy(config, model, device=device, reward=reward.on_trunk)
    with policy.sampling() as sampled:
        sampler = open_sampler(config.rollout, sampled, turn.stop, device, turn.ending)
    return Run(
        config=config,
        policy=policy,
        tokenizer=tokenizer,
        turn=turn,
        prompts=data.prompts,
        preferences=data.preferences,
        bad_rows=data.bad_rows,
        reward=source,
        reading=None if encoder is None else Reading(encoder, texts),
        sampler=sampler,
        optimizer=open_optimizer(policy, config),
        controller=KLController(config.kl.coef, config.kl.target, config.kl.horizon),
        rules=rules,
        checkpoints=Checkpoints(config.output / "checkpoints"),
        monitor=Monitor(config, log, device, gold, tokenizer.decode),
        description=[
            describe_policy(policy),
            f"reward source: {config.reward.source} ({reward})",
            f"sampling: {sampler.name}, {len(data.prompts)} prompts{_truncated(config)}",
        ],
        progress=progress,
    )


class _Data(NamedTuple):
    """What a run reads; bad_rows: config key -> number of rows skipped."""

    prompts: list[Prompt]
    preferences: PreferenceTexts | None
    bad_rows: dict[str, int]


def _read_data(config: PPOConfig, turn: Turn, model: Any, reward: HeadEncoder | Scorer | None, progress: bool) -> _Data:
    """Read `config.prompts` and `config.data`. reward: encodes what it scores; None if it takes texts."""
    prompts, bad = load_prompts(
        config.prompts,
        turn,
        longest_prompt(config.rollout, model.config, turn),
        readers={} if reward is None else {"reward.source": reward.encode},
        skip_bad_rows=config.skip_bad_rows,
        progress=progress,
    )
    prompt_order(len(prompts), 0, config.rollout.prompts_per_step, config.seed)  # refuses too few
    if config.data is None:
        return _Data(prompts, None, {"prompts": bad})
    preferences = preference_texts(
        config.data, turn, model.config, len(prompts), config.seed, skip_bad_rows=config.skip_bad_rows
    )
    return _Data(prompts, preferences, {"prompts": bad, "data": preferences.bad_rows})


def unmeasured(config: PPOConfig, num_heads: int | None, distance: bool = True) -> dict[str, str]:
    """Return the metrics that a run cannot measure -> what they need.

    num_heads: K of the reward; None for a function or a server, which may or may not have heads.
    distance: whether the reward has a trust region.
    """
    missing = {} if config.gold is not None else {"gold/mean": "a gold scorer: set gold"}
    if config.critic == "none":
        missing |= dict.fromkeys(("value/loss", "value/explained_variance"), "a critic: estimator gae has one")
    if num_heads == 1:
        names = ("nominal", "worst", "gap", "disagreement", "disagreement_ratio")
        missing |= dict.fromkeys((f"reward/{name}" for name in names), "a reward of several heads, not one")
    if not distance:
        of_distance = ("reward/distance", "reward/distance_reference", "text/foreign")
        missing |= dict.fromkeys(of_distance, "a reward model with a trust region: prudent calibrate fits one")
    return missing


def _truncated(config: PPOConfig) -> str:
    """A warning if responses are drawn from a truncated distribution, because the update assumes the whole one."""
    plain = RolloutConfig()
    cuts = [
        name for name in ("top_k", "top_p", "min_new_tokens") if getattr(config.rollout, name) != getattr(plain, name)
    ]
    if not cuts:
        return ""
    return f" ({', '.join(cuts)}: the update assumes samples of the whole distribution, so KL and ratios are biased)"
