"""Cases for the Triton execution of `advantages`; test_triton.py runs them in a child process.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/advantages/triton_cases.py`, or without the variable on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from prudent.kernels import arrivals
from prudent.kernels.advantages import advantages, configs, op, reference
from prudent.kernels.advantages import triton as execution
from prudent.kernels.advantages.contract import HOLES, KL_ESTIMATORS, SCORE_AT, WHITEN, Inputs
from prudent.kernels.launch import Config, recording

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def options(estimator: str = "k3", holes: str = "skip", score_at: str = "last", whiten: str = "sample") -> Any:
    return (0.97, 0.9, 0.2, estimator, 1.5, holes, score_at, whiten)


def on_device(*batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(DEVICE) for t in batch)


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens, so that 45 are carried over twice with a tail."""
    monkeypatch.setattr(configs, "_DOUBLE", Config(1, 16, 1, 1))


# every pair of options meets in one of these
CHOSEN = [
    (KL_ESTIMATORS[i], HOLES[j], SCORE_AT[k], WHITEN[(i + 2 * j + k) % 4])
    for i, j, k in itertools.product(range(4), range(2), range(2))
]


@pytest.mark.parametrize("chosen", CHOSEN, ids="-".join)
def test_every_option_is_the_reference_in_fp64(
    make_batch: Callable[..., Any], chosen: tuple[str, ...], small_blocks: None
) -> None:
    at = CHOSEN.index(chosen)
    length, kind = (1, 15, 16, 17, 45)[at % 5], ("right", "left", "holes", "full")[at % 4]
    score, *floats, mask = make_batch(kind, length=length, batch=5, value_after=True)
    mask[3] = False
    score[4] = float("nan")
    if at % 3 == 0:
        score = torch.randn(mask.shape, dtype=torch.float64)
    inputs = Inputs(*on_device(score, *floats, mask), *options(*chosen))
    close(execution.forward(inputs), reference.forward(inputs), 1e-11)
    without = inputs._replace(value=None, logprob=None, ref_logprob=None, kl_coef=0.0)
    close(execution.forward(without), reference.forward(without), 1e-11)


def test_a_dropped_sequence_that_spans_chunks_is_all_zero(make_batch: Callable[..., Any], small_blocks: None) -> None:
    batch = on_device(*make_batch("full", batch=3, length=45))
    batch[3][1, 20] = float("inf")  # tokens 21 to 44 are finite, and stored before it is met
    inputs = Inputs(*batch, *options(score_at="after", whiten="none"))
    ours = execution.forward(inputs)
    assert not any(t[1].any() for t in ours[:3])
    close(ours, reference.forward(inputs), 1e-11)


