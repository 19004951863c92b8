"""The trust region of the op: the distance, its price and their gradients, compared with closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import prudent
from prudent import TrustRegion
from prudent.kernels.ensemble_reward import cpu, op, reference
from prudent.kernels.ensemble_reward.contract import Inputs, OutputGrads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, K, R = 9, 7, 3, 2
PRICES = ["trust:1", "trust:0.7,from=0.8,power=1", "lcb:1,trust=0.3,power=3", "min,trust=2,from=0.5,power=4",
          "tradeoff:0.4,trust=1,centre=batch", "tradeoff:0.4,worst=batch,trust=0.5", "batch_worst", "mean"]  # fmt: skip


def region(dim: int = D, rank: int = R, dtype: torch.dtype = torch.float64, **given: Tensor) -> TrustRegion:
    """A region whose precision is positive although one direction's weight is negative, as with PPCA."""
    g = torch.Generator().manual_seed(4)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    directions = torch.linalg.qr(rand(dim, max(rank, 1))).Q.T[:rank]
    values = {
        "mean": rand(dim), "precision": (0.2 + rand(dim).square()) / dim, "directions": directions,
        "weights": torch.tensor([1.5, -0.1 / dim] * rank, dtype=torch.float64)[:rank],
        "unit": torch.tensor([0.6], dtype=torch.float64), "rms": torch.tensor([1.3], dtype=torch.float64),
    }  # fmt: skip
    return TrustRegion(*(t.to(dtype).to(DEVICE) for t in (values | given).values()))


def arguments(dtype: torch.dtype = torch.float64, norm: bool = True, grad: bool = False) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)  # noqa: E731
    found = {"hidden": rand(N, D), "weight": rand(2 * K, D), "bias": rand(2 * K), "norm_weight": 1 + 0.3 * rand(D)}
    return {name: t.requires_grad_(grad) for name, t in found.items() if norm or name != "norm_weight"}


def as_inputs(
    spec: str, dtype: torch.dtype = torch.float32, grad: bool = True, norm: bool = True, rows: Tensor | None = None
) -> Inputs:
    given, seed = arguments(dtype, norm, grad), torch.tensor([5], device=DEVICE)
    return Inputs(given["hidden"], given["weight"], given["bias"], rows, given.get("norm_weight"), seed, None, None,
                  None, None, 0, 1e-6, 1e-3, spec, *region(dtype=dtype))  # fmt: skip


def exact_distance(features: Tensor, trust: TrustRegion) -> Tensor:
    """sqrt of the quadratic form with the D x D precision matrix."""
    precision = torch.diag(trust.precision) + trust.directions.T @ torch.diag(trust.weights) @ trust.directions
    gap = features - trust.mean
    return torch.einsum("nd,de,ne->n", gap, precision, gap).clamp(min=0).sqrt()


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_the_distance_is_the_closed_form(norm: bool, rank: int) -> None:
    given, trust = arguments(norm=norm), region(rank=rank)
    features = given["hidden"]
    if norm:
        features = torch.nn.functional.rms_norm(features, (D,), given["norm_weight"], 1e-6)
    got = prudent.ensemble_reward(**given, trust=trust)
    torch.testing.assert_close(got.distance, exact_distance(features, trust), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0.0, 0.8])
