"""The public op: equal results eager, registered and compiled, deterministic, and wrong input refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from prudent.kernels.linear_logprob import linear_logprob
from prudent.kernels.linear_logprob.contract import DERIVATIVE

from .cases import DEVICE, DTYPES, OPTIONS, D, T, V, call, gradients, make, registered, some_grads

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_has_the_same_bits_and_nothing_saved_is_changed(dtype: torch.dtype, small_tiles: None) -> None:
    inputs = make(dtype=dtype, ignored=(2,), softcap=3.0)
    before = [x.clone() for x in inputs[:3]]
    leaves = [x.requires_grad_() for x in inputs[:2]]
    first, second = call(inputs), call(inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = sum(o.square().sum() for o in first)
    assert isinstance(loss, Tensor)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs[:3], strict=True))


def test_a_second_derivative_is_refused_not_silently_zero() -> None:
    inputs = make()
    hidden = inputs.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(call(inputs).logprob.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_autocast_does_not_reach_inside() -> None:
    inputs = make(dtype=torch.float32)
    inputs.hidden.requires_grad_()
    expected = call(inputs)
    (gradient,) = torch.autograd.grad(expected.logprob.sum(), inputs.hidden)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = call(inputs)
        assert torch.equal(inside.logprob, expected.logprob)
        assert torch.equal(registered(inputs)[0], expected.logprob)
        assert torch.equal(torch.autograd.grad(inside.logprob.sum(), inputs.hidden)[0], gradient)


@pytest.mark.parametrize("options", ["plain", "both", "some ignored"])
def test_gradcheck_in_fp64_by_both_roads(options: str, small_tiles: None) -> None:
    inputs = make(11, 3, 20, **OPTIONS[options])
    leaves = [x.requires_grad_() for x in inputs[:2]]
    assert torch.autograd.gradcheck(lambda h, w: tuple(call(inputs._replace(hidden=h, weight=w))), leaves)
    assert torch.autograd.gradcheck(lambda h, w: registered(inputs._replace(hidden=h, weight=w)), leaves)


@pytest.mark.parametrize("options", ["plain", "both", "biased", "some ignored", "all kept, none looked for"])
@pytest.mark.parametrize("keep", [DERIVATIVE, 0, 4 * 3 * V, 10**6])
def test_the_registered_op_passes_opcheck(options: str, keep: int) -> None:
    inputs = make(dtype=torch.float32, **OPTIONS[options])
    trained = ("hidden",) if keep == DERIVATIVE else ("hidden", "weight", "bias")
    given = {name: x.detach().requires_grad_() for name in trained if (x := getattr(inputs, name)) is not None}
    opcheck(torch.ops.prudent.linear_logprob.default, (*inputs._replace(**given), keep))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("keep", [0, 4 * 3 * V])
def test_the_registered_backward_passes_opcheck(needs: tuple[int, int, int], keep: int) -> None:
    inputs = make(dtype=torch.float32, **OPTIONS["biased"], ignored=(2,))
    saved = torch.ops.prudent.linear_logprob(*inputs, keep)[1:]
    grads = (torch.randn((), device=DEVICE).expand(T), None, torch.randn(T, device=DEVICE))
    opcheck(torch.ops.prudent.linear_logprob_backward.default, (*grads, *inputs, *saved, keep, *map(bool, needs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_and_registered_roads_give_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype, ignored=(0,))
    grads = some_grads(inputs)
    for a, b in zip(call(inputs), registered(inputs), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == inputs.accumulator
    for a, b in zip(gradients(inputs, grads), gradients(inputs, grads, registered), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == dtype


def test_compiled_whole_with_dynamic_rows_gives_the_eager_result() -> None:
    inputs = make(dtype=torch.float32, ignored=(1,))

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = linear_logprob(hidden, weight, target, temperature=0.9, softcap=4.0)
        return (out.logprob + 0.1 * out.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    weight = inputs.weight.requires_grad_()
    for t in (5, 11, 2, 3):
        hidden = inputs.hidden[:t].detach().requires_grad_()
        got, want = (f(hidden, weight, inputs.target[:t]) for f in (compiled, loss))
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(want, [hidden, weight]), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_exported_with_dynamic_rows() -> None:
    inputs = make(dtype=torch.float32)

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(inputs.weight)

        def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
            return linear_logprob(hidden, self.weight, target).logprob

    model, rows = Scores(), torch.export.Dim("rows")
    program = torch.export.export(model, tuple(inputs[::2][:2]), dynamic_shapes=({0: rows}, {0: rows}))
    assert "prudent.linear_logprob" in str(program.graph)
    other = make(29, dtype=torch.float32)
    torch.testing.assert_close(program.module()(other.hidden, other.target), model(other.hidden, other.target))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden": "text"}, "hidden: expected a tensor, got str"),
    ({"hidden": torch.tensor(1.0)}, r"hidden: expected shape \[..., D\]"),
    ({"hidden": torch.zeros(T, 0)}, r"hidden: expected shape \[..., D\] with D >= 1"),
    ({"hidden": torch.zeros(T, D, dtype=torch.int64)}, "hidden: expected dtype"),
    ({"hidden": torch.zeros(D, T).T}, "hidden: expected a contiguous last dimension"),
    ({"weight": None}, "weight: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(0, D)}, r"weight: expected shape \[V, 9\] with V >= 1, got \[0, 9\]"),
    ({"weight": torch.zeros(V, D + 1)}, r"weight: expected shape \[V, 9\].*got \[37, 10\]"),
    ({"weight": torch.zeros(D)}, r"weight: expected shape \[V, 9\]"),
    ({"weight": torch.zeros(D, V).T}, "weight: expected a contiguous last dimension"),
    ({"weight": torch.zeros(V, D, dtype=torch.float64)}, "weight: expected float64 only with float64 hidden"),
    ({"weight": torch.zeros(V, D, device="meta")}, r"weight: expected device .* \(hidden's\), got meta"),
    ({"target": [1, 2]}, "target: expected a tensor, got list"),
    ({"target": torch.zeros(T)}, "target: expected dtype int64, got torch.float32"),
    ({"target": torch.zeros(T - 1, dtype=torch.int64)}, r"target: expected shape \[11\].*got \[10\]"),
    ({"target": torch.full((T,), V)}, r"target: expected values in \[0, 37\) or -100 \(ignore_index\), got 37"),
    ({"target": torch.full((T,), -1)}, r"target: expected values in .* got -1"),
    ({"target": torch.full((T,), -100), "ignore_index": None}, r"target: expected values in \[0, 37\), got -100"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature: expected a finite number above 0, got nan"),
    ({"temperature": float("inf")}, "temperature: expected a finite number above 0, got inf"),
    ({"temperature": 1e-45}, "temperature: expected a number that, like its inverse, is finite in fp32, got 1e-45"),
    ({"softcap": 1e39}, r"softcap: expected a number that, like its inverse, is finite in fp32, got 1e\+39"),
    ({"weight": torch.zeros(V, D).to_sparse()}, "weight: expected a dense tensor, got torch.sparse_coo"),
    ({"temperature": "hot"}, "temperature: expected a finite number above 0, got hot"),
    ({"softcap": -1.0}, "softcap: expected a finite number above 0 or None, got -1.0"),
    ({"softcap": 0.0}, "softcap: expected a finite number above 0 or None"),
    ({"ignore_index": 1.5}, "ignore_index: expected an integer or None, got 1.5"),
    ({"bias": [0.0]}, "bias: expected a tensor or None, got list"),
    ({"bias": torch.zeros(V - 1)}, r"bias: expected shape \[37\], got \[36\]"),
    ({"bias": torch.zeros(V, dtype=torch.int64)}, "bias: expected a floating dtype, got torch.int64"),
    ({"bias": torch.zeros(V, dtype=torch.float64)}, "bias: expected float64 only with float64 hidden"),
    ({"bias": torch.zeros(V, device="meta")}, r"bias: expected device .* \(hidden's\), got meta"),
    ({"keep_bytes": -1}, "keep_bytes: expected a whole number of bytes or None, got -1"),
    ({"keep_bytes": 1e9}, "keep_bytes: expected a whole number of bytes or None, got 1000000000.0"),
    ({"group": "all"}, "group: expected a torch.distributed.ProcessGroup or None, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_refused_with_argument_expectation_and_what_came(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUDENT_DEBUG", "1")  # targets are looked at on a GPU too
    given: dict[str, Any] = {
        "hidden": torch.zeros(T, D), "weight": torch.zeros(V, D), "target": torch.zeros(T, dtype=torch.int64), **changes
    }  # fmt: skip
    on_device = {k: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x for k, x in given.items()}
    with pytest.raises(ValueError, match=f"linear_logprob: {says}"):
        linear_logprob(**on_device)


def test_fakes_are_refused_in_the_same_words() -> None:
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match=r"linear_logprob: weight: expected shape"):
        linear_logprob(torch.zeros(T, D), torch.zeros(V, D + 1), torch.zeros(T, dtype=torch.int64))


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_meta_tensors_have_their_shapes_and_gradients(ignore_index: int | None) -> None:
    hidden = torch.empty(2, T, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(V, D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    target = torch.empty(2, T, dtype=torch.int64, device="meta")
    out = linear_logprob(hidden, weight, target, ignore_index=ignore_index)
    assert all(o.is_meta and o.shape == (2, T) and o.dtype == torch.float32 for o in out)
    out.logprob.sum().backward()
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    with pytest.raises(ValueError, match=r"linear_logprob: weight: expected shape"):
        linear_logprob(hidden, weight[:, 1:], target)
