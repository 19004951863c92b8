"""Repeat an op's launch for a call that differs from an earlier one only in the tensors' addresses and contents.

The first call of a class checks its arguments, chooses a tile and launches through Triton. From that launch a `Replay`
is made; the next call of the class allocates its outputs, puts the addresses in their places and starts the compiled
kernel. A class is all that a launch can depend on: each tensor's shape, strides, dtype, device and address modulo 16
(Triton compiles for aligned pointers), and the options. Values are not part of it: no launch depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch

CLASSES = 1024  # kept for an op; a loop over more row counts than that starts over
ALIGNMENT = 512  # bytes: torch's allocator aligns a tensor of its own so, and scratch gets the same

Key = tuple[Any, ...]


def describe(tensors: Sequence[Tensor | None], options: Sequence[object]) -> tuple[Key, list[int]] | None:
    """(the call's class, each tensor's address); None for a value that has neither strides nor an address.

    Options are told apart by type too: True == 1.0, but only one of them is a number.
    """
    key: list[Any] = [*options, *map(type, options)]
    addresses = []
    try:
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                addresses.append(0)
            else:
                address = tensor.data_ptr()
                key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address & 15)
                addresses.append(address)
    except (AttributeError, RuntimeError):  # not a tensor; a sparse one
        return None
    return tuple(key), addresses


class Fresh(NamedTuple):
    """A contiguous tensor to allocate in every call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Replay(NamedTuple):
    """One class's launch. In `arguments`, places of tensors hold None until a call fills its own copy."""

    direct: Any  # of direct.py
    grid: tuple[int, int, int]
    device: torch.device
    arguments: list[Any]
    inputs: list[tuple[int, int]]  # (place among the arguments, index of the input)
    outputs: list[tuple[Fresh | None, int]]  # (what to allocate, place or -1 if the kernel does not take it)
    scratch: list[tuple[int, int]]  # (place, offset in one buffer of scratch)
    scratch_bytes: int
    counters: int  # place

    def __call__(self, addresses: Sequence[int], counters: Callable[[torch.device], Tensor]) -> list[Tensor | None]:
        """The outputs; `counters` gives the current stream's arrival counters."""
        arguments = self.arguments.copy()
        for place, i in self.inputs:
            arguments[place] = addresses[i]
        results: list[Tensor | None] = []
        for fresh, place in self.outputs:
            if fresh is None:
                results.append(None)
                continue
            tensor = torch.empty_strided(fresh.shape, fresh.strides, dtype=fresh.dtype, device=self.device)
            results.append(tensor)
            if place >= 0:
                arguments[place] = tensor.data_ptr()
        scratch = torch.empty_strided((self.scratch_bytes,), (1,), dtype=torch.uint8, device=self.device)
        base = scratch.data_ptr()
        for place, offset in self.scratch:
            arguments[place] = base + offset
        arrived = counters(self.device)
        arguments[self.counters] = arrived.data_ptr()
        self.direct.start(self.grid, self.device, arguments)
        return results


def of_launch(
    launch: Launch,
    compiled: Any,
    inputs: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor | None],
    scratch: Sequence[str],
) -> Replay | None:
    """The launch that just made `outputs` from `inputs`, both by the kernel's names, `inputs` in the order of
    `describe`.

    None if it cannot be repeated: there is no compiled kernel (the interpreter), Triton's interface is unknown, or a
    tensor among the arguments is neither the input or output of its name, nor in `scratch`, nor `counters`: then it was
    computed from the inputs.
    """
    from .direct import Direct

    direct = None if compiled is None else Direct.of(launch.kernel, compiled)
    if direct is None or not all(t is None or t.is_contiguous() for t in outputs.values()):
        return None
    order, arguments = list(inputs), []
    given, made, buffers, size, counters = [], {}, [], 0, -1
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        arguments.append(None if isinstance(value, Tensor) else value)
        if not isinstance(value, Tensor):
            continue
        if inputs.get(name) is value:
            given.append((place, order.index(name)))
        elif outputs.get(name) is value:
            made[name] = place
        elif name in scratch:
            buffers.append((place, size))
            size += math.ceil(value.nbytes / ALIGNMENT) * ALIGNMENT
        elif name == "counters":
            counters = place
        else:
            return None
    fresh = [
        (None if t is None else Fresh(tuple(t.shape), t.stride(), t.dtype), made.get(name, -1))
        for name, t in outputs.items()
    ]
    device = next(t.device for t in inputs.values() if t is not None)
    x, y, z = (*launch.grid, 1, 1)[:3]
    return None if counters < 0 else Replay(direct, (x, y, z), device, arguments, given, fresh, buffers, size, counters)


class Replays:
    """An op's replays, by class."""

    def __init__(self) -> None:
        self._known: dict[Key, Replay] = {}

    def find(self, key: Key) -> Replay | None:
        """The replay of a class, if Triton would now launch the same."""
        try:
            replay = self._known.get(key)
        except TypeError:  # an option that cannot be hashed: the op's checks will refuse it
            return None
        return replay if replay is not None and replay.direct.usable(replay.device) else None

    def keep(self, key: Key, replay: Replay) -> None:
        if len(self._known) >= CLASSES:
            self._known.clear()
        self._known[key] = replay

    def clear(self) -> None:
        self._known.clear()
