"""Taps: which hidden states of one forward pass the reward heads and the distance read, and how they are captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

Kind = Literal["last", "mean"]


class Tap(NamedTuple):
    """One state [D] of a sequence, written `last:12` or `mean:20`.

    kind   last: at the one token that the model's pooling names. mean: the mean over the response's tokens, of which
           the tokens that close the response are part.
    layer  the index in transformers' `hidden_states`: 0 the embeddings, the number of layers the trunk's output (after
           its final norm).
    """

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.layer}"


def parse_taps(texts: Sequence[str | Tap], num_layers: int) -> tuple[Tap, ...]:
    """Parse taps, such as ["last:30", "mean:20"]; a negative layer counts from the end, -1 being the trunk's output.

    Raises:
        ValueError: for no tap, one given twice, another form, or a layer that the trunk does not have.
    """
    taps = tuple(_parsed(text, num_layers) for text in texts)
    if not taps or len(set(taps)) != len(taps):
        raise ValueError(f"taps: expected one or more different ones, got {', '.join(map(str, texts)) or 'none'}")
    return taps


def _parsed(text: str | Tap, num_layers: int) -> Tap:
    kind, _, number = str(text).partition(":")
    if kind not in get_args(Kind) or not number.removeprefix("-").isdecimal():
        raise ValueError(f"taps: expected last:LAYER or mean:LAYER, got {str(text)!r}")
    layer = int(number) + (num_layers + 1 if int(number) < 0 else 0)
    if not 0 <= layer <= num_layers:
        raise ValueError(f"taps: expected a layer from 0 to {num_layers} (the trunk's output), got {str(text)!r}")
    return Tap(kind, layer)  # type: ignore[arg-type]


@contextmanager
def capturing(trunk: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect `hidden_states[layer]` [B, T, D] of every forward pass of `trunk` in the block, for each of `layers`.

    The dictionary holds the states of the latest pass. The trunk's output, layer `num_hidden_layers`, is not collected:
    the pass returns it as `last_hidden_state`. Hooks keep the wanted states alone; `output_hidden_states=True` would
    keep those of every layer in memory.

    Raises:
        ValueError: if the trunk's list of layers cannot be found.
    """
    total = num_layers(trunk)
    inner = sorted({layer for layer in layers if layer < total})
    states: dict[int, Tensor] = {}
    blocks = _blocks(trunk, total) if inner else nn.ModuleList()
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
    return int(trunk.config.get_text_config().num_hidden_layers)


def _blocks(trunk: Any, total: int) -> nn.ModuleList:
    found = [module for module in trunk.modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    if not found:
        raise ValueError(f"taps: expected a list of {total} layers in the trunk, found none in {type(trunk).__name__}")
    return found[0]


def read_taps(
    taps: Sequence[Tap], states: Mapping[int, Tensor], output: Tensor, rows: Tensor, response: Tensor | None
) -> Tensor:
    """Concatenate taps: [B, len(taps) * D] in the states' dtype, differentiable.

    Args:
        states: layer -> [B, T, D], as `capturing` collects them.
        output: [B, T, D] the trunk's output, the state of layer `num_hidden_layers`.
        rows: [B] int64, for each sequence the row of [B * T, D] that a tap of kind `last` reads.
        response: [B, T], non-zero at the tokens that a tap of kind `mean` averages, at least one a row; only such taps
            need it.
    """
    parts = []
    for tap in taps:
        state = states.get(tap.layer, output)
        if tap.kind == "last":
            parts.append(state.flatten(0, 1).index_select(0, rows))
            continue
        assert response is not None
        share = response.float() / response.sum(dim=1, keepdim=True)
        # fp32, in which a mean over thousands of 16-bit states is exact enough
        parts.append(torch.einsum("bt,btd->bd", share, state.float()).to(state.dtype))
    return torch.cat(parts, dim=1)
