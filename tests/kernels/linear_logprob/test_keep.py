"""What the forward keeps for the backward: the same gradients, fewer products, within the bytes that it may take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prudent.kernels.linear_logprob import call as call_module
from prudent.kernels.linear_logprob import chunked, linear_logprob
from prudent.kernels.linear_logprob.configs import Plan
from prudent.kernels.linear_logprob.contract import DERIVATIVE, Inputs

from .cases import (
    DEVICE,
    DTYPES,
    OPTIONS,
    D,
    T,
    V,
    call,
    exact,
    gradients,
    make,
    registered,
    some_grads,
    unfused,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")
ROW = 8 * V  # bytes of a row's numerators in fp64
UPSTREAMS = {"logprob": (0,), "lse": (2,), "logprob and entropy": (0, 1), "all": (0, 1, 2)}


def of(upstream: str, inputs: Inputs) -> tuple[Tensor | None, ...]:
    return tuple(g if i in UPSTREAMS[upstream] else None for i, g in enumerate(some_grads(inputs)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("keep_bytes", [None, 0, 3 * ROW, T * ROW], ids=["default", "0", "3 rows", "all rows"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_it_changes_no_gradient(options: str, keep_bytes: int | None, frozen: bool, small_tiles: None) -> None:
    inputs = make(**OPTIONS[options])
    for upstream in UPSTREAMS:
        grads = of(upstream, inputs)
        found = gradients(inputs, grads, lambda i: call(i, keep_bytes=keep_bytes), frozen)
        for ours, theirs in zip(found, exact(inputs, grads)[3:], strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("upstream", ["logprob", "all"])
@pytest.mark.parametrize("keep_bytes", [None, 10**9], ids=["default", "all rows"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_it_is_no_less_exact_than_plain_torch_in_the_storage_type(
    dtype: torch.dtype, options: str, upstream: str, keep_bytes: int | None, frozen: bool
) -> None:
    """rms errors against fp64; slack 2e-7 of the largest value, a rounding of fp32."""
    inputs = make(96, 64, 400, dtype, **OPTIONS[options])
    grads = of(upstream, inputs)
    truth = exact(inputs, grads)[3:]
    ours = gradients(inputs, grads, lambda i: call(i, keep_bytes=keep_bytes), frozen)
    plain = gradients(inputs, grads, unfused, frozen)
    for a, b, true in zip(ours, plain, truth, strict=False):
        error, theirs = ((x.double() - true).square().mean().sqrt() for x in (a, b))
        assert error <= theirs + 2e-7 * true.abs().max()


def test_a_nearly_certain_target_keeps_the_digits_of_its_small_gradient() -> None:
    """1 - p = 2e-4: a p rounded to bf16 would be 1, and the gradient 0."""
    hidden = torch.tensor([[3.0, 0.0]], dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    weight = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, -1.0]], dtype=torch.bfloat16, device=DEVICE)
    target = torch.tensor([0], device=DEVICE)
    truth = exact(
        make()._replace(hidden=hidden, weight=weight, target=target), (torch.ones(1, device=DEVICE), None, None)
    )
    for keep_bytes in (None, 0, 10**6):
        logprob = linear_logprob(hidden, weight, target, keep_bytes=keep_bytes).logprob
        (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
        torch.testing.assert_close(gradient.double(), truth[3], rtol=2**-7, atol=0)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each product [M, K] @ [K, N], by M K N."""
    calls: list[int] = []
    real = chunked.product

    def counting(a: Tensor, b: Tensor, *rest: Any) -> None:
        calls.append(a.shape[0] * a.shape[1] * b.shape[1])
        real(a, b, *rest)

    monkeypatch.setattr(chunked, "product", counting)
    monkeypatch.setattr(call_module, "product", counting)
    return calls


@pytest.mark.parametrize(("frozen", "keep_bytes", "upstream", "products"), [
    (True, None, "logprob", 2), (True, None, "all", 4), (True, None, "lse", 4), (True, 0, "logprob", 3),
    (True, 0, "all", 3), (True, T * ROW, "all", 2), (False, None, "all", 4), (False, 0, "logprob", 4),
    (False, T * ROW, "all", 3), (False, 4 * ROW, "all", 4 - 4 / T),
])  # fmt: skip
def test_the_products_of_forward_and_backward(
    frozen: bool, keep_bytes: int | None, upstream: str, products: float, small_tiles: None, monkeypatch: Any
) -> None:
    """In units of T D V; README has the table."""
    inputs, calls = make(), counted(monkeypatch)
    gradients(inputs, of(upstream, inputs), lambda i: call(i, keep_bytes=keep_bytes), frozen)
    assert sum(calls) == products * T * D * V