def test_the_reward_loses_the_price_of_the_distance_and_nothing_else(start: float, power: int) -> None:
    given, trust = arguments(), region()
    free = prudent.ensemble_reward(**given, trust=trust, aggregation="lcb:1")
    priced = prudent.ensemble_reward(**given, trust=trust, aggregation=f"lcb:1,trust=0.7,from={start},power={power}")
    assert free.distance is not None
    assert (free.distance < 0.8).any()
    assert (free.distance > 0.8).any()
    price = 0.7 * 0.6 * (free.distance - start).clamp(min=0) ** power
    torch.testing.assert_close(priced.reward, free.reward - price, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(priced.reward_sum, priced.reward.sum())
    assert torch.equal(priced.mean, free.mean)
    assert torch.equal(free.reward, prudent.ensemble_reward(**given, aggregation="lcb:1").reward)


def test_antithetic_heads_under_uwo_are_the_quadratic_price() -> None:
    """K = 2R heads w +- sqrt(R) u_k under uwo equal the mean head less lam * sum_k (u_k . (x - mu))^2."""
    rank, lam = 4, 0.3
    g = torch.Generator().manual_seed(0)
    x, w, u, mu = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((50, D), (D,), (rank, D), (D,)))
    x, w, u, mu = (t.to(DEVICE) for t in (x, w, u, mu))
    means = torch.cat([w + rank**0.5 * u, w - rank**0.5 * u])
    shift = means @ mu - w @ mu  # so that the heads agree at mu
    heads = torch.cat([means, torch.zeros_like(means)])
    uwo = prudent.ensemble_reward(x, heads, shift=shift, aggregation=f"uwo:{lam},source=mean").reward
    none = torch.zeros(D, dtype=torch.float64, device=DEVICE)
    ones = torch.ones(rank, dtype=torch.float64, device=DEVICE)
    trust = TrustRegion(mu, none, u, ones, ones[:1], ones[:1])
    single = torch.stack([w, torch.zeros_like(w)])
    priced = prudent.ensemble_reward(x, single, aggregation=f"trust:{lam}", trust=trust).reward
    torch.testing.assert_close(priced, uwo, rtol=1e-12, atol=1e-12)


def test_a_quadratic_form_below_zero_is_at_distance_zero_without_gradient() -> None:
    trust = region(precision=torch.zeros(D, dtype=torch.float64), weights=torch.tensor([-1.0, -2.0]).double())
    given = arguments(grad=True)
    out = prudent.ensemble_reward(**given, trust=trust, aggregation="trust:1,power=1")
    assert out.distance is not None
    assert not out.distance.any()
    assert not torch.autograd.grad(out.distance.sum(), given["hidden"])[0].any()


def test_at_the_mean_and_at_the_edge_of_a_hinge_the_gradient_is_zero() -> None:
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    trust = TrustRegion(one, one, one.new_zeros(0, 1), one.new_zeros(0), one, one)
    hidden = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    for spec, slope in (("trust:1,from=1,power=1", [0, 0, -1]), ("trust:1", [0, -2, -6]),
                        ("trust:1,power=1", [0, -1, -1])):  # fmt: skip
        reward = prudent.ensemble_reward(hidden, weight, trust=trust, aggregation=spec).reward
        assert torch.autograd.grad(reward.sum(), hidden)[0][:, 0].tolist() == slope


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_a_mean_far_larger_than_the_spread_costs_fp32_nothing_but_the_rounding_of_its_features(
    norm: bool, scale: float
) -> None:
    dim, rank = 300, 4
    g = torch.Generator().manual_seed(3)
    mean = scale * torch.randn(dim, generator=g).sign()
    hidden = (mean + torch.randn(64, dim, generator=g)).to(DEVICE)
    gain = torch.ones(dim, device=DEVICE) if norm else None
    rms = torch.tensor([hidden.square().mean().sqrt() if norm else 1.0])
    trust = region(dim, rank, torch.float32, mean=mean / rms, rms=rms)
    if norm:
        trust = trust._replace(precision=trust.precision * rms**2, weights=trust.weights * rms**2)
    weight = torch.zeros(2, dim, device=DEVICE)
    got = prudent.ensemble_reward(hidden, weight, norm_weight=gain, trust=trust).distance
    wide = TrustRegion(*(t.double() for t in trust))
    want = prudent.ensemble_reward(
        hidden.double(), weight.double(), norm_weight=None if gain is None else gain.double(), trust=wide
    ).distance
    # a feature of size `scale` is known to 2^-24 of it, beside a spread of 1
    torch.testing.assert_close(got.double(), want, rtol=2e-6 + 4 * scale * 2.0**-24, atol=0)  # type: ignore[union-attr]


