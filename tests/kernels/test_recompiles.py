"""How often Triton compiles the kernels of `ensemble_reward`: once for what a model fixes, not for what a call varies.

A stand-in for the driver counts the compilations that Triton's own launcher asks for; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

from prudent.bench.fake_driver import Driver, fake_gpu  # noqa: E402
from prudent.kernels.ensemble_reward import TrustRegion, ensemble_reward  # noqa: E402
from prudent.kernels.ensemble_reward import triton as execution  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="under the interpreter nothing is launched")

K, D, STORED = 5, 128, 64  # D in one part for every number of rows
HIDDEN = torch.zeros(STORED, D, dtype=torch.bfloat16)
FIXED: dict[str, Any] = {
    "weight": torch.zeros(2 * K, D), "bias": torch.zeros(2 * K), "norm_weight": torch.ones(D, dtype=torch.bfloat16),
}  # fmt: skip


@pytest.fixture
def gpu() -> Iterator[Driver]:
    with fake_gpu() as driver:
        yield driver


def call(rows: Tensor, **given: Any) -> None:
    """A call past what the op remembers, through Triton's launcher."""
    execution.forget()
    ensemble_reward(HIDDEN, **{**FIXED, "rows": rows, "seed": torch.tensor([7]), **given})


def indices(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("aggregation", ["tradeoff:0.4", "batch_worst", "lcb:1,trust=1"])
def test_the_number_of_rows_compiles_nothing_again_where_nothing_is_centred(gpu: Driver, aggregation: str) -> None:
    """Row counts of one tile; above 1024 and 2048 a sweep by the last program would be wider."""
    region = TrustRegion(*(torch.ones(*shape) for shape in ((D,), (D,), (0, D), (0,), (1,), (1,))))
    for n in (1025, 2048, 2049, 5000, 9001):
        call(indices(n), aggregation=aggregation, trust=region if "trust" in aggregation else None)
    assert len(gpu.starts) == 5
    assert len(gpu.compilations) == 1


def test_the_number_of_rows_compiles_nothing_again_where_groups_are_whole_in_a_row_block(gpu: Driver) -> None:
    for n in (1028, 2048, 2052, 9000):
        call(indices(n), aggregation="min,centre=group", group=4)
    assert len(gpu.compilations) == 1


def test_the_address_of_a_small_argument_compiles_nothing_again(gpu: Driver) -> None:
    """A seed that is an element of a larger tensor, rows[1:], a bias or a calibration out of a packed vector."""
    call(indices(9), shift=torch.zeros(K), scale=torch.ones(K))
    numbers = torch.zeros(3, dtype=torch.int64)
    call(indices(10)[1:], shift=torch.zeros(K), scale=torch.ones(K), seed=numbers[1:2])
    packed = torch.ones(4 * K + 1)
    call(indices(9), bias=packed[1 : 1 + 2 * K], shift=packed[11:16], scale=packed[16:21])
    views = [start.arguments for start in gpu.starts]
    assert [start["seed"] % 16 for start in views] == [0, 8, 0]
    assert views[1]["rows"] % 16 == 8
    assert views[2]["bias"] % 16 == 4
    assert len(gpu.compilations) == 1


def test_the_address_of_the_features_does(gpu: Driver) -> None:
    """Wide loads need it; so the count above is not of a driver that never compiles."""
    call(indices(9))
    execution.forget()
    ensemble_reward(HIDDEN.view(-1)[1 : 1 + 9 * D].view(9, D), **FIXED, rows=indices(9), seed=torch.tensor([7]))
    assert len(gpu.compilations) == 2


def backward(incoming: Tensor, seed: Tensor, rows: Tensor) -> None:
    execution.forget()
    leaves = {name: value.clone().requires_grad_() for name, value in FIXED.items()}
    hidden = HIDDEN.clone().requires_grad_()
    ensemble_reward(hidden, **leaves, rows=rows, seed=seed).reward.backward(incoming)


def test_no_address_of_seed_rows_or_gradient_compiles_the_backward_again(gpu: Driver) -> None:
    backward(torch.ones(9), torch.tensor([7]), indices(9))
    once = len(gpu.compilations)
    assert {compiled.kernel for compiled in gpu.compilations} == {
        "forward_kernel", "product_gradient_kernel", "combine_kernel", "outer_kernel", "weight_gradient_kernel",
    }  # fmt: skip
    backward(torch.ones(10)[1:], torch.tensor([1, 7])[1:], indices(10)[1:])
    assert len(gpu.compilations) == once
