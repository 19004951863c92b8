"""What the caller sets for his own products reaches none of ours: autocast, and the precision of fp32 products.

The references serve where the fused executions do not (a CPU without the native library, K > 64, wide D), so they are
called by every road: directly, by the public op, and by the registered op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prudent
from prudent import TrustRegion
from prudent.kernels.ensemble_reward import op as ensemble_op
from prudent.kernels.ensemble_reward import reference as ensemble_reference
from prudent.kernels.exact import times, transposed_times
from prudent.kernels.preference_step import op as step_op
from prudent.kernels.preference_step import reference as step_reference

from .preference_step.cases import LOSSES, make

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, K, R = 24, 64, 65, 3  # K past what the Triton kernels take


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast(DEVICE.type, dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast(DEVICE.type, dtype=torch.float16),
    "precision high": lambda: precision("high"),
    "precision medium": lambda: precision("medium"),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ensemble(dtype: torch.dtype = torch.float32, registered: bool = False) -> list[Tensor]:
    """Outputs and gradients of `ensemble_reward` with a norm and a trust region."""
    one = torch.ones(1, device=DEVICE)
    trust = TrustRegion(normal(D, seed=1), one.expand(D) / D, normal(R, D, seed=2) / D, -one.expand(R) / 9, one, one)
    hidden, weight, norm = normal(N, D).to(dtype), normal(2 * K, D, seed=3) / D**0.5, 1 + normal(D, seed=4) / 9
    leaves = [t.requires_grad_() for t in (hidden, weight, norm)]
    seed = torch.tensor([7], device=DEVICE)
    if registered:
        arguments = (None, None, norm, seed, None, None, None, None, 0, 1e-6, 1e-3, "lcb:1,trust=1", *trust, True)
        reward, mean, std, _, distance, _ = torch.ops.prudent.ensemble_reward(hidden, weight, *arguments)
    else:
        reward, mean, std, _, distance = prudent.ensemble_reward(
            hidden, weight, norm_weight=norm, seed=seed, aggregation="lcb:1,trust=1", trust=trust
        )
    assert distance is not None
    loss = (reward + distance).sum() + (mean * std).sum()
    return [t.detach() for t in (reward, mean, std, distance, *torch.autograd.grad(loss, leaves))]


def step(dtype: torch.dtype = torch.float32, registered: bool = False, loss: str = "sampled-all") -> list[Tensor]:
    inputs = make(LOSSES[loss], pairs=N, d=D, dtype=dtype, device=DEVICE)
    if registered:
        return list(torch.ops.prudent.preference_step(*inputs))
    values = inputs._asdict()
    return list(prudent.preference_step(values.pop("features"), values.pop("weight"), values.pop("bias"), **values))


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble_op, "_backend", lambda inputs: ensemble_reference)
    monkeypatch.setattr(step_op, "_backend", lambda inputs: step_reference)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("run", [ensemble, step])
def test_a_callers_setting_changes_no_bit_of_the_references(
    run: Callable[..., list[Tensor]], registered: bool, setting: str, references: None
) -> None:
    expected = run(registered=registered)
    with SETTINGS[setting]():
        got = run(registered=registered)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [ensemble, step])
def test_nor_of_the_execution_that_this_machine_runs(
    run: Callable[..., list[Tensor]], dtype: torch.dtype, setting: str
) -> None:
    expected = run(dtype)
    with SETTINGS[setting]():
        got = run(dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_setting_is_still_the_callers_afterwards(references: None) -> None:
    with precision("medium"), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        ensemble()
        step()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_autocast_enabled(DEVICE.type)


class Products(TorchDispatchMode):
    """Collect the dtypes of every matrix product's operands."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot", "addr", "addbmm")

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            self.dtypes += [a.dtype for a in args if isinstance(a, Tensor)]
        return func(*args, **(kwargs or {}))


class Watched:
    """A reference whose calls run under a collector, which would not see inside an op from around it."""

    def __init__(self, module: Any, seen: Products) -> None:
        self.module, self.seen = module, seen

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "again":  # a GPU's repeated launches, of which a reference has none
            return lambda *arguments: None

        def run(*arguments: Any) -> Any:
            with self.seen:
                return getattr(self.module, name)(*arguments)

        return run


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("run", [ensemble, step])
def test_every_product_of_the_references_is_in_fp64_which_no_device_lowers(
    run: Callable[..., list[Tensor]], autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This shows without a GPU that CUDA's autocast and TF32, which pass fp64 by, find nothing to change."""
    seen = Products()
    monkeypatch.setattr(ensemble_op, "_backend", lambda inputs: Watched(ensemble_reference, seen))
    monkeypatch.setattr(step_op, "_backend", lambda inputs: Watched(step_reference, seen))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16) if autocast else nullcontext():
        run()
    assert seen.dtypes
    assert set(seen.dtypes) == {torch.float64}


def test_the_collector_sees_a_product_in_fp32_and_what_autocast_makes_of_it() -> None:
    a = normal(8, 8)
    with Products() as seen:
        _ = a @ a
    assert set(seen.dtypes) == {torch.float32}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), Products() as seen:
        _ = a @ a
    assert set(seen.dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("rows", [0, 1, 1024, 2500])
def test_the_products_of_blocks_of_rows_are_the_products(rows: int) -> None:
    a, b, w = normal(rows, 5).double(), normal(rows, 7, seed=1).double(), normal(7, 5, seed=2).double()
    torch.testing.assert_close(times(b, w), b @ w, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(transposed_times(a, b), a.T @ b, rtol=1e-12, atol=1e-12)
    assert times(b.float(), w.float()).dtype == torch.float32
