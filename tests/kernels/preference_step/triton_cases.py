"""Cases for the Triton execution of `preference_step`; test_triton.py runs them in a child process.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/preference_step/triton_cases.py` (no GPU), or without the variable on
a GPU. Every test runs with uninitialised memory full of NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from prudent.kernels.launch import recording
from prudent.kernels.preference_step import configs, op, preference_step, reference
from prudent.kernels.preference_step import triton as execution
from prudent.kernels.preference_step.triton_kernels import finish_kernel
from prudent.kernels.preference_step.triton_wide import coefficient_kernel, direction_kernel

from .cases import LOSSES, as_exact_as_plain_torch, equal, make

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def agrees_in_fp64(name: str, **shape: Any) -> None:
    inputs = make(LOSSES[name], device=DEVICE, **shape)
    equal(execution.step(inputs), reference.step(inputs), 1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_the_reference_in_fp64(name: str) -> None:
    agrees_in_fp64(name)


@pytest.mark.parametrize("shape", [
    {"pairs": 1, "d": 1, "k": 1}, {"pairs": 20, "d": 130, "k": 3, "gathered": True}, {"pairs": 3, "d": 5, "k": 9},
], ids=lambda shape: "x".join(str(v) for v in shape.values()))  # fmt: skip
@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_any_number_of_pairs_features_and_heads(name: str, shape: dict[str, Any]) -> None:
    agrees_in_fp64(name, **shape)


@pytest.mark.parametrize("name", ["bt-all", "closed-bsr"])
def test_a_program_takes_its_share_of_the_pairs_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs to a group, of which each goes through several blocks; and partials added in several steps."""
    monkeypatch.setattr(execution, "shares_of", lambda pairs, groups, dim: 2)
    few = configs.finish_config(torch.float64)._replace(block_rows=2)
    monkeypatch.setattr(execution, "finish_config", lambda dtype: few)
    agrees_in_fp64(name, pairs=31, k=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_our_error_is_at_most_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    inputs = make(LOSSES[name], d=129, dtype=dtype, device=DEVICE)
    got = execution.step(inputs)
    as_exact_as_plain_torch(got, inputs)
    equal(got, reference.step(inputs), 2e-5)


def test_a_sixteen_bit_weight_gets_a_sixteen_bit_gradient() -> None:
    inputs = make(LOSSES["closed-centre"], dtype=torch.bfloat16, device=DEVICE)
    inputs = inputs._replace(weight=inputs.weight.bfloat16())
    assert execution.step(inputs)[1].dtype == torch.bfloat16
    equal(execution.step(inputs), reference.step(inputs), 1e-2)


@pytest.mark.parametrize("name", ["bt-bsr", "closed-centre"])
def test_rows_may_lie_at_any_stride(name: str) -> None:
    inputs = make(LOSSES[name], pairs=6, device=DEVICE)
    base = torch.randn(30, 40, dtype=torch.float64, device=DEVICE)
    for features in (base[:12, 3:36], base[:24:2, :33], base[:1, :33].expand(12, 33)):
        strided = inputs._replace(features=features)
        equal(execution.step(strided), reference.step(strided), 1e-11)


def test_all_pairs_on_one_head_leave_the_others_at_zero() -> None:
    inputs = make(LOSSES["sampled"], device=DEVICE)
    inputs = inputs._replace(head_id=torch.full_like(inputs.head_id, 4))  # type: ignore[arg-type]
    equal(execution.step(inputs), reference.step(inputs), 1e-11)
    assert not execution.step(inputs)[1][:4].any()


@pytest.mark.parametrize("name", ["bt", "bt-bsr", "closed", "sampled-all"])
def test_a_nan_in_the_features_is_a_nan_in_the_loss(name: str) -> None:
    inputs = make(LOSSES[name], pairs=3, d=5, k=2, dtype=torch.float32, device=DEVICE)
    inputs.features[1, 2] = float("nan")
    assert execution.step(inputs)[0].isnan()


def test_the_same_call_has_the_same_bits() -> None:
    inputs = make(LOSSES["sampled-all"], pairs=20, dtype=torch.float16, device=DEVICE)
    equal(execution.step(inputs), execution.step(inputs), 0.0)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every width is too wide for a program: several blocks of columns, of pairs and of shares."""
    monkeypatch.setattr(execution, "one_read", lambda loss, dtype, lanes: 0)
    tile = configs.wide_config(torch.float64, execution.LANES)._replace(block_rows=2, block_dim=16)
    monkeypatch.setattr(execution, "wide_config", lambda dtype, lanes: tile)
    monkeypatch.setattr(execution, "shares_of", lambda pairs, groups, dim: 2)


@pytest.mark.parametrize("name", LOSSES)
def test_features_wider_than_a_program_holds_are_the_reference_in_fp64(name: str, narrow: None) -> None:
    agrees_in_fp64(name, pairs=31, k=3, d=33, gathered=True)


@pytest.mark.parametrize("shape", [
    {"pairs": 1, "d": 1, "k": 1}, {"pairs": 5, "d": 16, "k": 9}, {"pairs": 40, "d": 48, "k": 2},
], ids=lambda shape: "x".join(str(v) for v in shape.values()))  # fmt: skip
@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_wide_features_of_any_number_of_pairs_and_heads(name: str, shape: dict[str, Any], narrow: None) -> None:
    agrees_in_fp64(name, **shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bt-all", "sampled-all"])
def test_wide_features_are_no_less_exact_than_plain_torch_with_the_same_bits_every_time(
    name: str, dtype: torch.dtype, narrow: None
) -> None:
    inputs = make(LOSSES[name], d=129, dtype=dtype, device=DEVICE)
    got = execution.step(inputs)
    as_exact_as_plain_torch(got, inputs)
    equal(execution.step(inputs), got, 0.0)


@pytest.mark.parametrize(("name", "d"), [("closed-all", 5120), ("sampled-all", 8192), ("bt-all", 8193)])
def test_as_shipped_past_what_a_program_holds(name: str, d: int) -> None:
    inputs = make(LOSSES[name], pairs=5, d=d, k=2, dtype=torch.bfloat16, device=DEVICE)
    with recording() as launches:
        execution.step(inputs)
    assert [launch.kernel for launch in launches] == [coefficient_kernel, direction_kernel, finish_kernel]
    as_exact_as_plain_torch(execution.step(inputs), inputs)


def test_wide_features_with_a_nan_strides_and_one_head_for_all_pairs(narrow: None) -> None:
    inputs = make(LOSSES["sampled-all"], pairs=6, device=DEVICE)
    base = torch.randn(30, 40, dtype=torch.float64, device=DEVICE)
    for features in (base[:12, 3:36], base[:24:2, :33], base[:1, :33].expand(12, 33)):
        strided = inputs._replace(features=features, head_id=torch.full_like(inputs.head_id, 4))  # type: ignore[arg-type]
        equal(execution.step(strided), reference.step(strided), 1e-11)
    inputs.features[3, 20] = float("nan")
    assert execution.step(inputs)[0].isnan()


def test_the_public_op_reaches_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(op, "_backend", lambda inputs: execution)
    inputs = make(LOSSES["bt-margin"], dtype=torch.float32, device=DEVICE)
    out = preference_step(inputs.features, inputs.weight, inputs.bias, margin=inputs.margin)
    equal(out[:4], execution.step(inputs), 0.0)
    equal(out[:4], torch.ops.prudent.preference_step(*inputs), 0.0)


def test_addresses_beyond_two_to_the_31_elements() -> None:
    d, stored = 64, 2**25 + 40
    base = torch.empty(stored, d, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, of which few rows' pages are touched
    places = torch.tensor([stored - 1, 0, stored - 3, stored - 2], device=DEVICE)
    small = make(LOSSES["closed"], pairs=2, d=d, dtype=torch.bfloat16, device=DEVICE)
    base[places] = small.features
    equal(execution.step(small._replace(features=base, rows=places)), execution.step(small), 0.0)


@needs_gpu
def test_a_captured_graph_replays_with_new_features() -> None:
    inputs = make(LOSSES["sampled-all"], pairs=70, dtype=torch.bfloat16, device=DEVICE)
    execution.step(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = execution.step(inputs)
    for _ in range(3):
        inputs.features.copy_(torch.randn_like(inputs.features))
        graph.replay()
        torch.cuda.synchronize()
        equal(captured, execution.step(inputs), 0.0)
