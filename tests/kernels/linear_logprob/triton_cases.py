"""Cases for the Triton execution of `linear_logprob`; test_triton.py runs them in a child process.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/linear_logprob/triton_cases.py` (no GPU), or without the variable on a
GPU. Every test runs with uninitialised memory full of NaN.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from prudent.kernels.launch import recording
from prudent.kernels.linear_logprob import call as call_module
from prudent.kernels.linear_logprob import chunked, configs, linear_logprob, op, reference, shipped
from prudent.kernels.linear_logprob import triton as execution
from prudent.kernels.linear_logprob.configs import Plan
from prudent.kernels.linear_logprob.contract import DERIVATIVE, Inputs, Needs, OutputGrads, Results, Saved

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
T, D, V = 6, 5, 37
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(autouse=True)
def _route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Route CPU tensors of the public op to Triton too, under the interpreter, with tiles of [4, 16]."""
    monkeypatch.setattr(call_module, "plan", lambda *shapes: Plan(4, 16, 2))
    monkeypatch.setattr(call_module, "kept_columns", lambda *shapes: 16)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(op, "_backend", lambda inputs: execution)


def make(dtype: torch.dtype = torch.float64, t: int = T, d: int = D, v: int = V, **given: Any) -> Inputs:
    g = torch.Generator().manual_seed(t * 101 + v)
    values: dict[str, Any] = {
        "hidden": torch.randn(t, d, generator=g, dtype=torch.float64).to(dtype),
        "weight": (2 * torch.randn(v, d, generator=g, dtype=torch.float64) / d**0.5).to(dtype),
        "target": torch.randint(0, v, (t,), generator=g),
        "temperature": 1.0,
        "softcap": None,
        "ignore_index": -100,
    }
    values.update(given)
    return Inputs(**{k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in values.items()})


def some_grads(inputs: Inputs) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(inputs.target.shape, generator=g, dtype=torch.float64).to(DEVICE, inputs.accumulator)
        for _ in range(3)
    )


def both_ways(
    inputs: Inputs, module: Any, grads: Any, needs: Any = (True, True, True), keep: int = 0
) -> tuple[Tensor | None, ...]:
    """Outputs and gradients. torch_tiles.py drops ignored rows, the Triton execution masks them."""
    biased, grads = inputs.bias is not None, OutputGrads(*grads)
    needs = Needs(*needs[:2], bias=biased and needs[-1])
    if module is reference:
        outputs = reference.forward(inputs)
        found = reference.backward(grads, inputs, None, *outputs[1:], needs)
    else:
        rows = module.scored_rows(inputs)
        results: Results = module.forward(inputs, rows, keep)
        outputs, found = results[:3], module.backward(grads, inputs, rows, Saved(*results[1:], keep), needs)
    return *outputs, *(found if biased else found[:2])


def agrees_in_fp64(inputs: Inputs, grads: Any = None, needs: Any = (True, True, True), keep: int = 0) -> None:
    grads = grads or some_grads(inputs)
    ours, expected = both_ways(inputs, execution, grads, needs, keep), both_ways(inputs, reference, grads, needs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.6}, {"softcap": 1.5}, {"temperature": 1.7, "softcap": 4.0}, {"ignore_index": None},
    {"ignore_index": 0, "target": torch.tensor([0, 1, 0, 36, 5, 0])},
    {"bias": torch.linspace(-1, 2, V, dtype=torch.float64), "softcap": 3.0, "temperature": 0.7},
], ids=["plain", "tempered", "capped", "both", "all kept", "ignored token in the vocabulary", "biased"])  # fmt: skip
@pytest.mark.parametrize("keep", [0, DERIVATIVE, 8 * V * 3, 8 * V * T], ids=["0", "derivative", "3 rows", "all rows"])
def test_every_option_is_the_reference_in_fp64(options: dict[str, Any], keep: int) -> None:
    inputs = make(**options)
    if keep == DERIVATIVE:
        agrees_in_fp64(inputs, (some_grads(inputs)[0], None, None), (True, False, False), keep)
    agrees_in_fp64(inputs, keep=keep)