def test_rms_changes_nothing_but_rounding() -> None:
    given, trust = arguments(), region()
    other = prudent.ensemble_reward(**given, trust=trust._replace(rms=trust.rms * 3)).distance
    torch.testing.assert_close(other, prudent.ensemble_reward(**given, trust=trust).distance)


@pytest.mark.parametrize("spec", PRICES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_the_explicit_backward_is_the_gradient_of_the_forward(norm: bool, spec: str) -> None:
    inputs = as_inputs(spec, torch.float64, norm=norm, rows=torch.tensor([0, 3, 3, 7, 1, 2, 8], device=DEVICE))
    outputs = reference.forward(inputs)[:5]
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, dtype=o.dtype, generator=g).to(DEVICE) for o in outputs if o is not None]
    leaves = [t for t in (inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight) if t is not None]
    want = torch.autograd.grad([o for o in outputs if o is not None], leaves, grads)
    with torch.no_grad():
        got = reference.backward(OutputGrads(*grads), inputs, reference.forward(inputs, True)[-1], (True,) * 4)  # type: ignore[arg-type]
    for gradient, exact in zip((x for x in got if x is not None), want, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", PRICES)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_gradcheck_of_the_public_op(norm: bool, spec: str) -> None:
    given, trust = arguments(norm=norm, grad=True), region()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = prudent.ensemble_reward(**dict(zip(given, tensors, strict=True)), trust=trust, aggregation=spec)
        return tuple(t for t in out if t is not None)

    assert torch.autograd.gradcheck(run, tuple(given.values()))


@pytest.mark.parametrize("spec", ["trust:1", "tradeoff:0.4,worst=batch,trust=1,power=1", "batch_worst"])
def test_the_registered_op_and_its_backward_pass_opcheck(spec: str) -> None:
    opcheck(torch.ops.prudent.ensemble_reward.default, (*as_inputs(spec), True))
    inputs = as_inputs(spec, grad=False)
    saved = op._forward(*inputs, True)[-1]
    grads = (torch.ones(N, device=DEVICE), None, None, None, torch.ones(N, device=DEVICE))
    opcheck(torch.ops.prudent.ensemble_reward_backward.default, (*grads, *inputs, saved, True, True, False, True))


@pytest.mark.parametrize("spec", ["trust:1", "batch_worst,trust=1,from=0.5,power=1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_eager_and_registered_roads_give_the_same_bits(dtype: torch.dtype, spec: str) -> None:
    given = arguments(dtype, grad=True)
    given["bias"] = given["bias"].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    small = torch.float64 if dtype == torch.float64 else torch.float32
    trust = region(dtype=small)
    eager = prudent.ensemble_reward(**given, trust=trust, aggregation=spec)
    inputs = Inputs(given["hidden"], given["weight"], given["bias"], None, given["norm_weight"], None, None, None, None,
                    None, 0, 1e-6, 1e-3, spec, *trust)  # fmt: skip
    registered = torch.ops.prudent.ensemble_reward(*inputs, True)[:5]
    leaves = list(given.values())
    found = [torch.autograd.grad(sum(o.square().sum() for o in out), leaves) for out in (eager, registered)]
    for a, b in zip((*eager, *found[0]), (*registered, *found[1]), strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_compiled_whole_and_exported_with_dynamic_rows() -> None:
    given, trust = arguments(torch.float32), region(dtype=torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = prudent.ensemble_reward(hidden, weight, trust=trust, aggregation="lcb:1,trust=1,centre=batch")
        assert out.distance is not None
        return (out.reward.square() + out.distance).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (5, 9, 1, 3):
        hidden = given["hidden"][:n].detach().requires_grad_()
        got, want = compiled(hidden, given["weight"]), loss(hidden, given["weight"])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(want, hidden))

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(given["weight"])
            for name, value in trust._asdict().items():
                self.register_buffer(name, value)

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            own = TrustRegion(*(getattr(self, name) for name in TrustRegion._fields))
            out = prudent.ensemble_reward(hidden, self.weight, trust=own, aggregation="trust:1")
            return out.reward, out.distance

    model = Scores()
    program = torch.export.export(model, (given["hidden"],), dynamic_shapes=({0: torch.export.Dim("n")},))
    wider = torch.randn(13, D, device=DEVICE)
    for a, b in zip(program.module()(wider), model(wider), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row(n: int) -> None:
    given = arguments(grad=True)
    given["hidden"] = given["hidden"][:n].detach().requires_grad_()
    out = prudent.ensemble_reward(**given, trust=region(), aggregation="batch_worst,trust=1")
    assert out.distance is not None
    assert out.distance.shape == (n,)
    (out.reward.sum() + out.distance.sum()).backward()
    assert given["norm_weight"].grad.isfinite().all()


def test_without_a_region_there_is_no_distance() -> None:
    assert prudent.ensemble_reward(**arguments()).distance is None


def test_the_regions_tensors_get_no_gradient() -> None:
    trust = TrustRegion(*(t.requires_grad_() for t in region()))
    given = arguments(grad=True)
    prudent.ensemble_reward(**given, trust=trust, aggregation="trust:1").reward.sum().backward()
    assert given["hidden"].grad is not None
    assert all(t.grad is None for t in trust)


def test_nan_and_infinite_features_give_a_distance_that_is_not_finite() -> None:
    given = arguments(norm=False)
    given["hidden"][1, 2], given["hidden"][3, 4] = torch.nan, torch.inf
    distance = prudent.ensemble_reward(**given, trust=region()).distance
    assert distance is not None
    assert distance.isfinite().tolist() == [n not in (1, 3) for n in range(N)]


# --- the worst head of the batch -------------------------------------------------------------------------------------


def test_batch_worst_is_the_head_of_the_least_mean_over_the_batch_for_every_row() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], device=DEVICE)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.4], [0.0, 0.0], [0.0, 0.0]], device=DEVICE)  # means of .33 and .27
    per_row = prudent.ensemble_reward(hidden, weight, aggregation="min").reward
    batch = prudent.ensemble_reward(hidden, weight, aggregation="batch_worst").reward
    assert per_row.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(batch, torch.tensor([0.0, 0.4, 0.4], device=DEVICE))
    mixed = prudent.ensemble_reward(hidden, weight, aggregation="tradeoff:0.25,worst=batch,nominal=head:0").reward
    torch.testing.assert_close(mixed, 0.25 * hidden[:, 0] + 0.75 * batch)


