"""The C++ execution on every instruction set of this machine, compared with the composed form.

Our error against fp64 is at most that of the plain low-precision computation. Results that must not depend on threads,
memory or layout are compared bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.kernels import native
from prudent.kernels.preference_step import cpu, reference
from prudent.kernels.preference_step.contract import Inputs

from .cases import LOSSES, as_exact_as_plain_torch, equal, in_fp64, make

if not native.load():
    pytest.skip("the native CPU library is not built", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa", "poisoned_memory")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def holds(inputs: Inputs) -> None:
    got = cpu.step(inputs)
    as_exact_as_plain_torch(got, inputs)
    exact = reference.step(in_fp64(inputs))
    equal([v.double() for v in got], exact, 4e-5 if inputs.weight.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_as_exact_as_plain_torch_in_every_dtype(name: str, dtype: str) -> None:
    holds(make(LOSSES[name], pairs=37, d=577, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("name", ["bt-all", "closed", "sampled-all"])
@pytest.mark.parametrize("shape", [
    {"pairs": 1, "d": 1, "k": 1}, {"pairs": 1, "d": 33, "k": 5}, {"pairs": 8, "d": 32, "k": 1},
    {"pairs": 17, "d": 31, "k": 33}, {"pairs": 3000, "d": 5, "k": 3},
], ids=lambda shape: "x".join(str(v) for v in shape.values()))  # fmt: skip
def test_any_number_of_pairs_features_and_heads(name: str, shape: dict[str, int]) -> None:
    holds(make(LOSSES[name], dtype=torch.bfloat16, **shape))


@pytest.mark.parametrize("name", ["bt-all", "closed-all"])
def test_gathered_rows_are_those_rows(name: str) -> None:
    inputs = make(LOSSES[name], pairs=50, d=70, dtype=torch.float32, gathered=True)
    assert inputs.rows is not None
    assert inputs.rows.unique().numel() < inputs.num_rows
    equal(cpu.step(inputs), cpu.step(inputs._replace(features=inputs.features[inputs.rows], rows=None)), 0.0)


@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_strides_are_read_where_they_lie(name: str) -> None:
    inputs = make(LOSSES[name], pairs=9, d=40, dtype=torch.float32)
    wide = torch.randn(18, 100)
    wide[:, 3:43] = inputs.features
    changed: dict[str, Any] = {
        "features": wide[:, 3:43],
        "weight": inputs.weight.T.contiguous().T,
        "bias": inputs.bias[:, None].expand(-1, 2)[:, 0],
        "rows": torch.arange(18).repeat_interleave(2)[::2],
    }
    for field in ("head_id", "p_hat", "margin"):
        value = getattr(inputs, field)
        if value is not None:
            changed[field] = value.repeat_interleave(3)[::3]
    equal(cpu.step(inputs._replace(**changed)), cpu.step(inputs), 0.0)
    one_row = inputs._replace(features=wide[:1, :40].expand(18, 40))
    equal(cpu.step(one_row), cpu.step(one_row._replace(features=one_row.features.contiguous())), 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_weight_gets_a_sixteen_bit_gradient(dtype: torch.dtype) -> None:
    inputs = make(LOSSES["closed-all"], dtype=dtype)
    inputs = inputs._replace(weight=inputs.weight.to(dtype))
    assert cpu.step(inputs)[1].dtype == dtype
    holds(inputs)


def test_all_pairs_on_one_head_leave_the_others_at_zero() -> None:
    inputs = make(LOSSES["closed"], pairs=70, dtype=torch.float32)
    inputs = inputs._replace(head_id=torch.full_like(inputs.head_id, 4))  # type: ignore[arg-type]
    dweight = cpu.step(inputs)[1]
    assert torch.equal(dweight[:4], torch.zeros_like(dweight[:4]))
    holds(inputs)


@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    inputs = make(LOSSES[name], pairs=700, d=513, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(cpu.step(inputs))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        equal(result, results[0], 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_and_infinity_reach_the_loss_as_in_the_reference(name: str, value: float) -> None:
    """With one head: the mean of heads' weights need not have an infinity where the mean of their rewards has NaN."""
    inputs = make(LOSSES[name], dtype=torch.float32, k=1)
    inputs.features[4, 7] = value
    torch.testing.assert_close(cpu.step(inputs)[0], reference.step(inputs)[0], rtol=1e-5, atol=0, equal_nan=True)
    assert value == value or cpu.step(inputs)[0].isnan()


def test_cpp_refuses_what_would_read_out_of_bounds() -> None:
    inputs = make(LOSSES["closed"], dtype=torch.float32, gathered=True)
    with pytest.raises(RuntimeError, match="preference_step: rows: 1000 is out of range"):
        cpu.step(inputs._replace(rows=torch.full_like(inputs.rows, 1000)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="preference_step: head_id: 9 is out of range"):
        cpu.step(inputs._replace(head_id=torch.full_like(inputs.head_id, 9)))  # type: ignore[arg-type]