@pytest.mark.parametrize("keep", [0, DERIVATIVE, 8 * V * 3], ids=["0", "derivative", "3 rows"])
def test_a_nan_in_an_ignored_row_reaches_nothing(keep: int) -> None:
    """The row is computed and masked: neither its outputs, nor its gradient, nor the weight's or the bias's."""
    inputs = make(bias=torch.linspace(-1, 2, V, dtype=torch.float64))
    inputs.target[[1, 4]] = -100
    grads = some_grads(inputs)
    needs = (True, keep != DERIVATIVE, keep != DERIVATIVE)
    chosen = (grads[0], None, None) if keep == DERIVATIVE else grads
    clean = both_ways(inputs, execution, chosen, needs, keep)
    inputs.hidden[[1, 4]] = torch.tensor([[float("nan")], [float("inf")]], dtype=torch.float64, device=DEVICE)
    for g in grads:
        g[[1, 4]] = float("nan")
    for a, b in zip(both_ways(inputs, execution, chosen, needs, keep), clean, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a, b)
    for values in clean[:4]:
        assert values is not None
        assert values[[1, 4]].eq(0).all()


@pytest.mark.parametrize(("t", "d", "v"), [(1, 1, 1), (1, 3, 16), (4, 5, 17), (5, 2, 31), (9, 4, 32), (3, 1, 48)])
def test_sizes_on_both_sides_of_a_tiles_edge(t: int, d: int, v: int) -> None:
    agrees_in_fp64(make(t=t, d=d, v=v, softcap=3.0))


@pytest.mark.parametrize("kind", ["column", "one for all", "column of [t, 1]"])
def test_targets_of_any_stride(kind: str) -> None:
    g = torch.Generator().manual_seed(2)
    table = torch.randint(0, V, (T, 7), generator=g).to(DEVICE)
    target = {"column": table[:, 2], "one for all": table[0, 0].expand(T), "column of [t, 1]": table[:, 5:6]}[kind]
    inputs = make()
    agrees_in_fp64(inputs._replace(target=target, hidden=inputs.hidden.view(*target.shape, D)))


@pytest.mark.parametrize("v", [1023, 1024, 1025, 4097])
def test_tiles_as_wide_as_the_table_has_them(v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_module, "plan", lambda *shapes: Plan(4, 2048))
    agrees_in_fp64(make(t=3, d=2, v=v))


