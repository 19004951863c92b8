"""The C++ execution on every instruction set of this machine, compared with the fp64 reference.

The rule for accuracy: our error against fp64 is at most that of the plain low-precision composition (norm and linear
layer in torch, in the storage type), plus a small tolerance. Results that must not depend on threads, memory or layout
are compared bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prudent.kernels import native
from prudent.kernels.ensemble_reward import cpu, reference
from prudent.kernels.ensemble_reward.contract import Inputs

from .cpu_cases import (
    ALL,
    DTYPES,
    OPTIONS,
    SPECS,
    backward,
    check_backward,
    check_forward,
    double,
    make,
    same,
    some_grads,
)

if not native.load():
    pytest.skip("the native CPU library is not built", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa", "poisoned_memory")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_less_exact_than_plain_torch_with_every_option(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = make(dtype, **options)
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("seed", [None, torch.tensor([3])], ids=["means", "samples"])
@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_every_aggregation_is_the_reference_s(spec: str, k: int, seed: Tensor | None) -> None:
    if "head:1" in spec and k == 1:
        spec = spec.replace("head:1", "head:0")
    inputs = make(n=50, d=33, k=k, aggregation=spec, seed=seed)
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("spec", SPECS)
def test_ties_go_where_the_reference_s_go(spec: str) -> None:
    hidden = torch.randint(-3, 4, (9, 4), generator=torch.Generator().manual_seed(2)).float()  # whole: sums are exact
    weight = hidden[:1].repeat(10, 1)  # all heads alike, so every choice among them is a tie
    inputs = make(hidden=hidden, weight=weight, bias=None, norm_weight=None, k=5, d=4, n=9, seed=None, aggregation=spec,
                  shift=None, scale=None, std_ref=torch.ones(5))  # fmt: skip
    for a, b in zip(cpu.forward(inputs)[:4], reference.forward(inputs)[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads, needs = some_grads(inputs), (True, True, False, False)
    pairs = zip(backward(cpu, grads, inputs, needs), backward(reference, grads, inputs, needs), strict=True)
    for a, b in pairs:
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 200])
@pytest.mark.parametrize("d", [1, 7, 64, 129, 577])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_rows_and_features(dtype: torch.dtype, d: int, n: int) -> None:
    # with one feature and no epsilon the norm leaves its sign alone, whose gradient is nothing but cancellation
    inputs = make(dtype, n=n, d=d, norm_eps=0.5 if d == 1 else 1e-6)
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_heads(dtype: torch.dtype, k: int) -> None:
    inputs = make(dtype, n=21, d=129, k=k)
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_rows_of_some_give_empty_rewards_and_zero_gradients(dtype: torch.dtype) -> None:
    inputs = make(dtype, rows=torch.empty(0, dtype=torch.int64), aggregation="min,centre=batch")
    reward, mean, std, total, _, _ = cpu.forward(inputs)
    assert (reward.shape, mean.shape, std.shape, float(total)) == ((0,), (0, 5), (0, 5), 0.0)
    for gradient in backward(cpu, some_grads(inputs), inputs, ALL):
        assert gradient is not None
        assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_at_any_stride_even_none(dtype: torch.dtype) -> None:
    wide = torch.randn(40, 700).to(dtype)
    for hidden in (wide[:37, 50:627], wide[:1, :577].expand(37, 577), wide.view(-1)[3 : 3 + 37 * 577].view(37, 577)):
        inputs = make(dtype, hidden=hidden)
        check_forward(inputs)
        check_backward(inputs)
        tight = inputs._replace(hidden=hidden.contiguous())
        assert same(cpu.forward(inputs), cpu.forward(tight))


def test_weight_at_any_stride() -> None:
    inputs = make()
    turned = inputs._replace(weight=inputs.weight.T.contiguous().T)
    assert same(cpu.forward(inputs), cpu.forward(turned))
    grads = some_grads(inputs)
    pairs = zip(backward(cpu, grads, inputs, ALL), backward(cpu, grads, turned, ALL), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gradients_at_any_stride_or_absent() -> None:
    inputs = make()
    one = torch.ones(())
    given = some_grads(inputs)
    for grads in [
        (one.expand(37), None, None, None), (None, one.expand(37, 5), None, None),
        (None, None, one.expand(37, 5), None), (None, None, None, one),
        (given[0], given[1].T.contiguous().T, given[2][:, :1].expand(37, 5), None),
        (given[0].repeat_interleave(3)[::3], None, None, given[3]),
    ]:  # fmt: skip
        check_backward(inputs, grads)


@pytest.mark.parametrize("needed", range(4))
def test_what_is_not_needed_is_not_made_and_the_rest_has_the_same_bits(needed: int) -> None:
    inputs = make(torch.bfloat16)
    grads = some_grads(inputs)
    needs = tuple(i == needed for i in range(4))
    alone, together = backward(cpu, grads, inputs, needs), backward(cpu, grads, inputs, ALL)
    assert [g is not None for g in alone] == list(needs)
    assert torch.equal(alone[needed], together[needed])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_and_infinite_features_come_out_as_in_the_reference(dtype: torch.dtype, norm: bool, spec: str) -> None:
    inputs = make(dtype, n=8, d=45, aggregation=spec, weight_dtype=torch.bfloat16)
    inputs = inputs if norm else inputs._replace(norm_weight=None)
    nan, inf = torch.nan, torch.inf
    for row, values in enumerate([(nan,), (inf,), (-inf,), (inf, -inf), (inf, 1.0)]):
        for column, value in enumerate(values):
            inputs.hidden[row + 1, 20 * column + row] = value
    for a, b in zip(cpu.forward(inputs)[:4], reference.forward(inputs)[:4], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)
    grads, needs = (torch.ones(8), None, None, None), (True, True, True, norm)
    got, want = backward(cpu, grads, inputs, needs), backward(reference, grads, inputs, needs)
    for a, b in zip(got[:1] + got[2:], want[:1] + want[2:], strict=True):
        assert (a is None) or torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_saved_holds_the_products_and_rstd_of_the_reference(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = make(dtype, **options)
    saved, exact = cpu.forward(inputs, True)[-1], reference.forward(double(inputs), True)[-1]
    assert saved.dtype == torch.float32
    torch.testing.assert_close(saved.double(), exact, rtol=1e-5, atol=2e-5)
    assert cpu.forward(inputs)[-1].shape == (0, 11)


@pytest.mark.parametrize(
    ("norm", "needs"),
    [(False, (True, False, True, False)), (True, (False, False, True, False)), (False, (False, False, True, False))],
)
@pytest.mark.parametrize("d", [64, 577])
def test_the_backward_reads_no_features_where_it_needs_none(norm: bool, needs: tuple[bool, ...], d: int) -> None:
    inputs = make(torch.bfloat16, d=d)
    inputs = inputs if norm else inputs._replace(norm_weight=None)
    grads, saved = some_grads(inputs), cpu.forward(inputs, True)[-1]
    poisoned = inputs._replace(hidden=torch.full_like(inputs.hidden, torch.nan))
    for a, b in zip(
        cpu.backward(grads, inputs, saved, needs), cpu.backward(grads, poisoned, saved, needs), strict=True
    ):
        assert (a is None) == (b is None)
        assert a is None or (not a.isnan().any() and torch.equal(a, b))


def test_the_backward_of_a_frozen_trunk_does_not_multiply_with_the_weight_again() -> None:
    inputs = make(torch.bfloat16)
    grads, saved, needs = some_grads(inputs), cpu.forward(inputs, True)[-1], (False, True, True, False)
    poisoned = inputs._replace(weight=torch.full_like(inputs.weight, torch.nan))
    found = [cpu.backward(grads, given, saved, needs) for given in (inputs, poisoned)]
    assert all(torch.equal(found[0][i], found[1][i]) for i in (1, 2))


def test_what_another_forward_saved_is_refused() -> None:
    inputs = make()
    saved = cpu.forward(inputs, True)[-1]
    for wrong in (saved[:3], saved[:, 1:], saved.double(), saved.T.contiguous().T):
        with pytest.raises(RuntimeError, match="ensemble_reward: saved: expected the forward's saved tensor"):
            cpu.backward(some_grads(inputs), inputs, wrong, ALL)


def test_softplus_keeps_its_relative_precision_from_tiny_to_huge() -> None:
    raw = torch.cat([torch.linspace(-85, 85, 4001), torch.tensor([-torch.inf, torch.inf, 20.0, 20.000002, 0.0])])
    options = dict.fromkeys(("bias", "shift", "scale", "std_ref", "norm_weight", "seed"))
    weight = torch.tensor([[0.0], [1.0]])
    finite = make(n=len(raw), d=1, k=1, hidden=raw[:, None], weight=weight, std_floor=0.0, **options)
    std = cpu.forward(finite)[2][:, 0]
    torch.testing.assert_close(std.double(), F.softplus(raw.double()), rtol=5e-7, atol=0)
    grads = (None, None, torch.ones(len(raw), 1), None)
    slope = backward(cpu, grads, finite, (True, False, False, False))[0][:-5, 0]
    torch.testing.assert_close(slope.double(), torch.sigmoid(raw[:-5].double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("spec", "want"), [("min", 1.0), ("median", 2.0), ("cvar:0.4", 1.5), ("head:1", 1.0), ("max", torch.inf)]
)
def test_an_infinite_head_counts_only_where_it_is_taken(spec: str, want: float) -> None:
    options = dict.fromkeys(("bias", "scale", "std_ref", "norm_weight", "seed"))
    shift = torch.tensor([-torch.inf, -1.0, -2.0])
    inputs = make(n=2, d=3, k=3, hidden=torch.zeros(2, 3), weight=torch.zeros(6, 3), aggregation=spec, **options)
    for execution in (cpu, reference):
        reward = execution.forward(inputs._replace(shift=shift))[0]
        assert reward.tolist() == [want, want]
        assert execution.forward(inputs._replace(shift=torch.tensor([torch.nan, -1.0, -2.0])))[0].isnan().all()


def one_weight(hidden: Tensor) -> Inputs:
    """K = D = 1, weight 1 for the mean and 0 for the std: the mean is the feature and d_hidden is d_mean."""
    options = dict.fromkeys(("bias", "shift", "scale", "std_ref", "norm_weight", "seed"))
    return make(n=len(hidden), d=1, k=1, hidden=hidden, weight=torch.tensor([[1.0], [0.0]]), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_16_bit_feature_is_read_exactly(dtype: torch.dtype) -> None:
    hidden = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    torch.testing.assert_close(cpu.forward(one_weight(hidden))[1], hidden.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_gradients_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    step = torch.cat([exact[1:], exact[-1:]])
    halfway = torch.cat([exact, (exact + step) / 2])  # the ties, where fp32 can hold them
    bits = halfway.view(torch.int32)
    halfway = torch.cat([bits, bits - 1, bits + 1]).view(torch.float32)  # and the values on either side of them
    grads = (None, halfway[:, None], None, None)
    got = backward(cpu, grads, one_weight(torch.zeros(len(halfway), 1, dtype=dtype)), (True, False, False, False))[0]
    torch.testing.assert_close(got, halfway[:, None].to(dtype), rtol=0, atol=0, equal_nan=True)


def test_noise_has_the_reference_s_bits() -> None:
    for seed, first in [(0, 0), (1, 0), (2**62 + 987654321, 2**32 - 3), (-1, 2**40 + 7)]:
        got = torch.ops.prudent_native.philox_words(torch.tensor([seed]), first, 100, native.isa_index())
        want = reference.philox_4x32(torch.tensor([seed]), torch.arange(first, first + 100))
        assert torch.equal(got, torch.stack(want[:2], dim=1))


def test_noise_of_a_head_is_the_reference_s() -> None:
    inputs = make(n=1000, d=1, hidden=torch.zeros(1000, 1), bias=None, shift=None, scale=None, std_floor=0.0,
                  aggregation="head:2")  # fmt: skip
    noise = cpu.forward(inputs)[0] / F.softplus(torch.zeros(()))
    torch.testing.assert_close(noise, reference.philox_normal(inputs.seed, 1000, 5)[:, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [None, torch.randint(0, 2000, (2500,), generator=torch.Generator().manual_seed(0))],
                         ids=["all rows", "rows"])  # fmt: skip
@pytest.mark.parametrize("spec", ["tradeoff:0.4,centre=batch", "median,centre=group"])
def test_same_bits_on_any_number_of_threads(spec: str, rows: Tensor | None) -> None:
    inputs = make(torch.bfloat16, n=2000, d=700, rows=rows, aggregation=spec, group_size=50 if "group" in spec else 0)
    grads = some_grads(inputs)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([*cpu.forward(inputs), *backward(cpu, grads, inputs, ALL)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert same(found[0], other)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_s_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    inputs = make(dtype, n=39, seed=None)
    _, mean, std, _, _, _ = cpu.forward(inputs)
    for start, stop in [(0, 1), (5, 7), (16, 39), (38, 39)]:
        part = cpu.forward(inputs._replace(hidden=inputs.hidden[start:stop]))
        assert torch.equal(part[1], mean[start:stop])
        assert torch.equal(part[2], std[start:stop])


def test_a_repeated_row_s_gradient_is_the_sum_of_its_own() -> None:
    inputs = make(rows=torch.tensor([4, 2, 4, 4]), seed=None)
    once = inputs._replace(rows=torch.tensor([4]))
    grads = (torch.tensor([1.0, 5.0, 2.0, 0.5]), None, None, None)
    got = backward(cpu, grads, inputs, ALL)[0]
    want = backward(cpu, (torch.tensor([3.5]), None, None, None), once, ALL)[0]
    torch.testing.assert_close(got[4], want[4])
    assert not got[[0, 1, 3, *range(5, 37)]].any()


def test_addresses_beyond_two_to_the_31_elements() -> None:
    d, last = 4096, 2**31 // 4096 + 8
    torch.use_deterministic_algorithms(False)  # which would write, and so claim, all 4 GiB
    hidden = torch.empty(last + 1, d, dtype=torch.bfloat16)
    small = make(torch.bfloat16, n=3, d=d)
    hidden[last - 2 :] = small.hidden
    assert (last - 2) * d > 2**31
    large = small._replace(hidden=hidden, rows=torch.arange(last - 2, last + 1))
    assert same(cpu.forward(small), cpu.forward(large))
    grads, needs = some_grads(small), (False, True, True, True)
    pairs = zip(backward(cpu, grads, small, needs)[1:], backward(cpu, grads, large, needs)[1:], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_out_of_range_indices_that_come_past_python_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"ensemble_reward: rows: 37 is out of range"):
        cpu.forward(make(rows=torch.tensor([0, 37])))
    labels = torch.zeros(37, dtype=torch.int64)
    labels[3] = 99
    with pytest.raises(RuntimeError, match=r"ensemble_reward: group: 99 is out of range"):
        cpu.forward(make(group=labels, aggregation="mean,centre=group"))
