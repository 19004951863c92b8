"""The engines that sample responses: shared prompts, a static cache with a CUDA graph, and continuous batching."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from ..models.causal_lm import cache_argument, cache_of, causal_lm, next_logits
from .shared_prefix import Sampled, attending, sample_batch, shares_prefix
from .tokens import Rule

_ATTENTION = "prudent_static"
_CHECK_EVERY = 16  # tokens between two checks whether every row has stopped; each check waits for the GPU
_Drawn = tuple[list[list[int]], list[bool]]


def prompt_groups(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Group N = G x S rows whose equal prompts are adjacent: (G prompts, S); S is 1 if the prompts' counts differ."""
    runs = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
    counts = {count for _, count in runs}
    return ([prompt for prompt, _ in runs], counts.pop()) if len(counts) == 1 else (prompts, 1)


class SharedPrefix:
    """Read each prompt once and let its samples attend to one copy of it; finished rows leave the batch.

    This engine is the best on a CPU and works for every family; families outside `SHARING_MODELS` get a copy of the
    prompt's cache for every sample.
    """

    name = "shared_prefix"

    def __init__(self, rule: Rule, padded: bool = True) -> None:
        """padded: whether prompts of several lengths share a batch; some families are wrong after padding."""
        self.rule, self.padded = rule, padded

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> _Drawn:
        """See `Sampler`."""
        lengths = {0} if self.padded else {len(prompt) for prompt in prompts}
        responses: list[list[int]] = [[]] * len(prompts)
        stopped = [False] * len(prompts)
        for length in sorted(lengths):
            rows = [row for row, prompt in enumerate(prompts) if self.padded or len(prompt) == length]
            distinct, samples = prompt_groups([prompts[row] for row in rows])
            *_, drawn = sample_batch(causal_lm(model), distinct, samples, uniform[rows], self.rule)
            assert isinstance(drawn, Sampled)
            for row, response, ended in zip(rows, drawn.tokens, drawn.stopped, strict=True):
                responses[row], stopped[row] = response, ended
        return responses, stopped