def test_the_lowest_of_tied_heads_is_the_worst_of_the_batch_and_takes_the_gradient() -> None:
    hidden = torch.tensor([[1.0, 3.0], [3.0, 1.0]], device=DEVICE)
    weight = torch.cat([torch.eye(2), torch.zeros(2, 2)]).to(DEVICE).requires_grad_()
    out = prudent.ensemble_reward(hidden, weight, aggregation="batch_worst")
    assert out.reward.tolist() == [1.0, 3.0]
    out.reward.sum().backward()
    assert weight.grad[0].tolist() == [4.0, 4.0]  # type: ignore[index]
    assert not weight.grad[1:].any()  # type: ignore[index]


def test_the_worst_of_the_batch_is_taken_over_samples_where_there_is_a_seed() -> None:
    given = arguments()
    out = prudent.ensemble_reward(**given, seed=torch.tensor([9], device=DEVICE), aggregation="batch_worst")
    samples = out.mean + out.std * reference.philox_normal(torch.tensor([9], device=DEVICE), N, K, torch.float64)
    torch.testing.assert_close(out.reward, samples[:, samples.mean(dim=0).argmin()])


# --- refusals --------------------------------------------------------------------------------------------------------


BROKEN: list[tuple[dict[str, Tensor], str]] = [
    ({"mean": torch.zeros(D + 1)}, r"trust.mean: expected shape \[7\], got \[8\]"),
    ({"precision": torch.ones(1, D)}, r"trust.precision: expected shape \[7\]"),
    ({"precision": -torch.ones(D)}, r"trust.precision: expected finite numbers >= 0, got \[-1.0, -1.0, -1.0\]"),
    ({"precision": torch.full((D,), torch.nan)}, "trust.precision: expected finite numbers >= 0, got"),
    ({"precision": torch.full((D,), torch.inf)}, "trust.precision: expected finite numbers >= 0, got"),
    ({"directions": torch.zeros(R, D + 1)}, r"trust.directions: expected shape \[R, 7\], got \[2, 8\]"),
    ({"directions": torch.zeros(D)}, r"trust.directions: expected shape \[R, 7\]"),
    ({"directions": torch.zeros(R, D).bfloat16()}, "trust.directions: expected dtype float32, got torch.bfloat16"),
    ({"directions": torch.zeros(R, D).double()}, "trust.directions: expected float64 only with float64 hidden"),
    ({"weights": torch.zeros(R + 1)}, r"trust.weights: expected shape \[2\], got \[3\]"),
    ({"unit": torch.tensor([0.0])}, "trust.unit: expected a finite number above 0, got 0"),
    ({"unit": torch.tensor([torch.inf])}, "trust.unit: expected a finite number above 0, got inf"),
    ({"unit": torch.tensor(1.0)}, r"trust.unit: expected shape \[1\], got \[\]"),
    ({"rms": torch.tensor([torch.nan])}, "trust.rms: expected a finite number above 0, got nan"),
    ({"rms": torch.ones(1, dtype=torch.int64)}, "trust.rms: expected dtype float32"),
    ({"mean": torch.zeros(D, dtype=torch.float64)}, "trust.mean: expected float64 only with float64 hidden"),
    ({"weights": torch.zeros(R, device="meta")}, r"trust.weights: expected device cpu \(hidden's\), got meta"),
    ({"mean": [0.0] * D}, "trust.mean: expected a tensor, got list"),  # type: ignore[dict-item]
    ({"unit": None}, "trust.unit: expected a tensor, got NoneType"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize(("changes", "says"), BROKEN, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BROKEN)])
