"""Cases for the Triton execution of `ensemble_reward`: what it computes; test_triton.py runs them in a child process.

By hand: `TRITON_INTERPRET=1 pytest tests/kernels/ensemble_reward/triton_cases.py` (no GPU), or without the variable on
a GPU. Every test runs with uninitialised memory full of NaN, so an output or scratch value that is not written shows.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prudent.kernels import arrivals
from prudent.kernels.ensemble_reward import configs, ensemble_reward, op, philox_normal, reference
from prudent.kernels.ensemble_reward import triton as execution
from prudent.kernels.ensemble_reward.contract import Inputs, OutputGrads
from prudent.kernels.ensemble_reward.triton_math import softplus, uniform

DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
pytestmark = pytest.mark.usefixtures("poisoned_empty")

SPECS = [
    "tradeoff:0.4", "tradeoff:0", "tradeoff:1", "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5",
    "softmin:0.3", "cvar:0.5", "head:2", "lcb:1,source=mean", "tradeoff:0.4,nominal=relative_std",
    "tradeoff:0.4,nominal=mean", "nominal,nominal=head:3",
]  # fmt: skip
ALL = (True, True, True, True)


def backward(execution: Any, grads: Any, inputs: Inputs, needs: Any) -> Any:
    """The execution's gradients, from its own forward's saved tensor."""
    return execution.backward(OutputGrads(*grads), inputs, execution.forward(inputs, True)[-1], needs)


@pytest.fixture(autouse=True)
def _route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Route CPU tensors of the public op to Triton too, under the interpreter."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(op, "_backend", lambda inputs: execution)


def make(n: int = 21, d: int = 33, k: int = 5, dtype: torch.dtype = torch.float64, **given: Any) -> Inputs:
    """N rows of D features and K heads with every optional part but groups, rows drawn with repeats from 2N / 3."""
    g = torch.Generator().manual_seed(0)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    stored = max(1, 2 * n // 3)
    values: dict[str, Any] = {
        "hidden": normal(stored, d).to(dtype),
        "weight": (normal(2 * k, d) / d**0.5).to(small),
        "bias": normal(2 * k).to(small),
        "rows": torch.randint(0, stored, (n,), generator=g),
        "norm_weight": (1 + 0.3 * normal(d)).to(dtype),
        "seed": torch.tensor([7_000_000_019]),
        "shift": normal(k).to(small),
        "scale": (normal(k).exp()).to(small),
        "std_ref": (0.5 * normal(k).exp()).to(small),
        "group": None,
        "group_size": 0,
        "norm_eps": 1e-6,
        "std_floor": 1e-3,
        "aggregation": "tradeoff:0.4",
    }
    values.update(given)
    return Inputs(**{name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in values.items()})


def some_grads(inputs: Inputs) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    n, k = inputs.num_rows, inputs.num_heads
    shapes: tuple[tuple[int, ...], ...] = ((n,), (n, k), (n, k), ())
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(inputs.output_dtype).to(DEVICE) for s in shapes)


def close(ours: Any, theirs: Any, tolerance: float) -> None:
    for name, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def agrees_in_fp64(inputs: Inputs) -> None:
    close(execution.forward(inputs), reference.forward(inputs), 1e-11)
    grads = some_grads(inputs)
    needs = (True, True, inputs.bias is not None, inputs.norm_weight is not None)
    close(backward(execution, grads, inputs, needs), backward(reference, grads, inputs, needs), 1e-11)


@pytest.mark.parametrize("spec", SPECS)
def test_every_aggregation_forward_and_backward_is_the_reference_in_fp64(spec: str) -> None:
    agrees_in_fp64(make(aggregation=spec))


@pytest.mark.parametrize(("k", "d", "spec"), [
    (1, 1, "tradeoff:0.4"), (1, 7, "median"), (2, 7, "median"), (8, 129, "cvar:0.3"), (33, 7, "median"),
    (33, 129, "tradeoff:0.4"), (64, 33, "lcb:1"),
])  # fmt: skip
def test_any_number_of_heads_and_any_width(k: int, d: int, spec: str) -> None:
    agrees_in_fp64(make(n=9, d=d, k=k, aggregation=spec))


def test_more_heads_than_a_program_holds_are_served_by_the_reference() -> None:
    inputs = make(n=3, d=4, k=configs.MAX_HEADS + 1)
    close(execution.forward(inputs), reference.forward(inputs), 1e-12)


@pytest.mark.parametrize("left_out", ["bias", "rows", "norm_weight", "seed", "shift", "scale"])
def test_each_optional_input_may_be_absent(left_out: str) -> None:
    agrees_in_fp64(make(**{left_out: None}))


def test_one_row() -> None:
    agrees_in_fp64(make(n=1, rows=None))


def test_no_rows_give_empty_outputs_and_zero_gradients() -> None:
    inputs = make(hidden=torch.zeros(4, 6), d=6, rows=torch.zeros(0, dtype=torch.int64), dtype=torch.float32)
    reward, mean, std, reward_sum, _, _ = execution.forward(inputs)
    assert (reward.shape, mean.shape, std.shape) == ((0,), (0, 5), (0, 5))
    assert reward_sum.item() == 0
    gradients = backward(execution, some_grads(inputs), inputs, ALL)
    for gradient, like in zip(gradients, inputs[:3] + inputs[4:5], strict=True):
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(like))


def plain_torch(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The usual composition, all in the precision of the hidden states: norm, linear, softplus."""
    dtype, k = inputs.hidden.dtype, inputs.num_heads
    assert inputs.rows is not None
    assert inputs.bias is not None
    x = inputs.hidden[inputs.rows]
    if inputs.norm_weight is not None:
        x = F.rms_norm(x, x.shape[1:], inputs.norm_weight.to(dtype), inputs.norm_eps)
    z = F.linear(x, inputs.weight.to(dtype), inputs.bias.to(dtype))
    return z[:, :k], F.softplus(z[:, k:]) + inputs.std_floor


