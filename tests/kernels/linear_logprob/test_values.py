"""The op's values and gradients on this machine, against fp64 and against the unfused composition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prudent.kernels.linear_logprob import call as call_module
from prudent.kernels.linear_logprob import chunked, linear_logprob, reference
from prudent.kernels.linear_logprob.configs import Plan
from prudent.kernels.linear_logprob.contract import Needs, OutputGrads, Saved

from .cases import DEVICE, DTYPES, OPTIONS, T, V, agrees_in_fp64, call, exact, gradients, make, some_grads, unfused

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_the_reference_in_fp64(options: str, small_tiles: None) -> None:
    agrees_in_fp64(make(**OPTIONS[options]))


@pytest.mark.parametrize(("t", "d", "v"), [
    (1, 1, 1), (1, 5, 16), (3, 7, 17), (4, 7, 15), (5, 8, 32), (8, 3, 33), (9, 16, 47), (13, 1, 48), (6, 70, 40),
])  # fmt: skip
def test_sizes_on_both_sides_of_a_tiles_edge(t: int, d: int, v: int, small_tiles: None) -> None:
    agrees_in_fp64(make(t, d, v, softcap=3.0, ignored=(1,) if t > 2 else ()))


def test_the_reference_is_autograds_answer() -> None:
    inputs = make(temperature=0.7, softcap=2.0, ignored=(2, 5))
    grads = some_grads(inputs)
    by_autograd = gradients(inputs, grads, reference.forward)
    for ours, theirs in zip(by_autograd, exact(inputs, grads)[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "softcap": 5.0}], ids=["plain", "capped and tempered"])
def test_it_is_the_composition_people_write(options: dict[str, Any]) -> None:
    inputs = make(**options)
    for ours, theirs in zip(call(inputs), unfused(inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch >= 2.13")
def test_minus_the_logprob_is_torchs_linear_cross_entropy() -> None:
    inputs = make(ignored=(1, 7))
    loss = F.linear_cross_entropy(*inputs[:3], reduction="none", ignore_index=-100)
    torch.testing.assert_close(-call(inputs).logprob, loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", ["plain", "both"])
@pytest.mark.parametrize("many_tiles", [False, True])
def test_our_error_is_at_most_that_of_plain_torch_in_the_storage_type(
    dtype: torch.dtype, options: str, many_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfused composition in the same storage type, both against fp64; rms error over each output and gradient.

    Slack: 2e-7 of the largest value, an fp32 rounding; for gradients in 16 bits, the storage type's own last rounding,
    which ours makes at most three times here (three chunks of rows) and plain torch once.
    """
    if many_tiles:
        monkeypatch.setattr(call_module, "plan", lambda *shapes: Plan(32, 48))
    inputs = make(96, 64, 400, dtype, **OPTIONS[options])
    grads = some_grads(inputs)
    truth = exact(inputs, grads)
    ours = (*call(inputs), *gradients(inputs, grads))
    plain = (*unfused(inputs), *gradients(inputs, grads, unfused))
    for name, a, b, true in zip(("logprob", "entropy", "lse", "hidden", "weight"), ours, plain, truth, strict=True):
        error, theirs = ((x.double() - true).square().mean().sqrt() for x in (a, b))
        assert error <= theirs + 2e-7 * true.abs().max(), f"{name}: {error:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_more_row_chunks_round_a_16_bit_weights_gradient_more_often_and_no_worse(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README: n partial sums of random signs, each rounded as it is added, err as sqrt((n + 1) / 2) of one rounding;
    and still less than plain torch, whose logits are rounded.
    """
    inputs = make(256, 32, 400, torch.bfloat16)
    grads = some_grads(inputs)
    truth = exact(inputs, grads)[4]
    errors = []
    for rows in (256, 256 // chunks):
        monkeypatch.setattr(call_module, "plan", lambda *shapes, rows=rows: Plan(rows, 128))
        errors.append((gradients(inputs, grads)[1].double() - truth).square().mean().sqrt())
    plain = (gradients(inputs, grads, unfused)[1].double() - truth).square().mean().sqrt()
    assert errors[1] <= min(plain, 1.05 * errors[0] * ((chunks + 1) / 2) ** 0.5)


@pytest.mark.parametrize(("hidden", "weight"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16),
    (torch.float64, torch.float32), (torch.float64, torch.bfloat16),
])  # fmt: skip
def test_hidden_and_weight_may_differ_in_dtype(hidden: torch.dtype, weight: torch.dtype, small_tiles: None) -> None:
    inputs = make(dtype=hidden, ignored=(2,))
    inputs = inputs._replace(weight=inputs.weight.to(weight))
    grads = some_grads(inputs)
    found, truth = (*call(inputs), *gradients(inputs, grads)), exact(inputs, grads)
    assert (found[3].dtype, found[4].dtype) == (hidden, weight)
    for ours, theirs in zip(found[:3], truth, strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)
    for ours, theirs in zip(found[3:], truth[3:], strict=True):  # three chunks of rows: three roundings
        tolerance = 3 * torch.finfo(ours.dtype).eps + 2e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("present", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_any_of_the_outputs(present: tuple[int, ...], softcap: float | None, small_tiles: None) -> None:
    inputs = make(softcap=softcap, temperature=0.7)
    grads = tuple(g if i in present else None for i, g in enumerate(some_grads(inputs)))
    for ours, theirs in zip(gradients(inputs, grads), exact(inputs, grads)[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_only_wanted_gradients_are_made(needs: tuple[bool, bool], small_tiles: None) -> None:
    inputs = make(ignored=(1,))
    leaves = [x.clone().requires_grad_(need) for x, need in zip(inputs[:2], needs, strict=True)]
    outputs = call(inputs._replace(hidden=leaves[0], weight=leaves[1]))
    assert outputs.logprob.requires_grad == any(needs)
    if any(needs):
        outputs.entropy.sum().backward()  # a stride-0 gradient
    truth = gradients(inputs, (None, torch.ones(T, dtype=torch.float64, device=DEVICE), None))
    for leaf, need, theirs in zip(leaves, needs, truth, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, theirs, rtol=1e-12, atol=1e-12)


def test_unwanted_gradients_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = chunked.product
    count = lambda *args: (calls.append(1), real(*args))[1]  # noqa: E731
    for module in (chunked, call_module):
        monkeypatch.setattr(module, "product", count)
    inputs = make(**OPTIONS["biased"])
    results = chunked.forward(inputs, None)
    assert len(calls) == 1
    for needs, products in (
        ((True, True, True), 3), ((True, False, False), 2), ((False, True, False), 2), ((False, False, True), 1),
        ((False, False, False), 0),
    ):  # fmt: skip
        calls.clear()
        grads, saved = OutputGrads(*some_grads(inputs)), Saved(*results[1:])
        chunked.backward(grads, inputs, None, saved, Needs(*needs))
        assert len(calls) == products


def test_ignored_targets_give_zeros_and_reach_nothing(small_tiles: None) -> None:
    """Their hidden states are not multiplied, so that a NaN there stays out of the weight's gradient."""
    inputs = make(ignored=(0, 5, 10))
    inputs.hidden[[0, 5, 10]] = float("nan")
    outputs, grads = call(inputs), some_grads(inputs)
    for values in outputs:
        assert values[[0, 5, 10]].eq(0).all()
        assert values.isfinite().all()
    of_hidden, of_weight = gradients(inputs, grads)
    assert of_hidden[[0, 5, 10]].eq(0).all()
    kept = inputs.target != -100
    alone = make()._replace(hidden=inputs.hidden[kept], target=inputs.target[kept])
    of_kept, of_weight_alone = gradients(alone, tuple(g[kept] for g in grads))
    torch.testing.assert_close(of_hidden[kept], of_kept, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_weight, of_weight_alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_score_gives_zeros(t: int, dtype: torch.dtype) -> None:
    inputs = make(t, dtype=dtype, ignored=tuple(range(t)))
    assert all(torch.equal(o, torch.zeros(t, device=DEVICE)) for o in call(inputs))
    for gradient, like in zip(gradients(inputs, some_grads(inputs)), inputs, strict=False):
        assert torch.equal(gradient, torch.zeros_like(like))


@pytest.mark.parametrize("kind", ["batch", "shifted", "one", "wide rows", "one row everywhere", "transposed"])
@pytest.mark.parametrize("ignored", [False, True])
def test_leading_dimensions_and_strides(kind: str, ignored: bool, small_tiles: None) -> None:
    g = torch.Generator().manual_seed(3)
    base = torch.randn(3, 5, 12, dtype=torch.float64, generator=g).to(DEVICE)
    hidden = {
        "batch": base[..., :9].contiguous(),
        "shifted": base[:, :-1, :9],  # rows that cannot be viewed as [T, D]
        "one": base[0, 0, :9],
        "wide rows": base[0, :, 2:11],
        "one row everywhere": base[0, 0, :9].expand(6, 9),
        "transposed": base.transpose(0, 1)[..., 1:10],
    }[kind]
    target = torch.randint(0, V, hidden.shape[:-1], generator=g).to(DEVICE)
    if ignored and target.dim():
        target.view(-1)[::3] = -100
    wide_weight = torch.randn(V, 20, dtype=torch.float64, generator=g).to(DEVICE)
    inputs = make()._replace(hidden=hidden, target=target, weight=wide_weight[:, 4:13])
    assert call(inputs).logprob.shape == target.shape
    agrees_in_fp64(inputs)


def test_gradients_may_be_expanded_from_one_number(small_tiles: None) -> None:
    inputs = make(ignored=(4,))
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    expanded = (one.expand(T), (2 * one).expand(T), (-one).expand(T))
    for ours, theirs in zip(
        gradients(inputs, expanded), gradients(inputs, tuple(g.clone() for g in expanded)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_tied_embedding_gets_both_gradients() -> None:
    weight = make(dtype=torch.float32).weight.requires_grad_()
    tokens = torch.arange(8, device=DEVICE)
    loss = linear_logprob(weight[tokens], weight, tokens + 1).logprob.sum()
    (ours,) = torch.autograd.grad(loss, weight)
    composed = torch.log_softmax(weight[tokens] @ weight.T, dim=1)[tokens, tokens + 1].sum()
    torch.testing.assert_close(ours, torch.autograd.grad(composed, weight)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits_do_not_overflow(scale: float, small_tiles: None) -> None:
    """Three rows over 24 tokens of three kinds: in two, one kind has far larger logits; in the third all are equal."""
    hidden = torch.tensor([[scale], [-scale], [0.0]], device=DEVICE)
    weight = torch.tensor([[1.0], [-1.0], [0.5]] * 8, device=DEVICE)
    out = linear_logprob(hidden, weight, torch.tensor([0, 1, 2], device=DEVICE))
    expected = torch.tensor([8.0, 8.0, 24.0], device=DEVICE).log()
    torch.testing.assert_close(out.logprob, -expected)
    torch.testing.assert_close(out.entropy, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_nan_stays_in_its_own_row(bad: float, small_tiles: None) -> None:
    inputs = make(dtype=torch.float32)
    clean = call(inputs)
    inputs.hidden[3] = bad
    others = torch.arange(T, device=DEVICE) != 3
    for dirty, expected in zip(call(inputs), clean, strict=True):
        assert not dirty[3].isfinite()
        torch.testing.assert_close(dirty[others], expected[others])


def test_the_entropy_of_a_peaked_distribution_keeps_its_digits() -> None:
    """Two logits near 1000, 9 apart: entropy 1.2e-3 to within fp32's rounding of 1, where lse minus the mean logit
    would be off by the rounding of 1000, 6e-5.
    """
    hidden, weight = torch.tensor([[1.0]], device=DEVICE), torch.tensor([[1000.0], [991.0]], device=DEVICE)
    entropy = linear_logprob(hidden, weight, torch.tensor([0], device=DEVICE)).entropy.double()
    p = torch.softmax((hidden @ weight.T).double(), dim=1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(dim=1), rtol=0, atol=1.2e-7)
