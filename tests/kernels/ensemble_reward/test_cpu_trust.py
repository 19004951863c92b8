"""The trust region and the batch's worst head in C++, on every instruction set of this machine, against the fp64
reference. The rule for accuracy is that of test_cpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prudent.kernels import native
from prudent.kernels.ensemble_reward import cpu, reference
from prudent.kernels.ensemble_reward.contract import Inputs

from .cpu_cases import ALL, DTYPES, backward, check_backward, check_forward, double, make, region, same, some_grads

if not native.load():
    pytest.skip("the native CPU library is not built", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("isa", "poisoned_memory")

SPECS = [
    "trust:1", "trust:0.7,from=0.9,power=1", "lcb:1,trust=0.3,power=3", "min,trust=2,from=0.5,power=4", "batch_worst",
    "tradeoff:0.4,worst=batch", "tradeoff:0.4,worst=batch,nominal=mean,trust=1", "batch_worst,source=mean,trust=1",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no norm": {"norm_weight": None},
    "only measured": {"aggregation": "tradeoff:0.4"},
    "a diagonal": region(rank=0),
    "a diagonal, no norm": region(rank=0) | {"norm_weight": None},
    "directions alone": region(precision=torch.zeros(577)),
    "many directions": region(rank=33),
    "repeating rows": {"rows": torch.tensor([36, 0, 0, 7, 12, 0, 36, 1] * 5)},
    "strided rows": {"rows": torch.arange(37)[::3]},
    "weight in bf16, no norm": {"weight_dtype": torch.bfloat16, "norm_weight": None},
    "batch centring": {"aggregation": "lcb:1,centre=batch,trust=1"},
    "centring by size": {"aggregation": "trust:1,centre=group", "group_size": 5, "n": 35},
    "batch's worst head, rows": {"aggregation": "batch_worst,centre=batch", "rows": torch.tensor([3, 3, 9, 1])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_less_exact_than_plain_torch_with_every_option(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = make(dtype, **({"aggregation": "trust:1"} | region() | options))
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("seed", [None, torch.tensor([3])], ids=["means", "samples"])
@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_every_price_and_the_batch_s_worst_head_are_the_reference_s(spec: str, k: int, seed: Any) -> None:
    inputs = make(n=50, d=33, k=k, aggregation=spec, seed=seed, **region(33))
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("n", [0, 1, 3, 17, 200])
@pytest.mark.parametrize("d", [1, 7, 129])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_any_number_of_rows_and_features(dtype: torch.dtype, d: int, n: int) -> None:
    spec = "tradeoff:0.4,worst=batch,trust=1"
    inputs = make(dtype, n=n, d=d, norm_eps=0.5 if d == 1 else 1e-6, aggregation=spec, **region(d, 1))
    check_forward(inputs)
    check_backward(inputs)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_saved_holds_what_the_contract_says(dtype: torch.dtype, norm: bool) -> None:
    inputs = make(dtype, aggregation="batch_worst,trust=1", **region())
    inputs = inputs if norm else inputs._replace(norm_weight=None)
    saved, exact = cpu.forward(inputs, True)[-1], reference.forward(double(inputs), True)[-1]
    assert saved.shape == (37, 11 + 3 + 2 + 1)
    assert cpu.forward(inputs)[-1].shape == (0, 17)
    kept = [i for i in range(17) if norm or i != 15]  # without a norm nothing reads mean' P (f - mean)
    torch.testing.assert_close(saved[:, kept].double(), exact[:, kept], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_a_mean_a_thousand_times_the_spread_costs_only_the_rounding_of_the_features(norm: bool, rank: int) -> None:
    g = torch.Generator().manual_seed(3)
    mean = 1000 * torch.randn(577, generator=g).sign()
    hidden = mean + torch.randn(37, 577, generator=g)
    rms = hidden.square().mean().sqrt().reshape(1) if norm else torch.ones(1)
    fields = region(577, rank, mean=mean / rms, rms=rms)
    for name in ("trust_precision", "trust_weights"):
        fields[name] = fields[name] * rms**2
    inputs = make(hidden=hidden, norm_weight=torch.ones(577) if norm else None, aggregation="trust:1", **fields)
    ours, exact = cpu.forward(inputs)[4], reference.forward(double(inputs))[4]
    assert ours is not None
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6 + 4000 * 2.0**-24, atol=0)


def test_a_quadratic_form_below_zero_is_at_distance_zero_without_gradient() -> None:
    fields = region(33, 2, precision=torch.zeros(33), weights=torch.tensor([-1.0, -2.0]))
    inputs = make(n=9, d=33, aggregation="trust:1,power=1", **fields)
    out = cpu.forward(inputs, True)
    assert out[4] is not None
    assert not out[4].any()
    grads = some_grads(inputs)._replace(reward=None, mean=None, std=None, reward_sum=None)
    assert not any(g.any() for g in backward(cpu, grads, inputs, ALL))


@pytest.mark.parametrize("needed", range(4))
def test_what_is_not_needed_is_not_made_and_the_rest_has_the_same_bits(needed: int) -> None:
    inputs = make(torch.bfloat16, aggregation="trust:1", **region())
    grads = some_grads(inputs)
    needs = tuple(i == needed for i in range(4))
    alone, together = backward(cpu, grads, inputs, needs), backward(cpu, grads, inputs, ALL)
    assert [g is not None for g in alone] == list(needs)
    # with the norm's gradient, the weight's partials are of other chunks
    torch.testing.assert_close(alone[needed], together[needed], rtol=1e-5, atol=1e-5)


def test_a_strided_region_has_the_bits_of_a_contiguous_one() -> None:
    fields = region()
    inputs = make(aggregation="trust:1", **fields)
    strided = {name: torch.stack([v, v], dim=-1)[..., 0] for name, v in fields.items()}
    strided["trust_directions"] = fields["trust_directions"].T.contiguous().T
    turned = inputs._replace(**strided)  # type: ignore[misc]
    assert same(cpu.forward(inputs, True), cpu.forward(turned, True))
    assert same(backward(cpu, some_grads(inputs), inputs, ALL), backward(cpu, some_grads(inputs), turned, ALL))


@pytest.mark.parametrize("spec", ["trust:1,centre=batch", "batch_worst,trust=1"])
def test_same_bits_on_any_number_of_threads(spec: str) -> None:
    inputs = make(torch.bfloat16, n=2000, d=700, aggregation=spec, **region(700, 9))
    grads, before, found = some_grads(inputs), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([*cpu.forward(inputs), *backward(cpu, grads, inputs, ALL)])
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_s_distance_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    inputs = make(dtype, n=39, seed=None, aggregation="trust:1", **region())
    distance = cpu.forward(inputs)[4]
    assert distance is not None
    for start, stop in [(0, 1), (5, 7), (16, 39), (38, 39)]:
        part = cpu.forward(inputs._replace(hidden=inputs.hidden[start:stop]))[4]
        assert part is not None
        assert torch.equal(part, distance[start:stop])


def test_a_region_leaves_the_heads_bits_alone() -> None:
    inputs = make(torch.bfloat16, aggregation="tradeoff:0.4", **region(rank=9))
    bare = inputs._replace(**dict.fromkeys(Inputs._fields[14:]))
    assert same(cpu.forward(inputs)[:4], cpu.forward(bare)[:4])
    assert cpu.forward(bare)[4] is None


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_and_infinite_features_come_out_as_in_the_reference(dtype: torch.dtype, norm: bool) -> None:
    inputs = make(dtype, n=8, d=45, aggregation="batch_worst,trust=1", **region(45))
    inputs = inputs if norm else inputs._replace(norm_weight=None)
    for row, values in enumerate([(torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)]):
        for column, value in enumerate(values):
            inputs.hidden[row + 1, 20 * column + row] = value
    for a, b in zip(cpu.forward(inputs)[:5], reference.forward(inputs)[:5], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.isfinite(), b.isfinite())
    grads, needs = some_grads(inputs), (True, True, True, norm)
    for a, b in zip(backward(cpu, grads, inputs, needs), backward(reference, grads, inputs, needs), strict=True):
        assert (a is None) or torch.equal(a.isnan(), b.isnan())


def test_the_batch_s_worst_head_takes_a_nan_first_and_the_lowest_index_on_a_tie() -> None:
    hidden = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    options = dict.fromkeys(("bias", "shift", "scale", "std_ref", "norm_weight", "seed"))
    tied = make(n=2, d=2, k=2, hidden=hidden, weight=torch.cat([torch.eye(2), torch.zeros(2, 2)]),
                aggregation="batch_worst", **options)  # fmt: skip
    reward, *_, saved = cpu.forward(tied, True)
    assert reward.tolist() == [1.0, 3.0]
    assert saved[:, -1].tolist() == [0.0, 0.0]
    shift = torch.tensor([0.0, torch.nan])
    assert cpu.forward(tied._replace(shift=shift))[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ppca_of_a_few_dominant_features_loses_no_more_than_cancellation_must(dtype: torch.dtype) -> None:
    """|gap|^2 / sigma^2 less the directions' share cancels: a reason to multiply the directions in fp32, not bf16."""
    g, d, rank = torch.Generator().manual_seed(0), 256, 8
    scale, mean = torch.ones(d), torch.zeros(d)
    scale[[3, 100, 70]] = torch.tensor([30.0, 100.0, 10.0])
    mean[[3, 100]] = torch.tensor([60.0, -150.0])
    features = (mean + torch.randn(600, d, generator=g) * scale).double()
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    rest = values[:-rank].mean()
    weights = (1 / values[-rank:] - 1 / rest) / d
    fields = region(d, rank, mean=features.mean(dim=0).float(), precision=torch.full((d,), float(1 / rest / d)),
                    directions=vectors[:, -rank:].T.float(), weights=weights.float())  # fmt: skip
    inputs = make(dtype, n=600, d=d, hidden=features.to(dtype), norm_weight=None, aggregation="trust:1", **fields)
    ours, exact = cpu.forward(inputs)[4], reference.forward(double(inputs))[4]
    rounded = inputs._replace(trust_directions=inputs.trust_directions.bfloat16().float())  # type: ignore[union-attr]
    coarse = reference.forward(double(rounded))[4]
    assert ours is not None
    assert exact is not None
    assert coarse is not None
    assert (coarse / exact - 1).abs().max() > 0.02
    torch.testing.assert_close(ours.double(), exact, rtol=3e-4, atol=0)