class Static:
    """Decode with a cache of fixed size; on a GPU, one token of all rows is one CUDA graph, which is replayed.

    Prompts are padded on the left. Graph and cache are freed when the rows are done: the update needs the memory, and
    to capture a forward pass again takes less time than a few eager tokens. On a CPU the same steps run without a
    graph.
    """

    name = "static"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    @torch.no_grad()
    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> _Drawn:
        """See `Sampler`. ValueError for a model with layers that attend to fewer positions than are read, or with
        rotary frequencies that change with the length."""
        model = causal_lm(model)
        limit = uniform.shape[1]
        distinct, samples = prompt_groups(prompts)
        width = max(map(len, distinct))
        # one position more than is read, rounded up to a multiple of 16, to which attention kernels align their masks
        size = -(-(width + limit + 1) // 16) * 16
        _refuse_windows(model, size)
        _refuse_dynamic_rope(model)
        attended = torch.zeros(len(distinct), size, dtype=torch.bool)
        ids = torch.zeros(len(distinct), width, dtype=torch.int64)
        for row, prompt in enumerate(distinct):
            attended[row, width - len(prompt) : width] = True
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attended, ids = attended.to(model.device), ids.to(model.device)
        positions = (attended[:, :width].long().cumsum(dim=1) - 1).clamp_min(0)
        mask = attended[:, :width].long()
        read = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        logits = next_logits(model, read.last_hidden_state[:, -1]).repeat_interleave(samples, dim=0)
        cache = _static_cache(cache_of(read), width, samples, size)
        del read
        attention = _decoding_attention(model, size)
        mask = attended[:, None, None].repeat_interleave(samples, dim=0)
        if attention == "eager":  # which adds its mask to the scores
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
        position = positions[:, -1:].repeat_interleave(samples, dim=0) + 1
        step = _Step(model, self.rule, cache, uniform.to(model.device), mask, position, width)
        step.take(logits)
        with attending(model, attention):
            _run(step, limit)
        return _responses(step.tokens.cpu(), self.rule)


class _Step:
    """Decode one token of all N rows; every tensor keeps its address, so that a captured step can be replayed.

    mask: [N, 1, 1, L], True where a row attends, or additive: 0 there and the dtype's least number elsewhere.
    """

    def __init__(
        self, model: Any, rule: Rule, cache: Cache, uniform: Tensor, mask: Tensor, position: Tensor, width: int
    ) -> None:
        self.model, self.rule, self.uniform = model, rule, uniform
        device = uniform.device
        self.tokens = torch.zeros(uniform.shape, dtype=torch.int64, device=device)
        self.token = torch.zeros(len(uniform), 1, dtype=torch.int64, device=device)
        self.done = torch.zeros(len(uniform), dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # tokens drawn
        self.column = torch.full((1,), width, dtype=torch.int64, device=device)  # where the next one is written
        self.position, self.mask = position, mask
        self._attended: bool | float = True if mask.dtype == torch.bool else 0.0
        self.mask.index_fill_(3, self.column, self._attended)
        rule.stop = rule.stop.to(device)  # once: a graph cannot copy from the CPU
        names = inspect.signature(model.base_model.forward).parameters
        # transformers before 5.2 needs it to find its place in the cache
        self._extra: dict[str, Any] = {"cache_position": self.column} if "cache_position" in names else {}
        self._extra[cache_argument(model.base_model)] = cache

    def __call__(self) -> None:
        hidden = self.model.base_model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask=self.mask,
            use_cache=True,
            **self._extra,
        ).last_hidden_state[:, -1]
        self.position += 1
        self.column += 1
        self.mask.index_fill_(3, self.column, self._attended)
        self.take(next_logits(self.model, hidden))

    def take(self, logits: Tensor) -> None:
        """Draw from [N, V] logits; rows that have stopped get 0."""
        drawn = self.rule.draw(logits, self.uniform.index_select(1, self.step)[:, 0], self.step)
        drawn = drawn.masked_fill(self.done, 0)
        self.tokens.index_copy_(1, self.step, drawn[:, None])
        self.token.copy_(drawn[:, None])
        self.done |= self.rule.ends(drawn)
        self.step += 1


def _run(step: _Step, limit: int) -> None:
    """Decode the tokens after the first. On a GPU the second and third warm up the kernels; the rest replay a graph."""
    on_gpu = step.tokens.device.type == "cuda"
    replay: Any = step
    for number in range(1, limit):
        if on_gpu and number == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and draws nothing
                step()
            replay = graph.replay
        if on_gpu and number < 3:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            replay()
        if number % _CHECK_EVERY == 0 and bool(step.done.all()):
            return


def _decoding_attention(model: Any, size: int) -> str:
    """Return the attention by which one token reads a masked cache of `size` positions: ours or one of the model's.

    flash-attn takes no mask over a cache. Softcapped scores are right in eager attention only; transformers offers such
    families no SDPA.
    """
    if shares_prefix(model, size):
        return _ATTENTION
    usual: str = model.config._attn_implementation
    if usual in ("sdpa", "eager"):
        return usual
    return "sdpa" if model._supports_sdpa else "eager"


def _static_cache(read: Any, width: int, samples: int, size: int) -> Cache:
    """Copy the prompts' cache [G, Hkv, P, d] into one of `size` positions and G x S rows; the layers of `read` go."""
    layers: list[Any] = []
    positions = {"cache_position": torch.arange(width, device=read.layers[0].keys.device)}
    for layer in read.layers:
        fixed = StaticLayer(max_cache_len=size)
        fixed.update(*(part.repeat_interleave(samples, dim=0) for part in (layer.keys, layer.values)), positions)
        layer.keys = layer.values = None
        layers.append(fixed)
    return Cache(layers=layers)


def _refuse_windows(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds <= {"full_attention", "sliding_attention"} and (window is None or window >= size):
        return
    if kinds == {"full_attention"} and getattr(config, "use_sliding_window", None) is False:
        return
    raise ValueError(
        f"rollout.engine: expected shared_prefix for {config.model_type}, whose layers do not all attend "
        f"to {size} positions, got static"
    )


def _refuse_dynamic_rope(model: Any) -> None:
    """Refuse rope_type dynamic: the CPU decides at every token if frequencies change, which a graph cannot capture."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each kind of layer
    if any(part.get("rope_type") == "dynamic" for part in parts):
        raise ValueError(
            f"rollout.engine: expected shared_prefix for {config.model_type} with rope_type dynamic, "
            "whose rotary frequencies change with the length, got static"
        )


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with [B, H, 1, d] queries to [B, Hkv, L, d] keys; the heads that share keys become H / Hkv queries.

    SDPA takes its slow path for grouped heads with a mask, and transformers therefore copies the keys H / Hkv times at
    every token.
    """
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    out = scaled_dot_product_attention(
        query.view(batch, groups, heads // groups, dim), key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(batch, 1, heads, -1), None


AttentionInterface.register(_ATTENTION, _attend)


def has_continuous_batching() -> bool:
    """Return whether transformers has the continuous batching that `Continuous` needs; early releases of 5 lack it."""
    return hasattr(transformers, "ContinuousBatchingConfig")


class Continuous:
    """transformers' continuous batching: rows join and leave at every token; keys and values are stored in pages.

    It draws its own random numbers, seeded by a digest of `uniform`, in the order of the rows. The same batch gets the
    same responses, but unlike with the other engines a row's response depends on its batch. On a CPU it is slow.
    """

    name = "continuous"

    def __init__(self, rule: Rule) -> None:
        if not has_continuous_batching():
            raise ValueError(
                "rollout.engine: expected a transformers with ContinuousBatchingConfig for continuous, got "
                f"{transformers.__version__}; shared_prefix and static do not need it"
            )
        if rule.min_new_tokens:
            raise ValueError(
                "rollout.min_new_tokens: expected 0 with engine continuous, which cannot forbid the stop token, "
                f"got {rule.min_new_tokens}"
            )
        self.rule = rule

    def __call__(self, model: Any, prompts: list[list[int]], uniform: Tensor) -> _Drawn:
        """See `Sampler`. RuntimeError if the batch comes back with rows missing; ValueError for scores that are
        softcapped without flash-attn."""
        model = causal_lm(model)
        attention = model.config._attn_implementation
        if attention == "eager" and getattr(model.config, "attn_logit_softcapping", None):
            raise ValueError(  # transformers' eager attention over pages ignores the cap
                f"rollout.engine: expected shared_prefix for {model.config.model_type} without flash-attn, "
                "whose attention scores are softcapped, got continuous"
            )
        limit, stop = uniform.shape[1], self.rule.stop.tolist()
        sampling = self.rule.sampling
        generation = transformers.GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=limit,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        seed = int.from_bytes(hashlib.sha256(uniform.numpy().tobytes()).digest()[:6], "big")
        on_gpu = model.device.type == "cuda"
        options = _paging(prompts, limit, seed)
        # transformers changes the attention, and does not restore it if it fails before the first row
        with torch.random.fork_rng(devices=[model.device] if on_gpu else []), attending(model, attention):
            torch.manual_seed(seed)
            outputs = model.generate_batch(prompts, generation_config=generation, **options)
        answers = list(outputs.values())  # in the prompts' order
        errors = {str(output.error) for output in answers if output.error is not None}
        if len(answers) != len(prompts) or errors or not all(output.generated_tokens for output in answers):
            why = ", ".join(sorted(errors)) or f"{len(answers)} rows of {len(prompts)}"
            raise RuntimeError(f"rollout.engine: continuous batching failed ({why}); shared_prefix does not use it")
        responses = [list(output.generated_tokens[:limit]) for output in answers]
        return responses, [response[-1] in stop for response in responses]


def _paging(prompts: list[list[int]], limit: int, seed: int) -> dict[str, Any]:
    """Return options that limit the cache to these rows; by default it takes nine tenths of the free memory."""
    kind = transformers.ContinuousBatchingConfig
    known = {field.name for field in dataclasses.fields(kind)}
    page = 32
    wanted: dict[str, Any] = {
        "page_size" if "page_size" in known else "block_size": page,
        "num_blocks": sum(-(-(len(prompt) + limit) // page) + 1 for prompt in prompts),
        "max_batch_tokens": max(len(prompts), 4096),
        "seed": seed,
        "auto_switch_to_flash": False,  # the policy's config chooses the attention
    }
    return {"continuous_batching_config": kind(**{name: value for name, value in wanted.items() if name in known})}


def _responses(tokens: Tensor, rule: Rule) -> _Drawn:
    """[N, T] ids -> the ids of each row up to its first stop token, and whether it has one."""
    ends = (tokens[..., None] == rule.stop.to(tokens.device)).any(dim=-1)
    stopped = ends.any(dim=1)
    lengths = torch.where(stopped, ends.long().argmax(dim=1) + 1, tokens.shape[1]).tolist()
    rows = tokens.tolist()
    return [row[:length] for row, length in zip(rows, lengths, strict=True)], stopped.tolist()