def test_a_broken_region_is_refused_by_the_name_of_its_field(
    changes: dict[str, Tensor], says: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(cpu, "available", lambda: False)
    trust = TrustRegion(*(t.cpu() for t in region(dtype=torch.float32)))._replace(**changes)
    with pytest.raises(ValueError, match=f"ensemble_reward: {says}"):
        prudent.ensemble_reward(torch.zeros(N, D), torch.zeros(2, D), trust=trust)


@pytest.mark.parametrize("spec", ["trust:1", "trust:0", "tradeoff:0.4,trust=1"])
def test_a_price_without_a_region_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=f"trust: expected a TrustRegion with the price in aggregation '{spec}'"):
        prudent.ensemble_reward(torch.zeros(N, D), torch.zeros(2, D), aggregation=spec)


def test_what_is_not_a_region_is_refused() -> None:
    with pytest.raises(ValueError, match="trust: expected a TrustRegion or None, got float"):
        prudent.ensemble_reward(torch.zeros(N, D), torch.zeros(2, D), trust=1.0)  # type: ignore[arg-type]


def test_aggregate_refuses_a_price_without_distances() -> None:
    heads, spec = torch.ones(2, 3), prudent.Aggregation.parse("lcb:1,trust=1")
    with pytest.raises(
        ValueError, match=r"aggregate: distance: expected the distances \[N\] and unit for 'lcb:1,trust=1'"
    ):
        reference.aggregate(heads, heads, heads, spec)
    got = reference.aggregate(heads, heads, heads, spec, distance=torch.tensor([0.0, 2.0]), unit=torch.tensor([0.5]))
    assert got.tolist() == [1.0, -1.0]