def test_no_gradient_wanted_nothing_kept_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    inputs = make()
    call(inputs, keep_bytes=10**9)
    with torch.no_grad():
        call(inputs._replace(hidden=inputs.hidden.requires_grad_()))
    assert sum(calls) == 2 * T * D * V


@pytest.mark.parametrize(("keep", "shapes"), [
    (0, ((0,), (0,))), (DERIVATIVE, ((T, D), (0,))), (ROW - 1, ((0, V), (4, 0))), (3 * ROW, ((3, V), (4, 3))),
    (10**9, ((T, V), (4, T))),
])  # fmt: skip
def test_what_is_kept_fits_its_bytes(keep: int, shapes: Any, small_tiles: None) -> None:
    kept, peaks = chunked.forward(make(), None, keep)[3:]
    assert (tuple(kept.shape), tuple(peaks.shape)) == shapes
    assert keep == DERIVATIVE or kept.nbytes <= keep


def test_retained_graphs_give_the_same_bits_twice(small_tiles: None) -> None:
    inputs = make(dtype=torch.bfloat16, ignored=(2,))
    for frozen, keep_bytes in ((True, None), (False, 10**6)):
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(not frozen)
        out = call(inputs._replace(hidden=hidden, weight=weight), keep_bytes=keep_bytes)
        first, second = (torch.autograd.grad(out.logprob.sum(), hidden, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_the_outputs_may_be_changed_in_place_before_the_backward() -> None:
    """Of the public outputs only entropy and lse are saved."""
    inputs = make(ignored=(1,))
    for frozen, keep_bytes in ((True, None), (False, None), (False, 10**6)):
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(not frozen)
        out = call(inputs._replace(hidden=hidden, weight=weight), keep_bytes=keep_bytes)
        out.logprob.mul_(2)
        (found,) = torch.autograd.grad(out.logprob.sum(), hidden)
        torch.testing.assert_close(found, exact(inputs, (2 * torch.ones_like(inputs.target).double(), None, None))[3])


@pytest.mark.parametrize(("frozen", "keep_bytes"), [(True, None), (False, 4 * 3 * V), (False, 10**9)])
def test_compiled_with_dynamic_rows_it_is_the_same(frozen: bool, keep_bytes: int | None) -> None:
    inputs = make(dtype=torch.float32, ignored=(1,))
    weight = inputs.weight.requires_grad_(not frozen)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        out = linear_logprob(hidden, weight, target, softcap=4.0, keep_bytes=keep_bytes)
        return (out.logprob + (0.0 if frozen else 0.1) * out.entropy.detach()).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for t in (5, 11, 3):
        hidden = inputs.hidden[:t].detach().requires_grad_()
        of_all = [hidden] if frozen else [hidden, weight]
        pairs = (torch.autograd.grad(f(hidden, inputs.target[:t]), of_all) for f in (compiled, loss))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [DERIVATIVE, 10**6])
def test_gradcheck_by_the_registered_road(keep: int, small_tiles: None) -> None:
    inputs = make(5, 3, 20, ignored=(1,), softcap=3.0)

    def run(hidden: Tensor) -> Tensor:
        return registered(inputs._replace(hidden=hidden), keep)[0]

    assert torch.autograd.gradcheck(run, [inputs.hidden.requires_grad_()])


def test_mixed_dtypes_and_row_chunks_keep_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 weight under fp32 hidden states: numerators in fp32, the product's dtype."""
    monkeypatch.setattr(call_module, "plan", lambda *shapes: Plan(4, 16, 2))
    inputs = make(dtype=torch.float32, ignored=(2,))
    inputs = inputs._replace(weight=inputs.weight.bfloat16())
    grads = some_grads(inputs)
    truth = exact(inputs, grads)[3:]
    for ours, theirs in zip(gradients(inputs, grads, lambda i: call(i, keep_bytes=10**6)), truth, strict=True):
        tolerance = 3 * torch.finfo(ours.dtype).eps + 2e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
