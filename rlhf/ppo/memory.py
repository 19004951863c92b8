"""Limit a run to its memory budget, and choose its micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel

from ...engine.taps import layers_of, parse_taps
from ..models.loading import model_folder
from ..models.shapes import model_config
from ..sampling.prompts import longest_prompt
from ..sampling.turn import Turn
from .budget import Cut, JobShape, ModelShape, cuts, micro_tokens, parse_size, plan
from .config import Kind, PPOConfig
from .policy.precision import trunk_dtype

CPU_MICRO_TOKENS = 8192  # for auto on a CPU, whose memory is not planned


def limit_memory(config: PPOConfig, device: torch.device) -> None:
    """Limit this process to `config.memory_budget` of the GPU's memory, if there is one."""
    if config.memory_budget is not None and device.type == "cuda":
        # the index, because torch refuses "cuda" without one here; None is the current GPU
        torch.cuda.set_per_process_memory_fraction(_limit(config, device) / _card(device), device.index)


def resolve_micro_tokens(
    config: PPOConfig,
    model_config: Any,
    device: torch.device,
    *,
    longest: int,
    kind: Kind,
    heads: int,
    features: str | Sequence[str] = "last",
) -> PPOConfig:
    """`config` with a number for update.micro_tokens: auto becomes the most that fit a GPU, or `CPU_MICRO_TOKENS`.

    Args:
        model_config: of the policy's model.
        longest: number of tokens of the longest prompt.
        kind: of the reward, from `resolve_reward`.
        heads, features: K of a reward on the policy's trunk, and what they read; see `engine.taps`.

    Raises:
        ValueError: if not even one sample fits the memory.
    """
    if config.update.micro_tokens != "auto":
        return config
    tokens = CPU_MICRO_TOKENS
    if device.type == "cuda":
        rollout = config.rollout.model_copy(update={"max_prompt_tokens": longest})
        reward = config.reward.model_copy(update={"kind": kind})
        planned = config.model_copy(update={"rollout": rollout, "reward": reward})
        tokens = auto_micro_tokens(planned, model_config, _limit(config, device), heads=heads, features=features)
    return config.model_copy(update={"update": config.update.model_copy(update={"micro_tokens": tokens})})


