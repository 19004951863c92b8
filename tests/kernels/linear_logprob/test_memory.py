"""The memory that a call allocates beyond its results, counted by torch's allocator, and the plan that bounds it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from prudent.kernels.linear_logprob import chunked
from prudent.kernels.linear_logprob.configs import (
    MAX_ROW_BYTES,
    MIN_COLUMNS,
    NARROW_ROWS,
    ROW_BYTES,
    SLOPE_BYTES,
    TILE_BYTES,
    plan,
)
from prudent.kernels.linear_logprob.contract import Inputs, Needs, OutputGrads, Saved


def allocations(run: Callable[[], Any]) -> tuple[int, int]:
    """(peak of the live bytes, largest single allocation) of `run` on a CPU, its own temporaries included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    live = peak = largest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak, largest = max(peak, live), max(largest, event.nbytes())
    return peak, largest


def make(t: int, d: int, v: int, dtype: torch.dtype, ignored: bool) -> Inputs:
    target = torch.randint(0, v, (t,))
    if ignored:
        target[::3] = -100
    return Inputs(torch.randn(t, d).to(dtype), torch.randn(v, d).to(dtype), target, 1.0, None, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [False, True])
def test_extra_memory_is_a_few_tiles_and_never_the_logits(dtype: torch.dtype, ignored: bool) -> None:
    t, d, v = 512, 64, 16384  # the logits would be 32 MiB in fp32
    inputs = make(t, d, v, dtype, ignored)
    rows = chunked.scored_rows(inputs)
    outputs: list[Any] = []
    peak, largest = allocations(lambda: outputs.extend(chunked.forward(inputs, rows)))
    grads = OutputGrads(*(torch.randn(t) for _ in range(3)))
    results: list[Tensor | None] = []

    def backward() -> None:
        results.extend(chunked.backward(grads, inputs, rows, Saved(*outputs[1:]), Needs(True, True)))

    peak_backward, largest_backward = allocations(backward)
    returned = sum(g.numel() * g.element_size() for g in results if g is not None)
    # README: up to five tiles and a cast chunk of the weight, the rows' accumulator and gathered operands, [T] vectors
    tiles = 5 * TILE_BYTES["cpu"] + MAX_ROW_BYTES * d
    of_rows = t * d * (4 + 4 + dtype.itemsize) + 100 * t
    assert peak <= tiles + of_rows
    assert peak_backward - returned <= tiles + of_rows
    assert max(largest, largest_backward) < t * v  # bytes: a quarter of the logits


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_a_plan_stays_inside_its_budgets(device: str) -> None:
    sizes = (1, 15, 16, 100, 4096, 4097, 16384, 1_000_000)
    for t, d, v in itertools.product(sizes, (1, 576, 4096, 16384), (1, 1000, 50257, 256_000)):
        for operand, accumulator in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            rows, columns, tiles = plan(t, d, v, operand, accumulator, device)
            assert 1 <= columns <= MAX_ROW_BYTES // accumulator.itemsize
            assert columns & (columns - 1) == 0  # a power of two: one compiled kernel a table row
            assert columns < 2 * max(16, v)
            row_bytes = rows * d * (operand.itemsize + accumulator.itemsize)
            assert row_bytes <= ROW_BYTES or rows <= 128
            tile = rows * columns * accumulator.itemsize
            assert tile <= TILE_BYTES[device] or columns <= MIN_COLUMNS[device]
            assert tiles == 1 or rows * columns * tiles * operand.itemsize <= SLOPE_BYTES[device]
            assert plan(t, d, v, operand, accumulator, device, narrow=True).rows <= (
                NARROW_ROWS if device == "gpu" else rows
            )


@pytest.mark.parametrize(("ignored", "percent"), [(False, 1.62), (True, 2.01)])
def test_the_workspace_of_the_stated_goal(ignored: bool, percent: float) -> None:
    """T = 16384, D = 4096, V = 128256 in bf16 on a GPU: hidden gradient of a chunk, its tile, its slopes and, if rows
    may be ignored, its hidden states with zeros there; in percent of the logits in fp32. README has the table.
    """
    t, d, v = 16384, 4096, 128256
    rows, columns, tiles = plan(t, d, v, torch.bfloat16, torch.float32, "gpu")
    assert (rows, columns, tiles) == (4096, 2048, 2)
    workspace = rows * (4 * d + 2 * d * ignored) + rows * columns * (4 + 2 * tiles)
    vectors = 12 * t * 8  # outputs, saved statistics, outer gradients, targets and mask
    assert 100 * (workspace + vectors) / (4 * t * v) == pytest.approx(percent, abs=0.005)
