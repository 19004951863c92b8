"""Taps: which hidden states of one forward pass the reward heads and the distance read, and how they are captured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["last", "mean", "logprob"]
_LAYER = re.compile(r"-?\d+|\d+/[1-9]\d*")
LOGPROB_SIZE = 2  # columns of the tap `logprob`: see `likelihood.response_logprob`


class Tap(NamedTuple):
    """What is read of a sequence: one state [D], written `last:12` or `mean:20`, or `logprob`, two numbers.

    kind   last: at the one token that the model's pooling names. mean: the mean over the response's tokens, of which
           the tokens that close the response are part. logprob: the mean and the least log-probability of these tokens
           under the trunk's own language-model head.
    layer  the index in transformers' `hidden_states`: 0 the embeddings, the number of layers the trunk's output (after
           its final norm). Between them it is what block `layer` gets, also in families whose `hidden_states` begin
           after the first block (Mamba's). Of `logprob` it is the number of layers.
    """

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return self.kind if self.kind == "logprob" else f"{self.kind}:{self.layer}"

    def width(self, hidden_size: int) -> int:
        """How many columns of the features it fills."""
        return LOGPROB_SIZE if self.kind == "logprob" else hidden_size


def wide_taps(num_layers: int) -> tuple[Tap, ...]:
    """What `wide` stands for: the trunk's output at the pooled token, and the mean over the response at two thirds of
    the layers, where a distance sees foreign text best (SmolLM2-135M: layer 20 of 30)."""
    return Tap("last", num_layers), Tap("mean", round(2 * num_layers / 3))


def parse_taps(taps: str | Sequence[str | Tap], num_layers: int) -> tuple[Tap, ...]:
    """Parse `last`, `wide`, or taps such as ["last:-1", "mean:2/3", "logprob"]; a negative layer counts from the end,
    -1 being the trunk's output, and a fraction is that share of the layers, to the nearest.

    Raises:
        ValueError: for no tap, one given twice, another form, or a layer that the trunk does not have.
    """
    check_taps(taps)
    if taps == "wide":
        return wide_taps(num_layers)
    parsed = tuple(_parsed(str(tap), num_layers) for tap in (["last:-1"] if taps == "last" else taps))
    if len(set(parsed)) != len(parsed):
        raise ValueError(f"taps: expected different ones, got {', '.join(map(str, taps))}")
    return parsed


def check_taps(taps: str | Sequence[str | Tap]) -> None:
    """Raise ValueError for taps of another form; whether the trunk has their layers, only `parse_taps` can tell."""
    if isinstance(taps, str):
        if taps not in ("last", "wide"):
            raise ValueError(f"taps: expected last, wide, or a list of taps such as mean:20, got {taps!r}")
        return
    for tap in map(str, taps):
        kind, _, number = tap.partition(":")
        if tap != "logprob" and (kind not in ("last", "mean") or not _LAYER.fullmatch(number)):
            raise ValueError(
                f"taps: expected last:LAYER, mean:LAYER (a number, or a share such as 2/3) or logprob, got {tap!r}"
            )
    if not taps:
        raise ValueError("taps: expected at least one, got none")


def _parsed(text: str, num_layers: int) -> Tap:
    if text == "logprob":
        return Tap("logprob", num_layers)
    kind, _, number = text.partition(":")
    layer = round(Fraction(number) * num_layers) if "/" in number else int(number)
    layer += num_layers + 1 if layer < 0 else 0
    if not 0 <= layer <= num_layers:
        raise ValueError(f"taps: expected a layer from 0 to {num_layers} (the trunk's output), got {text!r}")
    return Tap(kind, layer)  # type: ignore[arg-type]


def reads_response(taps: Sequence[Tap]) -> bool:
    """Whether a tap reads the response's tokens, so that one must know where the response begins."""
    return any(tap.kind != "last" for tap in taps)


def reads_logprob(taps: Sequence[Tap]) -> bool:
    """Whether a tap is the response's log-probability, for which one needs the language-model head."""
    return any(tap.kind == "logprob" for tap in taps)


def columns_of(taps: Sequence[Tap], hidden_size: int) -> list[slice]:
    """Which columns of the features each tap fills."""
    ends = list(accumulate(tap.width(hidden_size) for tap in taps))
    return [slice(end - tap.width(hidden_size), end) for tap, end in zip(taps, ends, strict=True)]


def features_size(taps: Sequence[Tap], hidden_size: int) -> int:
    """F, the columns of all taps."""
    return sum(tap.width(hidden_size) for tap in taps)


@contextmanager
def capturing(trunk: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect `hidden_states[layer]` [B, T, D] of every forward pass of `trunk` in the block, for each of `layers`.

    The dictionary holds the states of the latest pass. The trunk's output, layer `num_hidden_layers`, is not collected:
    the pass returns it as `last_hidden_state`. Hooks keep the wanted states alone; `output_hidden_states=True` would
    keep those of every layer in memory. A state is the tensor that the next block reads, so that gradients flow through
    it, under gradient checkpointing too.

    Raises:
        ValueError: if the trunk's list of layers cannot be found.
    """
    total = num_layers(trunk)
    inner = sorted({layer for layer in layers if layer < total})
    # empty until captured: a family that calls a block's parts itself then fails by its shape, and not silently
    states: dict[int, Tensor] = {layer: torch.empty(0) for layer in inner}
    blocks = blocks_of(trunk) if inner else nn.ModuleList()
    hooks = [
        # the state before block `layer` is hidden_states[layer]: blocks may return tuples, but all take the state first
        blocks[layer].register_forward_pre_hook(_keeper(states, layer), with_kwargs=True)
        for layer in inner
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _keeper(states: dict[int, Tensor], layer: int) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[layer] = args[0] if args else kwargs["hidden_states"]

    return keep


def num_layers(trunk: Any) -> int:
    """The trunk's number of layers, the index of its output in `hidden_states`."""
    return layers_of(trunk.config)


def layers_of(config: Any) -> int:
    """`num_layers` of a trunk with this configuration. Raises ValueError if it does not say."""
    config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(f"taps: expected a trunk with config.num_hidden_layers, got {config.model_type!r} without it")
    return layers


def blocks_of(trunk: Any) -> nn.ModuleList:
    """The trunk's list of layers. Raises ValueError if it has none of that length, as where layers share weights."""
    total = num_layers(trunk)
    found = [module for module in trunk.modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    if not found:
        raise ValueError(f"taps: expected a list of {total} layers in the trunk, found none in {type(trunk).__name__}")
    return found[0]


def read_taps(
    taps: Sequence[Tap],
    states: Mapping[int, Tensor],
    output: Tensor,
    rows: Tensor,
    response: Tensor | None,
    logprob: Tensor | None = None,
) -> Tensor:
    """Concatenate taps: [B, `features_size`] in the output's dtype, differentiable.

    Args:
        states: layer -> [B, T, D], as `capturing` collects them; packed: [1, T, D], the B sequences one after another.
        output: the same shape, the trunk's output, which a layer that `states` lacks stands for.
        rows: [B] int64, for each sequence the row of states.view(-1, D) that a tap of kind `last` reads.
        response: [B, T], non-zero at the tokens that a tap of kind `mean` averages, at least one a row; only such taps
            need it.
        logprob: [B, 2] from `likelihood.response_logprob`, for a tap of that kind.

    Raises:
        ValueError: for a trunk whose layers pass on states of another shape than its output's.
    """
    parts = []
    for tap in taps:
        if tap.kind == "logprob":
            assert logprob is not None
            parts.append(logprob)
            continue
        state = states.get(tap.layer, output)
        if state.shape != output.shape:
            raise ValueError(
                f"taps: expected a trunk whose layers pass on states of its output's shape {list(output.shape)}, got "
                f"{list(state.shape)} before layer {tap.layer}: read the trunk's output alone (last, mean:-1)"
            )
        if tap.kind == "last":
            parts.append(state.flatten(0, 1).index_select(0, rows))
            continue
        assert response is not None
        share = response.float() / response.sum(dim=1, keepdim=True)
        # fp32, in which a mean over thousands of 16-bit states is exact enough
        if len(state) == len(share):
            mean = torch.einsum("bt,btd->bd", share, state.float())
        else:
            mean = share @ state[0].float()
        parts.append(mean)
    return torch.cat([part.to(output.dtype) for part in parts], dim=1)