@pytest.mark.parametrize("length", [500, 1100], ids=["one program", "two chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_less_exact_than_plain_torch_in_fp32(
    make_batch: Callable[..., Any], dtype: torch.dtype, length: int
) -> None:
    inputs = Inputs(*on_device(*make_batch("holes", batch=4, length=length, dtype=dtype)), *options())
    exact = reference.forward(Inputs(*(t.double() for t in inputs[:4]), *inputs[4:]))
    for ours, plain, true in zip(execution.forward(inputs), reference.forward(inputs), exact, strict=True):
        if ours.dtype != torch.bool:
            allowed = (plain - true).abs().max() + 2e-6 * true.abs().max()
            assert (ours - true).abs().max() <= allowed


def test_small_log_ratios_keep_their_digits_in_fp32() -> None:
    """e^x - 1 - x cancels: at 1e-3 plain fp32 has no digit right beyond the first three."""
    ratio = torch.logspace(-6, 1, 200, dtype=torch.float64, device=DEVICE)
    ratio = torch.cat([ratio, -ratio]).float()[None]
    zero, mask = torch.zeros_like(ratio), torch.ones_like(ratio).bool()
    inputs = Inputs(zero[:, 0], ratio, zero, None, mask, 1.0, 1.0, 1.0, "k3", float("inf"), "skip", "last", "none")
    exact = -(torch.expm1(-ratio.double()) + ratio.double())
    reward = execution.forward(inputs)[2].double()
    large = ratio.abs() > 1e-4  # below, fp64's own expm1(x) - x has no six digits
    torch.testing.assert_close(reward[large], exact[large], rtol=2e-5, atol=0)
    torch.testing.assert_close(reward[~large], -(ratio[~large].double() ** 2) / 2, rtol=1e-4, atol=0)


def test_equal_calls_have_equal_bits_and_leave_the_counter_zero(
    make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = arrivals.arrivals(DEVICE)
    monkeypatch.setattr(execution, "arrivals", lambda device: counter)
    inputs = Inputs(*on_device(*make_batch("holes", batch=7, dtype=torch.float32)), *options())
    first = execution.forward(inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, execution.forward(inputs), strict=True))
        assert not counter.any()


def test_more_sequences_than_the_last_program_sums_at_a_time(
    make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "SWEEP", 4)
    inputs = Inputs(*on_device(*make_batch("holes", batch=11)), *options())
    close(execution.forward(inputs), reference.forward(inputs), 1e-11)


def test_rows_of_any_stride_expanded_and_transposed(make_batch: Callable[..., Any]) -> None:
    score, logprob, ref_logprob, value, mask = on_device(*make_batch("right"))
    wide = torch.full((6, 20), float("nan"), dtype=torch.float64, device=DEVICE)
    wide[:, 3:16] = value
    pair = torch.stack([mask, ~mask], 2)[:, :, 0]
    strided = Inputs(score[:1].expand(6), logprob.T.contiguous().T, ref_logprob[:1].expand(6, 13), wide[:, 3:16], pair,
                     *options())  # fmt: skip
    close(execution.forward(strided), reference.forward(strided), 1e-11)
    close(execution.forward(strided._replace(score=wide[:, 3:4].expand(6, 13), value=None)),
          reference.forward(strided._replace(score=wide[:, 3:4].expand(6, 13), value=None)), 1e-11)  # fmt: skip


def test_the_public_op_through_triton(make_batch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = on_device(*make_batch("holes", dtype=torch.float32))
    monkeypatch.setattr(op, "_backend", lambda inputs: reference)
    expected = advantages(*batch)
    monkeypatch.setattr(op, "_backend", lambda inputs: execution)
    ours = advantages(*batch)
    close([*ours[:4], *ours.stats], [*expected[:4], *expected.stats], 1e-5)
    assert ours.dropped.dtype == torch.bool


def test_two_launches_and_one_without_whitening(make_batch: Callable[..., Any]) -> None:
    batch = on_device(*make_batch("holes"))
    for whiten, expected in (("sample", 2), ("none", 1)):
        with recording() as launches:
            execution.forward(Inputs(*batch, *options(whiten=whiten)))
        assert len(launches) == expected


def test_addresses_beyond_two_to_the_31_elements(make_batch: Callable[..., Any]) -> None:
    score, logprob, ref_logprob, value, mask = on_device(*make_batch("full", batch=3, dtype=torch.bfloat16))
    far = 2**30 + 8
    base = torch.empty(2 * far + 64, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, of which three rows are touched
    spread = base.as_strided((3, 13), (far, 1))
    spread.copy_(value)
    small = Inputs(score, logprob, ref_logprob, value, mask, *options())
    close(execution.forward(small._replace(value=spread)), execution.forward(small), 0.0)


@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_replays_beside_eager_calls(make_batch: Callable[..., Any]) -> None:
    inputs = Inputs(*on_device(*make_batch("holes", batch=70, dtype=torch.float32)), *options())
    expected = execution.forward(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = execution.forward(inputs)
    for _ in range(3):
        graph.replay()
        close(execution.forward(inputs), expected, 0.0)
        torch.cuda.synchronize()
        close(captured, expected, 0.0)