def _card(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _limit(config: PPOConfig, device: torch.device) -> int:
    """Bytes that this process may allocate."""
    return _card(device) if config.memory_budget is None else min(parse_size(config.memory_budget), _card(device))


PROMPT_TOKENS = 512  # if neither rollout.max_prompt_tokens nor the model's positions limit a prompt


def job_shape(
    config: PPOConfig, model: Any, device: str = "cuda", heads: int = 5, features: str | Sequence[str] = "last"
) -> JobShape:
    """The sizes of `config` for a model of config `model`; `device`: cuda or cpu; features: what reward heads read.

    A reward of kind auto counts as heads on the policy's trunk, one of kind model with its weights in the policy's
    dtype.

    Raises:
        ValueError: for more new tokens than the model has positions, as `prudent ppo` would; for taps that the model
            does not have.
    """
    layers = layers_of(model)
    try:
        taps = parse_taps(features, layers)
    except ValueError as error:
        raise ValueError(f"features: {str(error).removeprefix('taps: ')}") from None
    rollout, on_gpu = config.rollout, device == "cuda"
    kind = "shared" if config.reward.kind == "auto" else config.reward.kind
    dtype = trunk_dtype(config, torch.device(device))
    mixed = config.policy.mode == "full" and on_gpu and config.dtype == "auto"
    dtype = torch.bfloat16 if mixed else dtype
    flash = config.attn in ("auto", "flash") and on_gpu and dtype != torch.float32
    return JobShape(
        prompts=rollout.prompts_per_step,
        samples=rollout.samples_per_prompt,
        prompt_tokens=_prompt_tokens(config, model),
        response_tokens=rollout.max_new_tokens,
        batch_rows=rollout.batch_rows,
        mode=config.policy.mode,
        rank=config.policy.lora_rank,
        dropout=config.policy.lora_dropout > 0,
        critic=config.critic,
        reward=kind if kind in ("shared", "adapter") else None,  # type: ignore[arg-type]
        heads=heads,
        reward_bytes=_other_model(config.reward.source, dtype) if kind == "model" else 0,
        taps=sum(tap.kind != "logprob" for tap in taps),
        captured=len({tap.layer for tap in taps} - {layers}),
        checkpointing=config.policy.gradient_checkpointing,
        optimizer=config.update.optimizer,
        dtype=dtype,
        mixed=mixed,
        masked=bool(config.packed) and not flash,
        eager=config.attn == "eager",
        truncated_sampling=rollout.top_k > 0 or rollout.top_p < 1,
        shared_prefix=rollout.engine == "shared_prefix" or (rollout.engine == "auto" and not on_gpu),
        device="gpu" if on_gpu else "cpu",
    )


class _Closing:
    """A `Turn` for `longest_prompt` without a tokeniser: one token ends a response."""

    closing = (0,)


def _prompt_tokens(config: PPOConfig, model: Any) -> int:
    limit = longest_prompt(config.rollout, model.get_text_config(), cast(Turn, _Closing()))
    return PROMPT_TOKENS if limit is None else limit if config.rollout.max_prompt_tokens else min(limit, PROMPT_TOKENS)


def _other_model(source: str, dtype: torch.dtype) -> int:
    """Bytes of a reward model's weights in `dtype`: by its config, or by its files if that alone makes no model."""
    folder = model_folder(source)
    config = model_config(folder, "reward.source")
    try:
        with torch.device("meta"):  # AutoModel, because not every family of classifiers has a causal language model
            model = AutoModel.from_config(getattr(config, "text_config", None) or config)
        numbers: int = sum(parameter.numel() for parameter in model.parameters())
        return dtype.itemsize * numbers
    except (ValueError, ImportError) as error:
        found = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        if not found:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"reward.source: expected a model that transformers can build from its config, or a folder with its "
                f"safetensors, got {source}: {reason}"
            ) from None
        return found


def auto_micro_tokens(
    config: PPOConfig,
    model_config: Any,
    limit: int,
    prompt_tokens: int | None = None,
    heads: int = 5,
    features: str | Sequence[str] = "last",
) -> int:
    """The most tokens in a forward pass that fit into `limit` bytes of a GPU, at most all of a step's samples.

    Args:
        limit: bytes that the process may allocate.
        prompt_tokens: of the longest prompt; None: rollout.max_prompt_tokens, or 512 without it.
        heads, features: K of a reward on the policy's trunk, and what they read; see `engine.taps`.

    Raises:
        ValueError: if not even one sample fits, with the keys that would help.
    """
    shape, job = ModelShape.of(model_config), job_shape(config, model_config, heads=heads, features=features)
    job = replace(job, prompt_tokens=prompt_tokens or job.prompt_tokens)
    found = micro_tokens(shape, job, limit)
    if not found:
        need = plan(shape, job, job.tokens)
        raise ValueError(
            f"memory: expected at most {limit / 2**30:.1f} GiB, got {need.peak / 2**30:.1f} GiB with one sample a "
            f"forward pass; {advice(cuts(shape, job, limit))}"
        )
    return found


def advice(found: list[Cut]) -> str:
    """Which settings would make the job fit, in words."""
    alone = [cut for cut in found if cut.fits]
    if alone:
        return "any one of these fits: " + "; ".join(f"{c.setting} (-{c.saves / 2**30:.1f} GiB)" for c in alone[:3])
    if not found:
        return "no setting makes it much smaller: a smaller model or a larger card is needed"
    return "each of these saves: " + "; ".join(f"{c.setting} (-{c.saves / 2**30:.1f} GiB)" for c in found[:4])
