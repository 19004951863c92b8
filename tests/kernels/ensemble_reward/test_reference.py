"""The oracle itself, compared with closed forms, published test vectors and a plain loop."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from prudent.kernels.ensemble_reward import reference
from prudent.kernels.ensemble_reward.contract import Grads, Inputs, OutputGrads
from prudent.kernels.ensemble_reward.spec import Aggregation

SPECS = [
    "tradeoff:0.4", "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5", "softmin:0.3", "cvar:0.4", "head:1",
    "tradeoff:0.3,nominal=relative_std", "tradeoff:0.3,nominal=mean", "nominal,nominal=head:1",
    "tradeoff:0.4,source=mean",
]  # fmt: skip


def backward(grads: object, inputs: Inputs, needs: object) -> Grads:
    return reference.backward(OutputGrads(*grads), inputs, reference.forward(inputs, True)[-1], needs)  # type: ignore[misc]


def make_inputs(aggregation: str = "tradeoff:0.4", *, n: int = 6, d: int = 5, k: int = 4, **changes: object) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    values: dict[str, object] = {
        "hidden": rand(n, d), "weight": rand(2 * k, d), "bias": rand(2 * k), "rows": None, "norm_weight": None,
        "seed": torch.tensor([2**62 + 12345]), "shift": rand(k), "scale": rand(k).abs() + 0.5,
        "std_ref": rand(k).abs() + 0.5, "group": None, "group_size": 0, "norm_eps": 1e-6, "std_floor": 1e-3,
        "aggregation": aggregation,
    }  # fmt: skip
    return Inputs(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [  # Random123's kat_vectors, the counters this op can form (its upper half is zero)
        (7, 0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_gives_the_published_words(rounds: int, counter: int, key: int, words: tuple[int, ...]) -> None:
    got = reference.philox_4x32(torch.tensor([key]), torch.tensor([counter]), rounds)
    assert tuple(int(w) for w in got) == words


def python_philox(seed: int, counter: int, rounds: int) -> tuple[int, int, int, int]:
    """Salmon et al. 2011, section 4.2, on Python's unbounded integers."""
    mask = 0xFFFFFFFF
    c = [counter & mask, (counter >> 32) & mask, 0, 0]
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & mask, (a >> 32) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c[0], c[1], c[2], c[3]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 987654321, -1])
@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 2**40 + 7])
def test_philox_is_right_where_int64_products_wrap(seed: int, counter: int) -> None:
    got = reference.philox_4x32(torch.tensor([seed]), torch.tensor([counter]))
    assert tuple(int(w) for w in got) == python_philox(seed % 2**64, counter, 7)


def test_noise_is_standard_normal_and_its_minimum_over_heads_has_the_known_moments() -> None:
    noise = reference.philox_normal(torch.tensor([7]), 200_000, 5, torch.float64)
    assert abs(noise.mean()) < 3e-3
    assert abs(noise.var() - 1) < 5e-3
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.01
    worst = noise.min(dim=1).values  # order statistics of 5 iid normals: papers.md 1.11, E = -1.1630, Var = .4475
    assert abs(worst.mean() + 1.1630) < 6e-3
    assert abs(worst.var() - 0.4475) < 6e-3


def test_noise_depends_on_the_element_not_on_how_many_are_drawn() -> None:
    seed = torch.tensor([5])
    assert torch.equal(reference.philox_normal(seed, 3, 4), reference.philox_normal(seed, 100, 4)[:3])


def by_hand(mean: list[float], std: list[float], values: list[float], spec: Aggregation, ref: list[float]) -> float:
    k, c = len(mean), spec.coefficient
    ordered = sorted(values)
    chosen = {
        "least_std": min(range(k), key=lambda i: std[i]),
        "relative_std": min(range(k), key=lambda i: std[i] / ref[i]),
    }.get(spec.nominal, spec.nominal_head)
    nominal = statistics.fmean(mean) if spec.nominal == "mean" else mean[chosen]
    return {
        "tradeoff": lambda: c * nominal + (1 - c) * ordered[0],
        "nominal": lambda: nominal,
        "mean": lambda: statistics.fmean(values),
        "min": lambda: ordered[0],
        "max": lambda: ordered[-1],
        "median": lambda: statistics.median(values),
        "lcb": lambda: statistics.fmean(values) - c * statistics.pstdev(values),
        "uwo": lambda: statistics.fmean(values) - c * statistics.pvariance(values),
        "softmin": lambda: -c * math.log(statistics.fmean([math.exp(-v / c) for v in values])),
        "cvar": lambda: statistics.fmean(ordered[: math.ceil(c * k)]),
        "head": lambda: values[int(c)],
    }[spec.kind]()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("text", SPECS)
