"""What the policy says: responses drawn by one of several engines behind one small interface."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from ..job.log import say_once
from ..models.causal_lm import causal_lm, has_values, next_logits
from .config import RolloutConfig
from .engines import Continuous, Rule, SharedPrefix, Static
from .tokens import Sampling


class Sampler(Protocol):
    """An engine. Equal prompts stand together, so that their samples may share keys and values."""

    name: str

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


def open_sampler(config: RolloutConfig, model: Any, stop: set[int], device: torch.device | str) -> Sampler:
    """The engine that `config.engine` names; auto: shared_prefix on a CPU, the faster of the other two on a GPU.

    Args:
        config: how tokens are drawn. With top_k, top_p or min_new_tokens the responses come from a truncated
            distribution, whose probabilities the update does not know: it takes those of the whole vocabulary.
        model: what will be sampled from, for a check that its logits are its output layer on its last hidden states.
        stop: ids that end a response (`rollout.Turn.stop`).
        device: where the model is.

    Raises:
        ValueError: for no stop id, min_new_tokens above max_new_tokens or with engine continuous, or a model that does
            more to its logits.
    """
    if not stop:
        raise ValueError("stop: expected at least one token id that ends a response, got none")
    if config.min_new_tokens > config.max_new_tokens:
        raise ValueError(
            f"rollout.min_new_tokens: expected at most max_new_tokens ({config.max_new_tokens}), "
            f"got {config.min_new_tokens}"
        )
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    rule = Rule(sampling, config.min_new_tokens, stop)
    engine: str = config.engine
    if engine == "auto" and torch.device(device).type == "cpu":
        engine = "shared_prefix"
    if engine == "auto" and config.min_new_tokens:
        engine = "static"
    if engine == "continuous":
        return Continuous(rule)
    check_logits(model)
    if engine == "auto":
        return Faster(Static(rule), Continuous(rule), rows=rows_at_once(config, config.prompts_per_step))
    return SharedPrefix(rule) if engine == "shared_prefix" else Static(rule)


@torch.no_grad()
def check_logits(model: Any) -> None:
    """ValueError if the logits are not the output layer on the last hidden states, softcapped or not.

    Engines draw from the latter, and the update computes probabilities from it.
    """
    lm = causal_lm(model)
    if not has_values(lm.get_input_embeddings().weight):
        return
    ids = torch.arange(2, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    want = lm(input_ids=ids, use_cache=False).logits[:, -1].float()
    got = next_logits(lm, lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]).float()
    scale = max(float(want.abs().max()), 1e-6)
    if not float((got - want).abs().max()) <= 0.02 * scale:  # a few roundings of bfloat16
        raise ValueError(
            f"model: expected logits that are the output layer on the last hidden state, got others from "
            f"{type(lm).__name__}, whose probabilities would be wrong"
        )


def rows_at_once(config: RolloutConfig, prompts: int) -> int:
    """Rows of a full batch: at most rollout.batch_rows, and whole groups of a prompt's samples where one fits."""
    count = config.samples_per_prompt
    rows = min(config.batch_rows, prompts * count)
    return rows - rows % count if count <= rows else rows


class Faster:
    """Times two engines on the first full batch, says so, and is the faster one from then on.

    Fewer rows than `rows` come before that (a run keeps the texts of a few prompts first) and say nothing of a full
    batch's speed: the first engine that can draws them.
    """

    def __init__(self, *engines: Sampler, rows: int = 1) -> None:
        self.name = "auto"
        self._engines, self._rows = engines, rows
        self._chosen: Sampler | None = None

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        """See `Sampler`; an engine that fails is not chosen, and one at least must not."""
        if self._chosen is not None:
            return self._chosen(model, prompts, uniform)
        if len(prompts) < self._rows:
            return self._untimed(model, prompts, uniform)
        timed: list[tuple[float, int]] = []
        drawn: dict[int, tuple[list[list[int]], list[bool]]] = {}
        notes = []
        for number, engine in enumerate(self._engines):
            try:
                engine(model, prompts[:8], uniform[:8, :8])  # loads kernels
                start = time.perf_counter()
                drawn[number] = engine(model, prompts, uniform)
            except Exception as error:  # whatever it is, the other engine goes on; without one it is raised below
                if number + 1 == len(self._engines) and not timed:
                    raise
                notes.append(f"{engine.name} failed ({' '.join(str(error).split())[:200]})")
                continue
            seconds = time.perf_counter() - start
            rate = sum(map(len, drawn[number][0])) / seconds
            timed.append((rate, number))
            notes.append(f"{engine.name} {rate:.0f} tokens/s")
        best = max(timed)[1]
        self._chosen = self._engines[best]
        self.name = self._chosen.name
        say_once(f"rollout engine: {self.name} ({', '.join(notes)})")
        return drawn[best]

    def _untimed(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> tuple[list[list[int]], list[bool]]:
        *others, last = self._engines
        for engine in others:
            try:
                return engine(model, prompts, uniform)
            except Exception:  # said when a full batch is timed
                continue
        return last(model, prompts, uniform)
