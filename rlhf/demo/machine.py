"""What the demo learns of this machine: its number type, and from two seconds of sampling how long it will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..sampling.foreign import OTHERS
from ..sampling.shared_prefix import sample_batch
from ..sampling.tokens import Rule, Sampling, keyed_uniforms
from ..sampling.turn import Turn
from .candidates import OTHER_PROMPTS
from .config import SIZES, DemoConfig

_SECONDS = 2.0
_PROBE = Sampling(64, 1.0, 50, 1.0)
# measured in four runs, in bfloat16 and float32, on two cores of an AMD EPYC; the sums were off by up to 11 %.
# As multiples of the time in which one token of a full batch is sampled:
_OVERHEAD = 1.4  # a token of a response: with the prompts, the closing tokens and batches that are not full
_READ = 0.75  # a token of a text that is read, prompt included
_LEARN = 5.4  # a token of PPO, prompt included: sampled in a small batch, scored and learnt from
# and in seconds:
_FIXED = 29.0  # the imports, loading models, evaluation and pictures
_DRAW = 1.6  # the rewards of one draw, of both judges


def number_type(dtype: Literal["auto", "float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """bfloat16 if the hardware multiplies it; a CPU that does not is slower in it than in float32."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def estimate(model: Any, tokenizer: Any, prompts: Sequence[str], config: DemoConfig) -> str:
    """Sample for two seconds, and say how long the whole run will take and how to change that."""
    speed = tokens_per_second(model, tokenizer, prompts, config.batch_rows)
    other = "full" if config.size == "small" else "small"
    values = {**config.model_dump(), **SIZES[other], "size": other}
    values["ppo"] = {**config.ppo.model_dump(), **SIZES[other]["ppo"]}
    sized = DemoConfig(**values)
    here, there = (_minutes(seconds(speed, len(prompts), each)) for each in (config, sized))
    return (
        f"      this machine samples about {speed:.0f} tokens a second: about {here} in all, unless the work is done "
        f"already; --size {other} takes about {there}, and --set held_out_prompts=N or ppo.steps=N changes it too"
    )


def tokens_per_second(model: Any, tokenizer: Any, prompts: Sequence[str], rows: int) -> float:
    """The speed at which a batch of `rows` rows is sampled."""
    turn = Turn(tokenizer, model)
    ids = turn.prompt(prompts[0])
    uniform = keyed_uniforms("probe", rows, _PROBE.max_new_tokens)
    drawn, start = 0, 0.0
    for step in sample_batch(model, [ids], rows, uniform, Rule(_PROBE, 0, turn.stop)):
        if not isinstance(step, int):
            break
        now = time.perf_counter()
        if not start:  # the first step reads the prompt too
            start = now
            continue
        drawn += step
        if now - start > _SECONDS:
            break
    return drawn / max(time.perf_counter() - start, 1e-9)


def seconds(speed: float, prompts: int, config: DemoConfig) -> float:
    """Of the whole run with `prompts` prompts."""
    held, ppo = config.held_out_prompts, config.ppo
    responses = (prompts - held) * config.samples_per_prompt + held * config.best_of
    foreign = held * config.foreign * config.best_of + min(held, OTHER_PROMPTS) * (len(OTHERS) + 1)
    judged = 2 * held * ppo.judged if ppo.steps else 0
    learnt = 2 * ppo.steps * min(ppo.prompts_per_step, held) * ppo.samples_per_prompt
    whole = config.max_new_tokens + 40  # with the prompt and its template
    tokens = _OVERHEAD * (responses + judged) * config.max_new_tokens
    tokens += _READ * (foreign + judged) * whole + _LEARN * learnt * (ppo.max_new_tokens + 40)
    return _FIXED + _DRAW * config.draws + tokens / speed


def _minutes(found: float) -> str:
    whole = max(1, round(found / 60))
    return f"{whole} minute{'s' * (whole > 1)}"