def test_every_aggregation_is_what_its_formula_says(text: str, k: int) -> None:
    inputs = make_inputs(text, k=k)
    h = reference.heads(inputs)
    got = reference.aggregate(h.mean, h.std, h.values, inputs.spec, inputs.std_ref)
    ref = inputs.std_ref.tolist()  # type: ignore[union-attr]
    for row in range(len(got)):
        want = by_hand(h.mean[row].tolist(), h.std[row].tolist(), h.values[row].tolist(), inputs.spec, ref)
        assert got[row].item() == pytest.approx(want, abs=1e-12)


def test_soft_min_runs_from_the_worst_head_to_the_mean() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    soft = [reference.aggregate(values, values, values, Aggregation("softmin", b)).item() for b in (1e-3, 1.0, 1e6)]
    assert soft[0] == pytest.approx(1.0, abs=2e-3)
    assert 1.0 < soft[1] < 7 / 3
    assert soft[2] == pytest.approx(7 / 3, abs=1e-5)


def test_the_trade_off_never_exceeds_the_nominal_reward_when_the_worst_is_taken_over_means() -> None:
    inputs = make_inputs("tradeoff:0.4,source=mean", n=500)
    h = reference.heads(inputs)
    nominal = reference.nominal_reward(h.mean, h.std, inputs.spec)
    assert (reference.aggregate(h.mean, h.std, h.values, inputs.spec) <= nominal + 1e-12).all()


def test_ties_go_to_the_lowest_head() -> None:
    mean, std = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.2, 0.2]])
    assert reference.nominal_reward(mean, std, Aggregation("nominal")).item() == 1.0


def test_group_labels_and_group_size_agree_and_every_group_sums_to_zero() -> None:
    sized = reference.forward(make_inputs("min,centre=group", group_size=2))[0]
    labelled = reference.forward(make_inputs("min,centre=group", group=torch.tensor([3, 3, 0, 0, 5, 5])))[0]
    torch.testing.assert_close(sized, labelled)
    assert sized.view(3, 2).sum(dim=1).abs().max() < 1e-12


def test_reward_sum_is_taken_before_centring_so_that_bsr_sees_it() -> None:
    plain = reference.forward(make_inputs("min"))
    centred = reference.forward(make_inputs("min,centre=batch"))
    torch.testing.assert_close(centred[3], plain[0].sum())
    assert centred[0].sum().abs() < 1e-12


def test_folded_norm_is_the_trunks_rmsnorm_followed_by_the_heads() -> None:
    gain = torch.rand(5, dtype=torch.float64) + 0.5
    folded = reference.forward(make_inputs(norm_weight=gain))
    plain = make_inputs()
    normed = torch.nn.functional.rms_norm(plain.hidden, (5,), gain, 1e-6)
    for got, want in zip(folded, reference.forward(plain._replace(hidden=normed)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("text", [*SPECS, "tradeoff:0.4,centre=batch", "lcb:1,centre=group"])
def test_the_explicit_backward_is_the_gradient_of_the_forward(text: str, norm: bool) -> None:
    inputs = make_inputs(text, n=8, rows=torch.tensor([0, 3, 3, 7, 1, 2]), group_size=3 if "group" in text else 0)
    inputs = inputs._replace(norm_weight=torch.rand(5, dtype=torch.float64) + 0.5 if norm else None)
    leaves = [
        None if t is None else t.requires_grad_()
        for t in (inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight)
    ]
    outputs = reference.forward(inputs)[:4]
    grads = tuple(torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(1)) for o in outputs)
    present = [leaf for leaf in leaves if leaf is not None]
    want = iter(torch.autograd.grad(outputs, present, grads))
    with torch.no_grad():
        got = backward(grads, inputs, (True, True, True, norm))
    for leaf, gradient in zip(leaves, got, strict=True):
        assert (gradient is None) == (leaf is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, next(want), rtol=1e-9, atol=1e-11)


def test_lcb_has_the_zero_subgradient_where_all_heads_agree() -> None:
    inputs = make_inputs("lcb:1", k=3, seed=None, shift=None, scale=None, bias=None)
    inputs = inputs._replace(weight=torch.ones(6, 5, dtype=torch.float64))
    gradient = backward((torch.ones(6, dtype=torch.float64), None, None, None), inputs, (True, True, False, False))
    assert all(torch.isfinite(g).all() for g in gradient if g is not None)