def in_fp64(inputs: Inputs) -> Inputs:
    return Inputs(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_error_is_at_most_that_of_the_same_computation_in_plain_torch(dtype: torch.dtype, norm: bool) -> None:
    inputs = make(n=40, d=129, dtype=dtype, shift=None, scale=None)
    inputs = inputs if norm else inputs._replace(norm_weight=None)
    names = ["hidden", "weight", "bias"] + ["norm_weight"] * norm
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
    outputs = plain_torch(inputs._replace(**leaves))
    _, d_mean, d_std, _ = some_grads(inputs)
    torch.autograd.backward(outputs, [d_mean.to(dtype), d_std.to(dtype)])
    theirs = [*outputs, *(leaf.grad for leaf in leaves.values())]

    grads, needs = (None, d_mean, d_std, None), (True, True, True, norm)
    found = backward(execution, grads, inputs, needs)
    ours = [*execution.forward(inputs)[1:3], *(g for g in found if g is not None)]
    exact = in_fp64(inputs)
    right = backward(reference, (None, d_mean.double(), d_std.double(), None), exact, needs)
    truths = [*reference.forward(exact)[1:3], *(g for g in right if g is not None)]
    for mine, other, truth in zip(ours, theirs, truths, strict=True):
        assert other is not None
        my_error, their_error = ((v.double() - truth).abs().max().item() for v in (mine, other))
        assert my_error <= their_error + 2e-6 * truth.abs().max().item()


def test_two_bf16_halves_of_the_weight_give_fp32_grade_scores_from_bf16_features() -> None:
    inputs = make(n=40, d=256, dtype=torch.bfloat16)
    truth = reference.forward(in_fp64(inputs))[1]
    halves = (execution.forward(inputs)[1].double() - truth).square().mean().sqrt()
    # one bf16 half, as a bf16 head would have it
    folded = (inputs.weight * inputs.norm_weight.float()).bfloat16().float()  # type: ignore[union-attr]
    one = reference.forward(inputs._replace(weight=folded / inputs.norm_weight.float()))[1].double()  # type: ignore[union-attr]
    assert halves < 2e-5
    assert halves < 0.02 * (one - truth).square().mean().sqrt()


@triton.jit
def philox_kernel(seed, counters, words, uniforms, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed), tl.load(counters + lane), 7)
    tl.store(words + lane, w0.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(words + BLOCK + lane, w1.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(words + 2 * BLOCK + lane, w2.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(words + 3 * BLOCK + lane, w3.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(uniforms + lane, uniform(w0, tl.float32))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 12345, -1])
def test_the_noise_has_the_references_bits(seed: int) -> None:
    key = torch.tensor([seed], device=DEVICE)
    ends = [0, 2**31 - 8, 2**32 - 8, 2**40 + 3]
    counters = torch.cat([torch.arange(start, start + 16) for start in ends]).to(DEVICE)
    words, uniforms = torch.zeros(4, 64, dtype=torch.int64, device=DEVICE), torch.zeros(64, device=DEVICE)
    philox_kernel[(1,)](key, counters, words, uniforms, BLOCK=64)
    expected = reference.philox_4x32(key, counters)
    assert torch.equal(words, torch.stack(expected))
    assert torch.equal(uniforms, (expected[0] >> 9).float() * 2.0**-23 + 2.0**-24)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_the_samples_are_the_references_normals(dtype: torch.dtype, tolerance: float) -> None:
    """mean 0 and std 1 in every head: the reward of `head:i` is head i's noise."""
    k = 3
    inverse = torch.full((k,), 1.0, dtype=torch.float64).expm1().log()  # softplus(inverse) = 1
    bias = torch.cat([torch.zeros(k, dtype=torch.float64), inverse]).to(dtype)
    plain = dict.fromkeys(("norm_weight", "shift", "scale", "rows"))
    inputs = make(n=50, d=2, k=k, dtype=dtype, weight=torch.zeros(2 * k, 2, dtype=dtype), bias=bias,
                  hidden=torch.zeros(50, 2, dtype=dtype), std_floor=0.0, aggregation="head:1", **plain)  # fmt: skip
    assert inputs.seed is not None
    expected = philox_normal(inputs.seed, 50, k, dtype)[:, 1]
    torch.testing.assert_close(execution.forward(inputs)[0], expected, rtol=tolerance, atol=tolerance)


@triton.jit
def softplus_kernel(x, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, BLOCK)
    tl.store(out + lane, softplus(tl.load(x + lane)))


def test_softplus_is_accurate_over_its_whole_range_and_has_torchs_threshold() -> None:
    """Its e^x is 2^(x log2 e) on a GPU: log2 e in fp32 and the product with it are off by 0.23 and 1 times 2^-24 of the
    exponent, so e^x by 1.23 |x| 2^-24. The rest is at most 16 * 2^-24: 2 ulp each of 2^x and of a division, 1 ulp of
    the logarithm, the roundings of log1p. Below the least normal number a GPU may return 0.
    """
    x = torch.linspace(-100, 30, 1024, device=DEVICE)
    x[:6] = torch.tensor([19.9999, 20.0, 20.0001, float("inf"), float("-inf"), float("nan")])
    out = torch.zeros_like(x)
    softplus_kernel[(1,)](x, out, BLOCK=1024)
    expected, tiny = F.softplus(x.double()), torch.finfo(torch.float32).tiny
    normal = (expected > 1.001 * tiny) & expected.isfinite()
    allowed = (16 + 1.23 * x.abs()) * 2**-24 * expected
    assert ((out - expected).abs() <= allowed)[normal].all()
    torch.testing.assert_close(out[~normal], expected[~normal].float(), rtol=0, atol=1.001 * tiny, equal_nan=True)
    assert torch.equal(out[x > 20.0], x[x > 20.0])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's e^x")
def test_the_interpreters_exponential_is_as_inexact_as_a_gpus() -> None:
    """So that the cases prove their tolerances on every machine: at x near -83, 2^(x log2 e) is off by 3e-6."""
    x = torch.linspace(-84, -82, 1024)
    out = torch.zeros_like(x)
    softplus_kernel[(1,)](x, out, BLOCK=1024)
    assert 2e-6 < (out / torch.exp(x.double()) - 1).abs().max() < 1e-5


def test_a_nan_wins_and_a_tie_goes_to_the_lowest_head() -> None:
    inputs = make(n=6, k=4, rows=None, bias=None, scale=None, weight=torch.zeros(8, 33), dtype=torch.float32,
                  shift=torch.tensor([-3.0, -1.0, -1.0, -2.0]), hidden=torch.ones(6, 33), seed=None,
                  std_floor=0.1)  # fmt: skip
    nan = inputs._replace(shift=torch.tensor([-3.0, -1.0, float("nan"), -2.0], device=DEVICE))
    right = {"nominal": 3.0, "min": 1.0, "max": 3.0, "median": 1.5, "tradeoff:0.5": 2.0, "cvar:0.5": 1.0}
    for spec, reward in right.items():
        assert execution.forward(inputs._replace(aggregation=spec))[0].tolist() == [reward] * 6, spec
        if spec != "nominal":  # whose mean is head 0's
            assert execution.forward(nan._replace(aggregation=spec))[0].isnan().all(), spec
    grads = (torch.ones(6, device=DEVICE), None, None, None)
    for spec in ("median", "cvar:0.75"):  # a NaN sorts last
        given = nan._replace(bias=torch.zeros(8, device=DEVICE), aggregation=spec)
        needs = (False, False, True, False)
        close(backward(execution, grads, given, needs), backward(reference, grads, given, needs), 1e-6)
    bias = inputs._replace(bias=torch.zeros(8, device=DEVICE), aggregation="min")
    found = backward(execution, grads, bias, (False, False, True, False))[2]
    assert found is not None
    assert found.tolist() == [0.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_an_infinite_head_that_has_no_weight_takes_no_part() -> None:
    shift = torch.tensor([-3.0, -1.0, -float("inf"), -1.0])
    inputs = make(n=6, k=4, rows=None, bias=None, scale=None, weight=torch.zeros(8, 33), dtype=torch.float32,
                  shift=shift, hidden=torch.ones(6, 33), seed=None)  # fmt: skip
    right = {"min": 1.0, "head:0": 3.0, "median": 2.0, "cvar:0.5": 1.0, "max": float("inf"), "mean": float("inf")}
    for spec, reward in right.items():
        assert execution.forward(inputs._replace(aggregation=spec))[0].tolist() == [reward] * 6, spec


GROUPS = torch.tensor([3, 0, 3, 8, 0, 3, 11, 3, 0, 8, 3, 3])


@pytest.mark.parametrize("given", [
    {"aggregation": "tradeoff:0.4,centre=batch"},
    {"aggregation": "median,centre=group", "group_size": 4},
    {"aggregation": "lcb:1,centre=group", "group_size": 12},
    {"aggregation": "mean,centre=group", "group": GROUPS},
])  # fmt: skip
def test_centring_and_the_sum_before_it(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SWEEP", 2)  # so that every sweep takes several steps
    agrees_in_fp64(make(n=12, **given))


def test_many_programs_total_and_centre_together() -> None:
    agrees_in_fp64(make(n=70, d=3, k=2, aggregation="tradeoff:0.4,centre=batch"))


def test_the_weights_gradient_adds_up_over_many_shares_of_the_rows() -> None:
    agrees_in_fp64(make(n=300, d=3, k=1, aggregation="mean"))


@pytest.mark.parametrize("kind", ["wide rows", "one row everywhere", "every second row", "offset"])
def test_rows_may_lie_at_any_stride(kind: str) -> None:
    base = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    hidden = {
        "wide rows": base[:, :33],
        "one row everywhere": base[:1, :33].expand(24, 33),
        "every second row": base[::2, 7:],
        "offset": base[5:, 3:36],
    }[kind]
    for rows in (None, torch.tensor([1, 5, 1, 0], device=DEVICE)):
        agrees_in_fp64(make(d=33)._replace(hidden=hidden, rows=rows))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_every_combination_of_needs_gives_those_gradients_and_no_others(needs: tuple[bool, bool, bool, bool]) -> None:
    inputs = make(n=5, d=9, k=2)
    grads = some_grads(inputs)
    close(backward(execution, grads, inputs, needs), backward(reference, grads, inputs, needs), 1e-12)


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_gradients_may_be_absent(present: tuple[int, ...]) -> None:
    inputs = make(n=5, d=9, k=2, aggregation="lcb:1,centre=batch")
    grads = tuple(g if i in present else None for i, g in enumerate(some_grads(inputs)))
    close(backward(execution, grads, inputs, ALL), backward(reference, grads, inputs, ALL), 1e-12)  # type: ignore[arg-type]


def test_gradients_may_be_expanded_from_one_number() -> None:
    """`sum().backward()` gives such gradients; a kernel that treats them as contiguous reads out of bounds."""
    inputs = make(n=20, d=9, k=3, aggregation="mean,centre=group", group_size=5)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    grads = (one.expand(20), one.expand(20, 3), (2 * one).expand(20, 3), one)
    close(backward(execution, grads, inputs, ALL), backward(reference, grads, inputs, ALL), 1e-12)


@pytest.mark.parametrize("spec", ["tradeoff:0.4", "softmin:0.3,centre=batch", "uwo:0.5", "cvar:0.5"])
def test_gradcheck_of_the_public_op_through_triton(spec: str) -> None:
    inputs = make(n=4, d=3, k=3, aggregation=spec)
    leaves = [inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor) -> tuple[Tensor, ...]:
        return ensemble_reward(hidden, weight, bias, rows=inputs.rows, norm_weight=norm_weight, seed=inputs.seed,
                               shift=inputs.shift, scale=inputs.scale, aggregation=spec)[:4]  # fmt: skip

    leaves = [leaf.clone().requires_grad_() for leaf in leaves if leaf is not None]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("gathered", [True, False])
def test_addresses_beyond_two_to_the_31_elements(gathered: bool) -> None:
    d, rows = 64, 2**25 + 40
    base = torch.empty(rows, d, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB, of which three rows' pages are touched
    places = torch.tensor([rows - 1, rows - 3, 0] if gathered else [0, 2**24 + 8, 2**25 + 16], device=DEVICE)
    small = make(n=3, d=d, dtype=torch.bfloat16)._replace(rows=None)
    base[places] = torch.cat([small.hidden, -small.hidden[:1]])
    large = small._replace(hidden=base, rows=places)
    if not gathered:  # the same rows as a view of three, 2^30 and some elements apart
        large = small._replace(hidden=base.as_strided((3, d), ((2**24 + 8) * d, 1)))
    small = small._replace(hidden=base[places])
    close(execution.forward(large), execution.forward(small), 0.0)
    grads, needs = some_grads(large), (False, True, True, True)
    close(backward(execution, grads, large, needs), backward(execution, grads, small, needs), 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_the_very_first_call_may_be_inside_torch_compiles_own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up allocates from the graph's pool, and refuses memory there that outlives the call."""
    monkeypatch.setattr(arrivals, "_free", {})
    monkeypatch.setattr(arrivals, "_of_stream", {})
    inputs = make(n=30, dtype=torch.float32)
    run = torch.compile(lambda h, w: ensemble_reward(h, w, centre="batch").reward, mode="reduce-overhead")
    replayed = [run(inputs.hidden, inputs.weight).clone() for _ in range(4)]
    expected = ensemble_reward(inputs.hidden, inputs.weight, centre="batch").reward
    for reward in replayed:
        torch.testing.assert_close(reward, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_the_public_op_compiles_whole_on_a_gpu() -> None:
    inputs = make(n=30, dtype=torch.float32)
    run = torch.compile(lambda h, w: ensemble_reward(h, w, seed=inputs.seed).reward, fullgraph=True)
    expected = ensemble_reward(inputs.hidden, inputs.weight, seed=inputs.seed).reward
    torch.testing.assert_close(run(inputs.hidden, inputs.weight), expected, rtol=0, atol=0)