@pytest.mark.parametrize("present", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_gradients_of_any_of_the_outputs(present: tuple[int, ...]) -> None:
    inputs = make(softcap=2.0, temperature=0.7)
    agrees_in_fp64(inputs, tuple(g if i in present else None for i, g in enumerate(some_grads(inputs))))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_every_combination_of_needs_gives_those_gradients_and_no_others(needs: tuple[bool, bool]) -> None:
    inputs = make()
    found = both_ways(inputs, execution, some_grads(inputs), needs)
    expected = both_ways(inputs, reference, some_grads(inputs), needs)
    assert tuple(g is not None for g in found[3:]) == needs
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_is_as_exact_as_torchs_own_operations(dtype: torch.dtype, softcap: float | None) -> None:
    """The same tiles by torch_tiles.py, which test_values.py holds to plain torch's error: apart by fp32's rounding,
    and in 16-bit gradients by one rounding a row chunk.
    """
    inputs = make(dtype, 9, 16, 50, softcap=softcap)
    ours, torchs = (both_ways(inputs, module, some_grads(inputs)) for module in (execution, chunked))
    for a, b in zip(ours, torchs, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == b.dtype
        tolerance = 3 * torch.finfo(a.dtype).eps + 3e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_caps_tanh_is_torchs(dtype: torch.dtype) -> None:
    """Through lse alone: a lone column's is its capped logit. To a few roundings of the value; in fp64, which
    only tests use, of the cap.
    """
    raw = torch.cat([torch.linspace(-12, 12, 61), torch.tensor([1e-7, -1e-4, 0.0, 1e30, -1e30, float("inf")])])
    raw = raw.to(DEVICE, dtype)
    inputs = make(dtype, t=raw.numel(), d=1, v=1, hidden=raw[:, None], softcap=2.5)
    inputs = inputs._replace(weight=torch.ones(1, 1, dtype=dtype, device=DEVICE))
    lse = execution.forward(inputs, None).lse
    few = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse, 2.5 * torch.tanh(raw / 2.5), rtol=few, atol=0 if dtype == torch.float32 else few)


def test_a_nan_stays_in_its_own_row() -> None:
    inputs = make(torch.float32)
    clean = execution.forward(inputs, None)[:3]
    for bad in (float("nan"), float("inf"), float("-inf")):
        inputs.hidden[3] = bad
        for dirty, expected in zip(execution.forward(inputs, None)[:3], clean, strict=True):
            assert not dirty[3].isfinite()
            torch.testing.assert_close(dirty[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])


def test_a_target_that_is_no_token_gets_nan_if_values_are_not_checked() -> None:
    inputs = make(torch.float32)
    inputs.target[2] = V
    inputs.target[4] = -1
    logprob, entropy, lse, *_ = execution.forward(inputs, None)
    assert logprob.isnan().tolist() == [False, False, True, False, True, False]
    assert entropy.isfinite().all()
    assert lse.isfinite().all()


def test_the_same_call_has_the_same_bits() -> None:
    inputs = make(torch.float16, 9, 17, 50)
    first, second = (both_ways(inputs, execution, some_grads(inputs)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.8}], ids=["plain", "capped and tempered"])
def test_gradcheck_of_the_public_op_through_triton(options: dict[str, Any]) -> None:
    inputs = make(t=3, d=2, v=19)
    inputs.target[1] = -100
    leaves = [x.requires_grad_() for x in inputs[:2]]
    run = lambda h, w: tuple(linear_logprob(h, w, inputs.target, **options))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_what_is_shipped_for_a_target_launches_every_kernel() -> None:
    for full in (False, True):
        labels = set()
        for label, run in shipped.shipped("sm_90", full):
            with recording() as launches:
                run()
            labels.add(label)
            names = [launch.kernel.__name__ for launch in launches]
            assert names == ["statistics_kernel"] * 6 + ["gradient_kernel"] * 2
            flags = [(e.arguments["FIRST"], e.arguments["powers"] is not None) for e in launches[:6]]
            assert flags == [(first, kept) for first in (True, False) for kept in (False, True, True)]
        assert len(labels) > 4


@needs_gpu
def test_extra_memory_on_a_gpu_is_the_stated_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """T = 8192, D = 1024, V = 65536 in bf16, a third ignored: under 2 % of the [T, V] fp32 logits (2 GiB)."""
    monkeypatch.setattr(call_module, "plan", configs.plan)
    t, d, v = 8192, 1024, 65536
    hidden = torch.randn(t, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16) / 32).requires_grad_()
    target = torch.randint(0, v, (t,), device=DEVICE)
    target[::3] = -100

    def step() -> None:
        out = linear_logprob(hidden, weight, target)
        (out.logprob + 0.01 * out.entropy).sum().backward()

    step()  # the vendor's own workspace stays
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    assert extra < 0.02 * 4 * t * v + 2**20


@needs_gpu
def test_a_captured_graph_replays() -> None:
    inputs = make(torch.bfloat16, 8, 16, 64, ignore_index=None)
    expected = both_ways(inputs, execution, some_grads(inputs))
    grads = some_grads(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(inputs, execution, grads)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, expected, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@needs_gpu
def test_the_public_op_compiles_whole_on_a_gpu() -> None:
    inputs = make(torch.float32)
    run = torch.compile(lambda h, w, t: linear_logprob(h, w, t).logprob, fullgraph=True)
    torch.testing.assert_close(run(*inputs[:3]), linear_logprob(*inputs[:3]).logprob, rtol=0, atol=0)
