"""The C++ execution against the fp64 reference, and equal bits whatever the threads, memory and layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.kernels import native
from prudent.kernels.advantages import cpu, reference
from prudent.kernels.advantages.contract import HOLES, KL_ESTIMATORS, SCORE_AT, WHITEN, Inputs

if not native.load():
    pytest.skip("the native CPU library is not built", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

OPTIONS = list(itertools.product(KL_ESTIMATORS, HOLES, SCORE_AT, WHITEN))


def options(estimator: str = "k3", holes: str = "skip", score_at: str = "last", whiten: str = "sample") -> Any:
    return (0.97, 0.9, 0.2, estimator, 1.5, holes, score_at, whiten)


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_every_option_is_the_reference_in_fp64(make_batch: Callable[..., Any], kind: str) -> None:
    score, *floats, mask = make_batch(kind, value_after=True)
    mask[3] = False
    score[4] = float("nan")
    dense = torch.randn(mask.shape, dtype=torch.float64)
    for chosen, scores, critic in itertools.product(OPTIONS, (score, dense), (True, False)):
        inputs = Inputs(scores, *floats[:2], floats[2] if critic else None, mask, *options(*chosen))
        close(cpu.forward(inputs), reference.forward(inputs), 1e-12)
    without_kl = Inputs(score, None, None, floats[2], mask, *options())._replace(kl_coef=0.0)
    close(cpu.forward(without_kl), reference.forward(without_kl), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [13, 400])
def test_no_less_exact_than_plain_torch_in_fp32(
    make_batch: Callable[..., Any], dtype: torch.dtype, length: int
) -> None:
    inputs = Inputs(*make_batch("holes", length=length, dtype=dtype), *options(whiten="population"))
    exact = reference.forward(Inputs(*(t.double() for t in inputs[:4]), *inputs[4:]))
    for ours, plain, true in zip(cpu.forward(inputs), reference.forward(inputs), exact, strict=True):
        if ours.dtype != torch.bool:
            allowed = (plain - true).abs().max() + 2e-6 * true.abs().max()
            assert (ours - true).abs().max() <= allowed


def test_rows_longer_than_any_block(make_batch: Callable[..., Any]) -> None:
    inputs = Inputs(*make_batch("holes", batch=3, length=9000), *options())
    close(cpu.forward(inputs), reference.forward(inputs), 1e-10)


def test_the_number_of_threads_changes_no_bit(make_batch: Callable[..., Any]) -> None:
    inputs = Inputs(*make_batch("holes", batch=97, length=200, dtype=torch.float32), *options())
    before = torch.get_num_threads()
    results: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.forward(inputs))
    finally:
        torch.set_num_threads(before)
    for other in (*results[1:], cpu.forward(inputs)):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
