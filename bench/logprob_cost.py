"""What a forward and backward of `linear_logprob` costs on a GPU, by its operations and bytes; nothing is timed.
`python -m prudent.bench.logprob_cost` prints the table of kernels/linear_logprob/README.md.

The GPU execution runs on tensors without data. Each matrix product, each Triton launch and each other operation of
torch is counted as it is called, with the bytes of the tensors that it reads and writes. A step takes its operations at
PRODUCT_RATE or its bytes at BANDWIDTH, whichever is longer; no step overlaps another, and no cache is assumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import recording
from ..kernels.linear_logprob import call, chunked
from ..kernels.linear_logprob import triton as execution  # type: ignore[attr-defined]
from ..kernels.linear_logprob.contract import DERIVATIVE, Inputs, Needs, OutputGrads, Saved

BANDWIDTH = 4.8e12  # bytes/s, an H200's memory
PRODUCT_RATE = 750e12  # operations/s, assumed: three products of the shape below in the 17.3 ms that QuACK states
T, D, V = 4096, 4096, 128256

# name: keep, is the weight trained, has the loss an entropy
STRATEGIES = {
    "trained head, nothing kept (default)": (0, True, False),
    "trained head, numerators of all rows kept": (2 * T * V, True, False),
    "trained head, numerators of half the rows kept": (T * V, True, False),
    "frozen head, derivative kept (default)": (DERIVATIVE, False, False),
    "frozen head, entropy in the loss, nothing kept": (0, False, True),
    "frozen head, entropy in the loss, derivative kept in vain": (DERIVATIVE, False, True),
    "frozen head, entropy in the loss, numerators kept": (2 * T * V, False, True),
}


class Cost(NamedTuple):
    """products: in units of 2 T D V operations. moved: bytes read and written. kept: bytes from forward to backward
    beyond [T] vectors. seconds: by the rates above.
    """

    products: float
    moved: int
    kept: int
    seconds: float


class _Counter(TorchDispatchMode):
    """Adds up the steps of a call. Views and allocations cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.moved, self.seconds = 0, 0, 0.0

    def step(self, operations: int, moved: int) -> None:
        self.operations += operations
        self.moved += moved
        self.seconds += max(operations / PRODUCT_RATE, moved / BANDWIDTH)

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool, work: object) -> None:
        """In place of products.product."""
        self.step(2 * a.shape[0] * a.shape[1] * b.shape[1], a.nbytes + b.nbytes + out.nbytes * (2 if add else 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        free = func.is_view or "empty" in func.name() or "reshape" in func.name()
        if not free:
            given = [*args, *(kwargs or {}).values(), result if isinstance(result, Tensor) else None]
            self.step(0, sum(t.nbytes for t in given if isinstance(t, Tensor)))
        return result


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let meta tensors take the decisions of CUDA tensors, which a build of torch without CUDA cannot fake."""
    with (
        mock.patch.object(call, "operand_dtype", lambda storage, accumulator, device: storage),
        mock.patch.object(chunked, "without_autocast", return_value=contextlib.nullcontext()),
    ):
        yield


@contextlib.contextmanager
def _counting() -> Iterator[_Counter]:
    counter = _Counter()
    with (
        as_on_a_gpu(),
        mock.patch.object(chunked, "product", counter.product),
        mock.patch.object(call, "product", counter.product),
        recording() as launches,
        counter,
    ):
        yield counter
    for launch in launches:  # every tensor of these kernels is read or written once
        counter.step(0, sum(t.nbytes for t in launch.arguments.values() if isinstance(t, Tensor)))


def cost(keep: int, trained: bool, entropy: bool, rows: int = T) -> Cost:
    """Forward and backward of `rows` x D x V in bf16, whose loss depends on logprob, and on entropy if asked."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inputs = Inputs(empty(rows, D), empty(V, D), empty(rows, dtype=torch.int64), 1.0, None, None)
    outer = empty(rows, dtype=torch.float32)
    with _counting() as counter:
        results = execution.forward(inputs, None, keep)
        grads = OutputGrads(outer, outer if entropy else None, None)
        execution.backward(grads, inputs, None, Saved(*results[1:], keep), Needs(True, trained))
    kept = results.kept.nbytes + results.peaks.nbytes
    return Cost(counter.operations / (2 * rows * D * V), counter.moved, kept, counter.seconds)


def table() -> str:
    """The README's table, in Markdown."""
    lines = [
        "| forward and backward | products | GB moved | GB kept | ms, estimated |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, strategy in STRATEGIES.items():
        found = cost(*strategy)
        cells = (
            f"{found.products:g}",
            f"{found.moved / 1e9:.1f}",
            f"{found.kept / 1e9:.2f}",
            f"{found.seconds * 1e3:.1f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
