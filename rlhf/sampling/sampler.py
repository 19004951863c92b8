"""Choose the engine that samples responses; all have one interface, `Sampler`."""

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
    """The interface of engines. Equal prompts must be adjacent, so that their samples may share keys and values."""

    @property
    def name(self) -> str:
        """Its value of `rollout.engine`."""
        ...

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """Draw one response per row.

        Args:
            model: a causal language model of transformers, peft-wrapped or not, in eval mode, its adapters switched as
                needed.
            prompts: N lists of token ids, of any lengths.
            uniform: [N, max_new_tokens] fp32 in [0, 1) on the CPU; token t of row i is drawn with uniform[i, t].

        Returns:
            The N responses, each with its stop token if one was drawn, and whether one was (False: cut off).
        """
        ...


def open_sampler(
    config: RolloutConfig, model: Any, stop: set[int], device: torch.device | str, ending: Ending | None = None
) -> Sampler:
    """Open the engine that `config.engine` names; auto: shared_prefix on a CPU, the faster of the other two on a GPU.

    Args:
        config: how tokens are drawn. With top_k, top_p or min_new_tokens the responses come from a truncated
            distribution, but the update computes probabilities over the whole vocabulary.
        model: the model to sample from; it reads a few tokens, to check that the engine is right for it.
        stop: ids that end a response (`Turn.stop`).
        device: of the model.
        ending: finds where the text of a response ends (`Turn.ending`); None: at a stop id only.

    Raises:
        ValueError: for no stop id; for min_new_tokens above max_new_tokens, or with engine continuous; for a model with
            unknown operations on its logits, or that cannot be decoded, or not by the named engine.
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
    """Wrap an engine, and end its responses at a text that may not be a token of its own; see `Ending`.

    The engine draws past the ending, up to a stop id or the limit, and the response is cut at the ending. Each random
    number belongs to a row and token, so the response is the same as if drawing had stopped there.
    """

    def __init__(self, engine: Sampler, ending: Ending, min_new_tokens: int) -> None:
        self._engine, self._ending, self._least = engine, ending, min_new_tokens

    @property
    def name(self) -> str:
        """The engine's name."""
        return self._engine.name

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """See `Sampler`."""
        drawn = zip(*self._engine(model, prompts, uniform), strict=True)
        rows = [self._ending.cut(response, stopped, self._least) for response, stopped in drawn]
        return [response for response, _ in rows], [stopped for _, stopped in rows]


def rows_at_once(config: RolloutConfig, prompts: int) -> int:
    """Rows of a full batch: at most rollout.batch_rows, in whole groups of a prompt's samples if possible."""
    count = config.samples_per_prompt
    rows = min(config.batch_rows, prompts * count)
    return rows - rows % count if count <= rows else rows


class Faster:
    """Time the engines on the first full batch, print the result, and use the fastest from then on.

    Batches of fewer than `rows` rows may come first (a run samples a few prompts for its report at the start). They say
    nothing about the speed of a full batch; the first engine that does not fail samples them.

    Args:
        engines: the engines to time.
        otherwise: the engine to use if all of them fail.
        rows: number of rows of a full batch.
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
            except Exception as error:  # any error: another engine takes over
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
            except Exception:  # reported when a full batch is timed
                continue
        return self._otherwise(model, prompts, uniform)
