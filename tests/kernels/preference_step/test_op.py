"""The public op: equal results eager, registered and compiled, no derivative, and wrong input refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from prudent.kernels.preference_step import op, preference_step, reference
from prudent.kernels.preference_step.contract import Inputs

from .cases import LOSSES, as_exact_as_plain_torch, composed, equal, make

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
P, D, K = 4, 9, 3


def call(inputs: Inputs, **changes: Any) -> Any:
    values = inputs._asdict() | changes
    return preference_step(values.pop("features"), values.pop("weight"), values.pop("bias"), **values)


@pytest.mark.parametrize("name", LOSSES)
def test_the_registered_op_passes_opcheck(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        opcheck(torch.ops.prudent.preference_step.default, make(LOSSES[name], dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["bt-all", "closed", "sampled-all"])
def test_every_road_gives_the_same_bits_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    inputs = make(LOSSES[name], dtype=dtype, device=DEVICE)
    eager = call(inputs)
    equal(eager[:4], torch.ops.prudent.preference_step(*inputs), 0.0)
    as_exact_as_plain_torch(eager[:3], inputs)
    again = call(inputs)
    equal(again[:4], eager[:4], 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_fp64_is_the_composed_form(name: str) -> None:
    inputs = make(LOSSES[name], gathered=True, device=DEVICE)
    equal(call(inputs)[:3], composed(inputs), 1e-11)


@pytest.mark.parametrize("name", ["bt-margin", "sampled-all"])
def test_compiled_whole_with_dynamic_rows(name: str) -> None:
    def step(inputs: Inputs) -> Any:
        out = call(inputs)
        return out.loss * 2, out.dweight, out.dbias, out.accuracy

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for pairs in (5, 8, 3):
        inputs = make(LOSSES[name], pairs=pairs, dtype=torch.float32, device=DEVICE)
        equal(compiled(inputs), step(inputs), 0.0)


def test_it_is_the_gradient_and_carries_none() -> None:
    inputs = make(LOSSES["closed-all"], dtype=torch.float32, device=DEVICE)
    weight, bias = inputs.weight.requires_grad_(), inputs.bias.requires_grad_()
    out = call(inputs)
    assert not any(t.requires_grad for t in out)
    weight.grad, bias.grad = out.dweight, out.dbias
    torch.optim.SGD([weight, bias], lr=0.1).step()
    assert call(inputs).loss < out.loss


def test_a_few_steps_train_a_head() -> None:
    inputs = make(LOSSES["bt"], pairs=64, d=16, k=1, dtype=torch.float32, device=DEVICE)
    weight, bias = (
        torch.nn.Parameter(torch.zeros_like(inputs.weight)),
        torch.nn.Parameter(torch.zeros_like(inputs.bias)),
    )
    wanted = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    swap = (inputs.features[:64] @ wanted < inputs.features[64:] @ wanted)[:, None]
    chosen, rejected = inputs.features[:64], inputs.features[64:]
    features = torch.cat([torch.where(swap, rejected, chosen), torch.where(swap, chosen, rejected)])
    optimizer = torch.optim.AdamW([weight, bias], lr=0.1)
    for _ in range(60):
        out = preference_step(features, weight, bias, loss="bt")
        weight.grad, bias.grad = out.dweight, out.dbias
        optimizer.step()
    assert out.accuracy == 1
    assert out.std is None


def test_nothing_given_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(LOSSES["sampled-all"], dtype=torch.bfloat16, gathered=True, device=DEVICE)
    before = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
    call(inputs)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_without_the_native_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from prudent.kernels.preference_step import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)
    inputs = make(LOSSES["closed"], dtype=torch.float32)
    equal(call(inputs)[:4], reference.step(inputs), 0.0)


INDEX = torch.tensor([0, 1, 2, 0])
HALF = torch.full((P,), 0.5)
BRME: dict[str, Any] = {"loss": "brme", "head_id": INDEX, "p_hat": HALF}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"features": "text"}, "features: expected a tensor, got str"),
    ({"features": torch.zeros(7, D)}, "features: expected an even number of rows above 0 .*, got 7"),
    ({"features": torch.zeros(0, D)}, "features: expected an even number of rows above 0 .*, got 0"),
    ({"features": torch.zeros(8, 0)}, "features: expected a last dimension above 0"),
    ({"features": torch.zeros(8)}, r"features: expected 2 dimensions, got \[8\]"),
    ({"features": torch.zeros(8, D, dtype=torch.int64)}, "features: expected dtype bfloat16, float16, float32"),
    ({"features": torch.zeros(D, 8).T}, r"features: expected a contiguous last dimension \(stride 1\), got stride 8"),
    ({"weight": None}, "weight: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(5, D)}, r"weight: expected \[2K, 9\] with K >= 1 .*, got \[5, 9\]"),
    ({"weight": torch.zeros(6, D + 1)}, r"weight: expected \[2K, 9\].*, got \[6, 10\]"),
    ({"weight": torch.zeros(0, D)}, r"weight: expected \[2K, 9\].*, got \[0, 9\]"),
    ({"weight": torch.zeros(6, D, dtype=torch.float64)}, "weight: expected float64 only with float64 features"),
    ({"bias": None}, "bias: expected a tensor, got NoneType"),
    ({"bias": torch.zeros(3)}, r"bias: expected shape \[6\], got \[3\]"),
    ({"bias": torch.zeros(6, dtype=torch.bfloat16)}, "bias: expected dtype float32, got torch.bfloat16"),
    ({"bias": torch.zeros(6, dtype=torch.float64)}, "bias: expected float64 only with float64 features"),
    ({"bias": torch.zeros(6, device="meta")}, r"bias: expected device cpu \(features'\), got meta"),
    ({"rows": torch.tensor([0, 1, 2])}, "rows: expected an even number of rows above 0 .*, got 3"),
    ({"rows": torch.tensor([0, 8])}, r"rows: expected values in \[0, 8\) \(rows of features\), got 8"),
    ({"rows": torch.tensor([-1, 0])}, r"rows: expected values in \[0, 8\) .*, got -1"),
    ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, "rows: expected dtype int64"),
    ({"rows": torch.tensor([[0, 1]])}, r"rows: expected 1 dimension, got \[1, 2\]"),
    ({"loss": "hinge"}, "loss: expected one of bt, brme, got 'hinge'"),
    ({"loss": "brme", "head_id": INDEX}, r"p_hat: expected a tensor \[4\] with loss 'brme' .*, got none with 'brme'"),
    ({"loss": "brme", "p_hat": HALF}, r"head_id: expected a tensor \[4\] with loss 'brme' .*, got none with 'brme'"),
    ({"p_hat": HALF}, "p_hat: expected .* none with 'bt', got one with 'bt'"),
    ({"head_id": INDEX}, "head_id: expected .* none with 'bt', got one with 'bt'"),
    ({"seed": torch.tensor([1])}, "seed: expected none with loss 'bt', which draws no noise, got one"),
    (BRME | {"margin": HALF}, "margin: expected none with loss 'brme', which has no margin, got one"),
    (BRME | {"seed": 3}, "seed: expected a tensor or None, got int"),
    (BRME | {"seed": torch.tensor([1, 2])}, r"seed: expected shape \[1\], got \[2\]"),
    (BRME | {"p_hat": torch.zeros(3)}, r"p_hat: expected shape \[4\], got \[3\]"),
    (BRME | {"p_hat": torch.tensor([0.0, 0.5, 0.5, 0.5])}, r"p_hat: expected values in \(0, 1\), got 0.0"),
    (BRME | {"p_hat": torch.tensor([0.5, 0.5, 1.0, 0.5])}, r"p_hat: expected values in \(0, 1\), got 1.0"),
    (BRME | {"p_hat": torch.tensor([0.5, float("nan"), 0.5, 0.5])}, r"p_hat: expected values in \(0, 1\), got nan"),
    (BRME | {"head_id": torch.tensor([0, 1, 2, 3])}, r"head_id: expected values in \[0, 3\) \(heads\), got 3"),
    (BRME | {"head_id": torch.zeros(4)}, "head_id: expected dtype int64, got torch.float32"),
    (BRME | {"head_id": INDEX[:2]}, r"head_id: expected shape \[4\], got \[2\]"),
    ({"margin": torch.zeros(4, 1)}, r"margin: expected shape \[4\], got \[4, 1\]"),
    ({"margin": torch.zeros(4, dtype=torch.float16)}, "margin: expected dtype float32"),
    ({"bsr": -1.0}, "bsr: expected a finite number >= 0, got -1.0"),
    ({"centre": float("nan")}, "centre: expected a finite number >= 0, got nan"),
    (BRME | {"alpha": float("inf")}, "alpha: expected a finite number >= 0, got inf"),
    (BRME | {"alpha": None}, "alpha: expected a finite number >= 0, got None"),
    (BRME | {"alpha": "x"}, "alpha: expected a finite number >= 0, got x"),
    ({"bsr": True}, "bsr: expected a finite number >= 0, got True"),
    ({"weight": torch.zeros(2 * K, D).to_sparse()}, "weight: expected a dense tensor, got torch.sparse_coo"),
    (BRME | {"std_floor": -0.1}, "std_floor: expected a finite number >= 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[f"{list(c)[-1]}-{i}" for i, (c, _) in enumerate(REFUSED)])
def test_refused_with_argument_expectation_and_what_came(changes: dict[str, Any], says: str) -> None:
    arguments = {"features": torch.zeros(2 * P, D), "weight": torch.zeros(2 * K, D), "bias": torch.zeros(2 * K)}
    with pytest.raises(ValueError, match=f"preference_step: {says}"):
        preference_step(**(arguments | changes))


def test_the_registered_op_refuses_with_the_same_words_even_on_fake_tensors() -> None:
    bad = make(LOSSES["bt"], dtype=torch.float32)._replace(bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"preference_step: bias: expected shape \[10\], got \[3\]"):
        torch.ops.prudent.preference_step(*bad)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=r"preference_step: bias: expected shape \[10\], got \[3\]"),
    ):
        torch.ops.prudent.preference_step(*bad)


def test_a_nan_in_the_features_is_a_nan_in_the_loss() -> None:
    for name in LOSSES:
        inputs = make(LOSSES[name], dtype=torch.float32, device=DEVICE)
        inputs.features[3, 5] = float("nan")
        assert call(inputs).loss.isnan(), name


def test_the_backend_is_chosen_by_device_and_dtype() -> None:
    assert op._backend(make(LOSSES["bt"])) is reference
