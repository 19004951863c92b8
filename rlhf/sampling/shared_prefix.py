"""Sample many responses per prompt, fast on a CPU: each prompt is read once and its keys and values are shared.

transformers' own cache keeps a copy of the prompt for every sample and grows by concatenation: with 256 samples of one
48-token prompt, SmolLM2-135M in bf16 on two AVX512-BF16 cores spends 15 % of a step in its matrix products. Here a
prompt's keys and values stay one block that all its samples attend to in one product, the samples' own keys and values
go into a buffer of the final length, and a finished sample leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ...engine.taps import Tap, capturing, num_layers
from ..models.causal_lm import SHARING_MODELS, cache_argument, cache_of, next_logits
from .response_taps import ResponseTaps
from .tokens import Rule

_ATTENTION = "prudent_shared_prefix"


class Sampled(NamedTuple):
    """G prompts x S samples, row g * S + s.

    tokens    [G * S] lists of response ids, with the stop token if one was drawn
    stopped   [G * S] whether the last id is a stop token (False: cut at max_new_tokens)
    features  [G * S, F] the taps, concatenated, in the trunk's dtype, on the CPU. Closing tokens replace the stop
              token; `last` reads the last of them, `mean` and `logprob` the response with them. None without closing
              tokens
    """

    tokens: list[list[int]]
    stopped: list[bool]
    features: Tensor | None


class _SharedLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' [G, Hkv, P, d], and the samples' own [G, Hkv, S, T, d].

    padding [G, 1, P] is True after the end of a shorter prompt; None if all prompts have one length.
    """

    def __init__(self, keys: Tensor, values: Tensor, padding: Tensor | None, samples: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix = (keys.float(), values.float())  # exact in fp32, and attention is a small part of the time
        self.padding = padding
        groups, heads, _, dim = keys.shape
        self.own = tuple(keys.new_empty((groups, heads, samples, capacity, dim), dtype=torch.float32) for _ in range(2))
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: the constructor has the shapes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [G * S, Hkv, 1, d] in place; return the arguments, because the attention reads this layer itself."""
        for buffer, new in zip(self.own, (key_states, value_states), strict=True):
            groups, heads, samples, _, dim = buffer.shape
            buffer[:, :, :, self.length] = new.view(groups, samples, heads, dim).transpose(1, 2)
        self.length += 1
        return key_states, value_states

    def select(self, groups: Tensor, samples: Tensor) -> None:
        """Keep prompts `groups` [G'] and of each the samples `samples` [G', S']."""
        if len(groups) < len(self.prefix[0]):
            self.prefix = (self.prefix[0][groups], self.prefix[1][groups])
            self.padding = None if self.padding is None else self.padding[groups]
        # advanced indices on dimensions 0 and 2 come first: [G', S', Hkv, T, d]
        picked = (buffer[groups[:, None], :, samples].transpose(1, 2) for buffer in self.own)
        self.own = tuple(buffer.contiguous() for buffer in picked)

    def get_seq_length(self) -> int:
        return int(self.prefix[0].shape[2]) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_max_length(self) -> int:
        return int(self.prefix[0].shape[2] + self.own[0].shape[3])

    get_max_cache_shape = get_max_length  # its name in earlier transformers 5


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    shared_prefix: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [B, H, L, d] queries: causal while the prompt is read (no `shared_prefix`), then one token a row."""
    if shared_prefix is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    layer: Any = shared_prefix.layers[module.layer_idx]  # type: ignore[index]
    groups, heads, length, dim = layer.prefix[0].shape
    samples = layer.own[0].shape[2]
    rep = query.shape[1] // heads
    q = query.view(groups, samples, heads, rep, dim).transpose(1, 2).float() * scaling  # [G, Hkv, S, rep, d]
    q = q.reshape(groups * heads, samples * rep, dim)
    flat = (groups * heads * samples, rep, dim)
    keys, values = (block.flatten(0, 1) for block in layer.prefix)
    own_keys, own_values = (buffer[:, :, :, : layer.length].flatten(0, 2) for buffer in layer.own)
    to_prompt = torch.bmm(q, keys.transpose(1, 2))
    if layer.padding is not None:
        to_prompt.view(groups, -1, length).masked_fill_(layer.padding, float("-inf"))
    to_own = torch.bmm(q.reshape(flat), own_keys.transpose(1, 2)).view(groups * heads, samples * rep, layer.length)
    weights = torch.softmax(torch.cat([to_prompt, to_own], dim=-1), dim=-1)
    out = torch.bmm(weights[..., :length], values)
    own = weights[..., length:].reshape(groups * heads * samples, rep, layer.length)
    out = out.view(flat) + torch.bmm(own, own_values)
    out = out.view(groups, heads, samples, rep * dim).transpose(1, 2)
    return out.reshape(groups * samples, 1, heads * rep, dim).to(query.dtype), None


AttentionInterface.register(_ATTENTION, _attend)


def shares_prefix(model: PreTrainedModel, length: int) -> bool:
    """Return whether `model` can decode `length` positions on shared prompts; otherwise every sample has a copy."""
    window = getattr(model.config, "sliding_window", None)
    return model.config.model_type in SHARING_MODELS and (window is None or length <= window)


@contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Give `model` the attention registered as `name` for the length of the block."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


class Decoder:
    """Read G prompts once, then S samples of each, token by token; finished rows leave the batch.

    Attributes:
        hidden: [G, D] the trunk's last hidden states after the prompts.
        grid: [G', S'] numbers of the remaining rows; row g * S + s is sample s of prompt g.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        samples: int,
        capacity: int,
        states: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Use `decoder` instead: it restores the model's attention. capacity: the most tokens that a sample reads."""
        self._trunk = model.base_model
        self._states = {} if states is None else states
        lengths = torch.tensor([len(ids) for ids in prompts])
        width = int(lengths.max())
        self._even = bool((lengths == width).all())
        self._lengths = lengths.repeat_interleave(samples).to(model.device)
        self._mask: Tensor | None = None  # of the copied cache, if prompts have several lengths
        self._read = 0
        self.sharing = shares_prefix(model, width + capacity)
        self.grid = torch.arange(len(prompts) * samples).view(len(prompts), samples)
        # shared prompts are padded on the right, where causal attention needs no mask; copied ones on the left, as
        # transformers does; the ids of the padding do not matter
        padding = [[0] * (width - len(ids)) for ids in prompts]
        both = zip(prompts, padding, strict=True)
        rows = [[*ids, *pad] if self.sharing else [*pad, *ids] for ids, pad in both]
        extra: dict[str, Any] = {}
        if not (self._even or self.sharing):
            place = torch.arange(width) - (width - lengths)[:, None]
            extra = {"position_ids": place.clamp_min(0), "attention_mask": (place >= 0).long()}
            extra = {name: value.to(model.device) for name, value in extra.items()}
        output = self._trunk(input_ids=torch.tensor(rows).to(model.device), use_cache=True, **extra)
        cache: Any = cache_of(output)
        self._cache_argument = cache_argument(self._trunk)
        last = (lengths if self.sharing else torch.full_like(lengths, width)) - 1
        hidden = output.last_hidden_state
        self.hidden = hidden[:, -1] if self._even else hidden[torch.arange(len(prompts)), last.to(hidden.device)]
        if self.sharing:
            behind = None
            if not self._even:
                behind = (torch.arange(width) >= lengths[:, None])[:, None].to(model.device)
            layers: list[Any] = [
                _SharedLayer(layer.keys, layer.values, behind, samples, capacity) for layer in cache.layers
            ]
            self._cache: Any = Cache(layers=layers)
        else:
            # not batch_repeat_interleave, which layers of linear attention have not
            if not hasattr(cache, "reorder_cache"):
                raise ValueError("transformers gives no cache whose rows can be selected")
            cache.reorder_cache(torch.arange(len(prompts), device=model.device).repeat_interleave(samples))
            self._cache = cache
            if not self._even:
                self._mask = extra["attention_mask"].repeat_interleave(samples, dim=0)

    def feed(self, ids: Tensor) -> Tensor:
        """[grid.numel()] ids, in the grid's order -> the hidden states [grid.numel(), D] after them."""
        extra: dict[str, Any] = {self._cache_argument: self._cache}
        if self.sharing:
            extra["shared_prefix"] = self._cache
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
            extra["attention_mask"] = self._mask
        lengths = self._lengths[:1] if self._even else self._lengths
        hidden: Tensor = self._trunk(
            input_ids=ids[:, None].to(lengths.device),
            position_ids=lengths[:, None] + self._read,
            use_cache=True,
            **extra,
        ).last_hidden_state[:, -1]
        self._read += 1
        return hidden

    def state(self, layer: int) -> Tensor | None:
        """[n, D] the state of a layer at the tokens just fed; None of the trunk's output, which `feed` returned."""
        return self._states[layer][:, -1] if layer in self._states else None

    def shrink(self, done: Tensor) -> None:
        """Drop finished rows (done: [G * S] bool, on the CPU) once that saves a fifth: prompts with none left, and
        samples that no prompt needs."""
        live = ~done[self.grid]
        groups = live.any(dim=1).nonzero()[:, 0]
        width = int(live.sum(dim=1).max())
        if len(groups) * width > 0.8 * self.grid.numel():
            return
        # live samples first, in order; a prompt with fewer is filled up with finished ones, whose results nobody reads
        samples = torch.argsort((~live[groups]).int(), dim=1, stable=True)[:, :width]
        kept = (groups[:, None] * self.grid.shape[1] + samples).flatten().to(self._lengths.device)
        if self.sharing:
            for layer in self._cache.layers:
                layer.select(groups, samples)
        else:
            self._cache.reorder_cache(kept)
            self._mask = None if self._mask is None else self._mask[kept]
        self._lengths = self._lengths[kept]
        self.grid = self.grid[groups[:, None], samples]


@contextmanager
def decoder(
    model: Any, prompts: Sequence[Sequence[int]], samples: int, capacity: int, taps: Sequence[Tap] = ()
) -> Iterator[Decoder]:
    """Open a `Decoder`; at the end of the block the model has its own attention again.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompts: G lists of token ids, of any lengths.
        samples: S.
        capacity: the most tokens that a sample reads.
        taps: whose layers `Decoder.state` gives.
    """
    longest = max(map(len, prompts))
    with (
        attending(model, _ATTENTION) if shares_prefix(model, longest + capacity) else nullcontext(),
        capturing(model.base_model, [tap.layer for tap in taps]) as states,
    ):
        yield Decoder(model, prompts, samples, capacity, states)


@torch.no_grad()
def sample_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    samples: int,
    uniform: Tensor,
    rule: Rule,
    closing: Sequence[int] = (),
    taps: Sequence[Tap] | None = None,
    skips: Sequence[int] = (),
) -> Iterator[int | Sampled]:
    """Sample S responses to each of G prompts; yields how many tokens each step drew, then the `Sampled`.

    Args:
        model: a causal language model of transformers, in eval mode.
        prompts: G lists of token ids, of any lengths.
        samples: S.
        uniform: [G * S, max_new_tokens] numbers in [0, 1): token t of row i is drawn with uniform[i, t], so that the
            same numbers give the same responses.
        rule: how a token is drawn, and which tokens end a response.
        closing: ids read after every response, cut ones too.
        taps: the features; None: the trunk's output after the last closing token.
        skips: ids that a tap of kind `logprob` leaves out.
    """
    limit = uniform.shape[1]
    taps = (Tap("last", num_layers(model)),) if taps is None else taps
    with decoder(model, prompts, samples, limit + len(closing), taps) as batch:
        rows = _Rows(len(prompts) * samples, rule, closing, limit)
        response = ResponseTaps(taps, model, len(rows.done), skips)
        hidden, fed = batch.hidden.repeat_interleave(samples, dim=0), batch.grid.flatten()
        while True:
            drawing = rows.drawing(fed)
            if len(drawing):
                spent = uniform[fed[drawing], rows.step].to(hidden.device)
                drawn = rule.draw(next_logits(model, hidden[drawing.to(hidden.device)]), spent, rows.step)
                yield rows.take(fed[drawing], drawn.tolist())
            if rows.done.all():
                break
            if response.needs_next:
                next_ids = torch.tensor([rows.next_input(row, keep=True) for row in fed.tolist()])
                response.predict(fed, hidden, next_ids, ~rows.done[fed])
            batch.shrink(rows.done)
            fed = batch.grid.flatten()
            hidden = batch.feed(torch.tensor([rows.next_input(row) for row in fed.tolist()]))
            rows.keep_features(fed, response.read(fed, hidden, batch.state))
    yield Sampled(rows.tokens, rows.stopped, torch.stack(rows.features) if closing else None)


class _Rows:
    """The tokens drawn for each row, and those it reads next. All rows that still draw have drawn `step` tokens."""

    def __init__(self, count: int, rule: Rule, closing: Sequence[int], limit: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.stopped = [False] * count
        self.features: list[Tensor] = [torch.empty(0)] * count
        self.done = torch.zeros(count, dtype=torch.bool)
        self.step = 0
        self._queue: list[list[int]] = [[] for _ in range(count)]
        self._closed = [False] * count
        self._stop, self._closing, self._limit = set(rule.stop.tolist()), list(closing), limit

    def take(self, rows: Tensor, drawn: list[int]) -> int:
        """Add the tokens drawn for `rows`; return their number."""
        self.step += 1
        for row, token in zip(rows.tolist(), drawn, strict=True):
            self.tokens[row].append(token)
            self.stopped[row] = token in self._stop
            if not self.stopped[row]:
                self._queue[row].append(token)
            if self.stopped[row] or self.step == self._limit:
                self._queue[row] += self._closing
                self._closed[row] = True
                self.done[row] = not self._closing
        return len(drawn)

    def next_input(self, row: int, *, keep: bool = False) -> int:
        """The token that a row reads next, 0 for a finished one; `keep` leaves it in the queue."""
        if not self._queue[row]:
            return 0
        return self._queue[row][0] if keep else self._queue[row].pop(0)

    def keep_features(self, fed: Tensor, hidden: Tensor) -> None:
        """Finish the rows that have just read their last closing token; their hidden state is the feature."""
        for position, row in enumerate(fed.tolist()):
            if self._closed[row] and not self._queue[row] and not self.done[row]:
                self.done[row] = True
                self.features[row] = hidden[position].cpu().clone()

    def drawing(self, fed: Tensor) -> Tensor:
        """Return the positions in `fed` whose rows draw another token now."""
        return torch.tensor([i for i, row in enumerate(fed.tolist()) if not self._closed[row]], dtype=torch.int64)
