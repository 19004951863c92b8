"""Choose the engine that draws responses; all have one interface, `Sampler`."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from ..job.log import say_once
from ..models.causal_lm import causal_lm
from .checks import caches_attention_alone, check_logits, takes_padding
from .config import RolloutConfig
from .engines import Continuous, SharedPrefix, Static, has_continuous_batching
from .tokens import Rule, Sampling
from .turn import Ending


class Sampler(Protocol):
    """An engine. Equal prompts stand together, so that their samples may share keys and values."""

    @property
    def name(self) -> str:
        """What `rollout.engine` calls it."""
        ...

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """Draw one response a row.

        Args:
            model: a causal language model of transformers, peft-wrapped or not, in eval mode, its adapters as wanted.
            prompts: N lists of token ids, of any lengths.
            uniform: [N, max_new_tokens] fp32 in [0, 1) on the CPU; token t of row i spends uniform[i, t].

        Returns:
            The N responses, the stop token included where one was drawn, and whether one was (False: cut).
        """
        ...


def open_sampler(
    config: RolloutConfig, model: Any, stop: set[int], device: torch.device | str, ending: Ending | None = None
) -> Sampler:
    """The engine that `config.engine` names; auto: shared_prefix on a CPU, the faster of the other two on a GPU.

    Args:
        config: how tokens are drawn. With top_k, top_p or min_new_tokens the responses come from a truncated
            distribution, whose probabilities the update does not know: it takes those of the whole vocabulary.
        model: what will be sampled from; a few tokens are read with it, to check that the engine is right for it.
        stop: ids that end a response (`Turn.stop`).
        device: where the model is.
        ending: where the text of a response ends (`Turn.ending`); None: at a stop id alone.

    Raises:
        ValueError: for no stop id; min_new_tokens above max_new_tokens, or with engine continuous; a model that does
            more to its logits, cannot be decoded, or not by the engine that is named.
    """
    if not stop:
        raise ValueError("stop: expected at least one token id that ends a response, got none")
    if config.min_new_tokens > config.max_new_tokens:
        raise ValueError(
            f"rollout.min_new_tokens: expected at most max_new_tokens ({config.max_new_tokens}), "
            f"got {config.min_new_tokens}"
        )
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    engine = _engine(config, model, Rule(sampling, config.min_new_tokens, stop), device)
    return engine if ending is None or not ending.text else EndedByText(engine, ending, config.min_new_tokens)


def _engine(config: RolloutConfig, model: Any, rule: Rule, device: torch.device | str) -> Sampler:
    check_logits(model)
    name: str = config.engine
    if name in ("static", "continuous"):
        if not caches_attention_alone(model):
            raise ValueError(
                f"rollout.engine: expected shared_prefix or auto for {causal_lm(model).config.model_type}, "
                f"whose layers cache other things than keys and values, got {name}"
            )
        return Static(rule) if name == "static" else Continuous(rule)
    if name == "auto" and torch.device(device).type != "cpu" and caches_attention_alone(model):
        if config.min_new_tokens or not has_continuous_batching():
            return Static(rule)
        rows = rows_at_once(config, config.prompts_per_step)
        otherwise = SharedPrefix(rule, padded=takes_padding(model))
        return Faster(Static(rule), Continuous(rule), otherwise=otherwise, rows=rows)
    return SharedPrefix(rule, padded=takes_padding(model))


class EndedByText:
    """An engine whose responses end where their text says, which no single token need tell; see `Ending`.

    The engine draws on behind such an end, up to a stop id or the limit, and the response is cut at it: random numbers
    belong to their row and token, so that the response is the one that would have been drawn.
    """

    def __init__(self, engine: Sampler, ending: Ending, min_new_tokens: int) -> None:
        self._engine, self._ending, self._least = engine, ending, min_new_tokens

    @property
    def name(self) -> str:
        """The engine's."""
        return self._engine.name

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """See `Sampler`."""
        drawn = zip(*self._engine(model, prompts, uniform), strict=True)
        rows = [self._ending.cut(response, stopped, self._least) for response, stopped in drawn]
        return [response for response, _ in rows], [stopped for _, stopped in rows]


def rows_at_once(config: RolloutConfig, prompts: int) -> int:
    """Rows of a full batch: at most rollout.batch_rows, and whole groups of a prompt's samples where one fits."""
    count = config.samples_per_prompt
    rows = min(config.batch_rows, prompts * count)
    return rows - rows % count if count <= rows else rows


class Faster:
    """Times two engines on the first full batch, says so, and is the faster one from then on.

    Fewer rows than `rows` come before that (a run keeps the texts of a few prompts first) and say nothing of a full
    batch's speed: the first engine that does not fail draws them.

    Args:
        engines: those that are timed.
        otherwise: draws where all of them fail.
        rows: of a full batch.
    """

    def __init__(self, *engines: Sampler, otherwise: Sampler, rows: int = 1) -> None:
        self.name = "auto"
        self._engines, self._otherwise, self._rows = engines, otherwise, rows
        self._chosen: Sampler | None = None

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """See `Sampler`; an engine that fails is not chosen."""
        if self._chosen is not None:
            return self._chosen(model, prompts, uniform)
        if len(prompts) < self._rows:
            return self._untimed(model, prompts, uniform)
        timed: list[tuple[float, Sampler, tuple[list[list[int]], list[bool]]]] = []
        notes = []
        for engine in self._engines:
            try:
                engine(model, prompts[:8], uniform[:8, :8])  # loads kernels
                start = time.perf_counter()
                drawn = engine(model, prompts, uniform)
            except Exception as error:  # whatever it is, another engine goes on
                notes.append(f"{engine.name} failed ({' '.join(str(error).split())[:200]})")
                continue
            seconds = time.perf_counter() - start
            rate = sum(map(len, drawn[0])) / seconds
            timed.append((rate, engine, drawn))
            notes.append(f"{engine.name} {rate:.0f} tokens/s")
        if timed:
            _, self._chosen, drawn = max(timed, key=lambda one: one[0])
        else:
            self._chosen, drawn = self._otherwise, self._otherwise(model, prompts, uniform)
        self.name = self._chosen.name
        say_once(f"rollout engine: {self.name} ({', '.join(notes)})")
        return drawn

    def _untimed(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        for engine in self._engines:
            try:
                return engine(model, prompts, uniform)
            except Exception:  # said when a full batch is timed
                continue
        return self._otherwise(model, prompts, uniform)
