"""The public op: equal results eager, registered, compiled and exported, and every wrong input refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.library import opcheck

import prudent
from prudent.kernels.ensemble_reward import cpu, op, reference
from prudent.kernels.ensemble_reward.contract import Inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K, D, N = 3, 9, 8


def tensors(
    dtype: torch.dtype = torch.float32, grad: bool = True, device: torch.device | str = DEVICE
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    values = {
        "hidden": torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype),
        "weight": torch.randn(2 * K, D, generator=g, dtype=torch.float64).to(dtype),
        "bias": torch.randn(2 * K, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)),
        "norm_weight": (torch.rand(D, generator=g, dtype=torch.float64) + 0.5).to(dtype),
    }
    return {name: t.to(device).requires_grad_(grad) for name, t in values.items()}


def random(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=grad)


def as_inputs(t: dict[str, Any], aggregation: str = "tradeoff:0.4", **changes: Any) -> Inputs:
    base = Inputs(
        t["hidden"],
        t["weight"],
        t["bias"],
        None,
        t["norm_weight"],
        None,
        None,
        None,
        None,
        None,
        0,
        1e-6,
        1e-3,
        aggregation,
    )
    return base._replace(**changes)


EXTRAS = {
    "plain": {},
    "sampled": {"seed": torch.tensor([11], device=DEVICE)},
    "gathered": {"rows": torch.tensor([7, 0, 0, 3], device=DEVICE)},
    "calibrated": {
        name: torch.full((K,), value, device=DEVICE)
        for name, value in (("shift", 1.0), ("scale", 2.0), ("std_ref", 1.0))
    },
    "grouped": {"group_size": 4, "aggregation": "min,centre=group"},
    "labelled": {
        "group": torch.tensor([0, 1, 2, 0, 1, 2, 0, 0], device=DEVICE),
        "aggregation": "lcb:1,centre=group",
    },
    "unnormed": {"norm_weight": None, "bias": None},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_registered_op_passes_opcheck(extra: str) -> None:
    opcheck(torch.ops.prudent.ensemble_reward.default, (*as_inputs(tensors(), **EXTRAS[extra]), True))


def test_the_registered_backward_passes_opcheck() -> None:
    inputs = as_inputs(tensors(grad=False))
    grads = (random().expand(N), None, random(N, K), random(), None)
    saved = reference.forward(inputs, True)[-1]
    opcheck(torch.ops.prudent.ensemble_reward_backward.default, (*grads, *inputs, saved, True, True, False, True))


@pytest.mark.parametrize("extra", EXTRAS)
def test_gradcheck_in_fp64(extra: str) -> None:
    t = tensors(torch.float64)
    changes = dict(EXTRAS[extra])
    if "norm_weight" in changes:
        t = {"hidden": t["hidden"], "weight": t["weight"], "bias": None, "norm_weight": None}
    leaves = [v for v in t.values() if v is not None]

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip([n for n, v in t.items() if v is not None], values, strict=True))
        inputs = as_inputs({**t, **given}, **{n: v for n, v in changes.items() if v is not None})
        return tuple(op._EagerEnsembleReward.apply(*inputs, True)[:4])

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(
        lambda *v: torch.ops.prudent.ensemble_reward(
            *as_inputs({**t, **dict(zip([n for n, x in t.items() if x is not None], v, strict=True))},
                       **{n: x for n, x in changes.items() if x is not None}), True
        )[:4],
        leaves,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_grad", [False, True])
def test_eager_and_registered_roads_give_the_same_bits(dtype: torch.dtype, with_grad: bool) -> None:
    t = tensors(dtype, with_grad)
    eager = prudent.ensemble_reward(t["hidden"], t["weight"], t["bias"], norm_weight=t["norm_weight"])[:4]
    registered = torch.ops.prudent.ensemble_reward(*as_inputs(t), with_grad)[:4]
    for a, b in zip(eager, registered, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert a.requires_grad == with_grad
    if with_grad:
        leaves = list(t.values())
        loss = sum(o.square().sum() for o in eager)
        for a, b in zip(
            torch.autograd.grad(loss, leaves),
            torch.autograd.grad(sum(o.square().sum() for o in registered), leaves),
            strict=True,
        ):
            assert torch.equal(a, b)
            assert a.dtype == dtype or a.dtype == torch.float32


@pytest.mark.parametrize("form", ["object", "string", "string and centre"])
def test_compiled_whole_with_dynamic_rows_gives_the_eager_result(form: str) -> None:
    t = tensors()

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if form == "object":  # made while tracing: its number must reach the op, not the class's default
            out = prudent.ensemble_reward(
                hidden, weight, t["bias"], aggregation=prudent.Aggregation("lcb", 0.5), centre="batch"
            )
        elif form == "string":
            out = prudent.ensemble_reward(hidden, weight, t["bias"], aggregation="lcb:0.5,centre=batch")
        else:
            out = prudent.ensemble_reward(hidden, weight, t["bias"], aggregation="lcb:0.5", centre="batch")
        return (out.reward.square() + out.std.sum(1)).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (5, 8, 1, 3):
        hidden = t["hidden"][:n].detach().requires_grad_()
        got, want = compiled(hidden, t["weight"]), loss(hidden, t["weight"])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden))


def test_exported_with_dynamic_rows() -> None:
    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(tensors()["weight"].detach())

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return prudent.ensemble_reward(hidden, self.weight).reward

    model = Scores()
    program = torch.export.export(model, (random(5, D),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert "prudent.ensemble_reward" in str(program.graph)
    hidden = random(13, D)
    torch.testing.assert_close(program.module()(hidden), model(hidden))


def test_leading_dimensions_are_flattened_and_rows_index_the_flat_view() -> None:
    hidden, weight = random(2, 4, D), random(2 * K, D)
    every = prudent.ensemble_reward(hidden, weight)
    assert every.reward.shape == (8,)
    last = prudent.ensemble_reward(hidden, weight, rows=torch.tensor([3, 7], device=DEVICE))
    torch.testing.assert_close(last.mean, every.mean[[3, 7]])
    one = prudent.ensemble_reward(hidden[0, 0], weight)
    torch.testing.assert_close(one.mean, every.mean[:1])


def test_a_slice_that_cannot_be_viewed_flat_is_still_right() -> None:
    hidden, weight = random(3, 4, D), random(2 * K, D)
    got = prudent.ensemble_reward(hidden[:, 1:], weight).mean
    torch.testing.assert_close(got, prudent.ensemble_reward(hidden[:, 1:].contiguous(), weight).mean)


@pytest.mark.parametrize("heads", [1, 33])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_edges_of_n_and_k(n: int, heads: int, poisoned_empty: None) -> None:
    hidden, weight = random(n, D, grad=True), random(2 * heads, D, grad=True)
    out = prudent.ensemble_reward(hidden, weight, seed=torch.tensor([1], device=DEVICE), centre="batch")
    assert out.reward.shape == (n,)
    assert out.std.shape == (n, heads)
    (out.reward.square().sum() + out.mean.sum() + out.reward_sum).backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()  # noqa: PT018
    assert weight.grad is not None and torch.isfinite(weight.grad).all()  # noqa: PT018


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_wanted_gradients_are_made(needs: tuple[bool, ...]) -> None:
    t = {name: v.detach().requires_grad_(need) for (name, v), need in zip(tensors().items(), needs, strict=True)}
    out = prudent.ensemble_reward(t["hidden"], t["weight"], t["bias"], norm_weight=t["norm_weight"])
    assert out.reward.requires_grad == any(needs)
    if any(needs):
        out.reward.sum().backward()  # a stride-0 gradient
    full = tensors()
    wanted = prudent.ensemble_reward(full["hidden"], full["weight"], full["bias"], norm_weight=full["norm_weight"])
    wanted.reward.sum().backward()
    for name, need in zip(t, needs, strict=True):
        assert (t[name].grad is not None) == need
        if need:
            torch.testing.assert_close(t[name].grad, full[name].grad, rtol=1e-5, atol=1e-6)


def test_nothing_saved_is_changed_and_backward_can_run_twice() -> None:
    t = tensors()
    loss = prudent.ensemble_reward(t["hidden"], t["weight"], seed=torch.tensor([3], device=DEVICE)).reward.sum()
    first = torch.autograd.grad(loss, [t["hidden"], t["weight"]], retain_graph=True)
    second = torch.autograd.grad(loss, [t["hidden"], t["weight"]])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused_not_silently_zero() -> None:
    t = tensors()
    loss = prudent.ensemble_reward(t["hidden"], t["weight"]).reward.square().sum()
    (gradient,) = torch.autograd.grad(loss, t["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_checkpointing_replays_the_same_noise() -> None:
    t, seed = tensors(), torch.tensor([99], device=DEVICE)

    def reward(hidden: torch.Tensor) -> torch.Tensor:
        return prudent.ensemble_reward(hidden, t["weight"], seed=seed).reward.sum()

    plain = torch.autograd.grad(reward(t["hidden"]), t["hidden"])
    replayed = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(reward, t["hidden"], use_reentrant=False), t["hidden"]
    )
    assert torch.equal(plain[0], replayed[0])


def test_on_a_cpu_fp64_is_served_by_the_reference_exactly() -> None:
    t = tensors(torch.float64, grad=False, device="cpu")
    inputs = as_inputs(t)
    found, wanted = torch.ops.prudent.ensemble_reward(*inputs, True), reference.forward(inputs, True)
    for i in (0, 1, 2, 3, 5):
        assert torch.equal(found[i], wanted[i])
    assert found[4].shape == (0,)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden": "text"}, "hidden: expected a tensor"),
    ({"hidden": torch.tensor(1.0)}, "hidden: expected a tensor"),
    ({"hidden": torch.zeros(4, D, dtype=torch.int64)}, "hidden: expected dtype"),
    ({"hidden": torch.zeros(4, 0)}, "hidden: expected a last dimension above 0"),
    ({"hidden": torch.zeros(D, 4).T}, "hidden: expected a contiguous last dimension"),
    ({"weight": None}, "weight: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(0, D)}, r"weight: expected \[2K, 9\] with K >= 1"),
    ({"weight": torch.zeros(5, D)}, r"weight: expected \[2K, 9\]"),
    ({"weight": torch.zeros(6, D + 1)}, r"weight: expected \[2K, 9\].*got \[6, 10\]"),
    ({"weight": torch.zeros(6, D, dtype=torch.float64)}, "weight: expected float64 only with float64 hidden"),
    ({"weight": torch.zeros(6, D).to_sparse()}, "weight: expected a dense tensor, got torch.sparse_coo"),
    ({"hidden": torch.zeros(N, D).to_sparse()}, "hidden: expected a dense tensor, got torch.sparse_coo"),
    ({"hidden": torch.zeros(2, N, D).to_sparse()}, "hidden: expected a dense tensor, got torch.sparse_coo"),
    ({"bias": [0.0] * 6}, "bias: expected a tensor or None, got list"),
    ({"norm_weight": 1.0}, "norm_weight: expected a tensor or None, got float"),
    ({"bias": torch.zeros(3)}, r"bias: expected shape \[6\], got \[3\]"),
    ({"bias": torch.zeros(6, dtype=torch.bfloat16)}, "bias: expected dtype float32"),
    ({"rows": torch.tensor([0, 8])}, r"rows: expected values in \[0, 8\) \(rows of hidden\), got 8"),
    ({"rows": torch.tensor([-1])}, "rows: expected values in .* got -1"),
    ({"rows": torch.tensor([0], dtype=torch.int32)}, "rows: expected dtype int64, got torch.int32"),
    ({"rows": torch.tensor([[0]])}, "rows: expected 1 dimension"),
    ({"norm_weight": torch.ones(D + 1)}, r"norm_weight: expected shape \[9\]"),
    ({"norm_eps": float("nan")}, "norm_eps: expected a finite number >= 0, got nan"),
    ({"norm_eps": "x"}, "norm_eps: expected a finite number >= 0, got x"),
    ({"std_floor": None}, "std_floor: expected a finite number >= 0, got None"),
    ({"std_floor": -1.0}, "std_floor: expected a finite number >= 0"),
    ({"seed": 3}, "seed: expected a tensor or None, got int"),
    ({"seed": torch.tensor([1, 2])}, r"seed: expected shape \[1\]"),
    ({"shift": torch.zeros(K + 1)}, r"shift: expected shape \[3\]"),
    ({"scale": torch.tensor([1.0, 0.0, 1.0])}, "scale: expected values above 0"),
    ({"std_ref": torch.tensor([1.0, float("nan"), 1.0])}, "std_ref: expected values above 0"),
    ({"aggregation": "nominal,nominal=relative_std"}, "std_ref: expected each head's typical std"),
    ({"aggregation": "head:3"}, "expected a head below 3"),
    ({"aggregation": "best"}, "aggregation: kind: expected one of"),
    ({"centre": "groups"}, "aggregation: centre: expected one of none, batch, group"),
    ({"centre": "group"}, "group: expected labels"),
    ({"group": 4}, "group: expected centre='group', its only use"),
    ({"group": 3, "centre": "group"}, "group: expected a size that divides the 8 rows, got 3"),
    ({"group": 0, "centre": "group"}, "group: expected a size above 0"),
    ({"group": True, "centre": "group"}, "group: expected a tensor of labels or a size, got bool"),
    ({"group": torch.zeros(3, dtype=torch.int64), "centre": "group"}, r"group: expected shape \[8\]"),
    ({"group": torch.full((8,), 8), "centre": "group"}, r"group: expected values in \[0, 8\)"),
    ({"bias": torch.zeros(6, device="meta")}, r"bias: expected device cpu \(hidden's\), got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_refused_with_argument_expectation_and_what_came(changes: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"hidden": torch.zeros(N, D), "weight": torch.zeros(2 * K, D)} | changes
    with pytest.raises(ValueError, match=says):
        prudent.ensemble_reward(**arguments)


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_refused_in_the_same_words_with_and_without_the_native_library(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"hidden": torch.zeros(N, D), "weight": torch.zeros(2 * K, D)} | changes
    words = []
    for available in (cpu.available(), False):
        monkeypatch.setattr(cpu, "available", lambda available=available: available)
        with pytest.raises(ValueError, match=says) as caught:
            prudent.ensemble_reward(**arguments)
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_an_error_that_is_not_about_the_arguments_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(inputs: Inputs, keep: bool) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(cpu, "forward", fails)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        prudent.ensemble_reward(torch.zeros(N, D), torch.zeros(2 * K, D))


def test_the_registered_op_refuses_with_the_same_words_even_on_fake_tensors() -> None:
    bad = as_inputs(tensors(grad=False, device="cpu"), bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"ensemble_reward: bias: expected shape \[6\], got \[3\]"):
        torch.ops.prudent.ensemble_reward(*bad, False)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=r"bias: expected shape \[6\], got \[3\]"),
    ):
        torch.ops.prudent.ensemble_reward(*bad, False)
