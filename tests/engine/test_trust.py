"""fit_trust: the distance it gives, its edge on rows that it has not seen, few and awkward rows, its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prudent import TrustRegion, fit_trust
from prudent.engine import EnsembleHead, trust

WIDTH, RANK = 48, 6


def distance(features: Tensor, region: TrustRegion) -> Tensor:
    """The contract of TrustRegion, in fp64."""
    mean, precision, directions, weights = (tensor.double() for tensor in region[:4])
    gap = features.double() - mean
    return (gap.square() @ precision + (gap @ directions.T).square() @ weights).clamp_min(0).sqrt()


class World:
    """Responses whose features vary in RANK directions and a little elsewhere, each feature with its own scale."""

    def __init__(self, width: int = WIDTH, rank: int = RANK, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.loadings = self.normal(rank, width)
        self.scale, self.centre = torch.exp(self.normal(width)), 5 * self.normal(width)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def rows(self, count: int, elsewhere: float = 0.2) -> Tensor:
        parts = self.normal(count, len(self.loadings)) @ self.loadings
        return (parts + elsewhere * self.normal(count, self.loadings.shape[1])) * self.scale + self.centre


def beyond(features: Tensor, region: TrustRegion) -> float:
    return float((distance(features, region) > 1).double().mean())


@pytest.mark.parametrize("directions", [0, 6, WIDTH - 1])
def test_the_distance_is_the_mahalanobis_distance_of_probabilistic_pca(directions):
    world = World()
    features = world.rows(400).double()
    sd = features.std(0, correction=0)
    values, vectors = torch.linalg.eigh(torch.corrcoef(features.T))
    values[: WIDTH - directions] = values[: WIDTH - directions].mean()
    covariance = sd[:, None] * (vectors @ values.diag() @ vectors.T) * sd
    fresh = world.rows(50, elsewhere=1).double()
    gap = fresh - features.mean(0)
    want = (gap * torch.linalg.solve(covariance, gap.T).T).sum(1).sqrt()
    ratio = distance(fresh, fit_trust(features, directions=directions, shrinkage=0.0)) / want
    torch.testing.assert_close(ratio, ratio.mean().expand(50), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [40, 200, 4000])
@pytest.mark.parametrize("directions", [0, 6, 32])
def test_one_in_twenty_fresh_reference_responses_lies_beyond_the_edge(rows, directions):
    worlds = [World(seed=seed) for seed in range(5 if rows < 1000 else 1)]
    shares = [beyond(world.rows(2000), fit_trust(world.rows(rows), directions=directions)) for world in worlds]
    assert 0.02 < sum(shares) / len(shares) < (0.1 if rows < 1000 else 0.07)


def test_more_directions_see_what_a_diagonal_does_not():
    world = World()
    reference, off = world.rows(1000), world.rows(500, elsewhere=0.6)
    assert beyond(off, fit_trust(reference, directions=0)) < 0.2
    assert beyond(off, fit_trust(reference, directions=RANK)) > 0.95


@pytest.mark.parametrize("rows", [trust.LEAST_ROWS, 64])
def test_few_rows_of_many_features_fit_and_tell_far_from_near(rows):
    world = World(576, 10)
    region = fit_trust(world.rows(rows))
    assert len(region.weights) == rows // 4
    assert beyond(world.rows(1000), region) < 0.2
    assert beyond(world.rows(500, elsewhere=10), region) > 0.95


def test_both_ways_to_the_eigenvectors_and_every_size_of_block_give_one_region(monkeypatch):
    features = World().rows(200)
    shape = trust._Shape(6, None, 1e-7)
    by_rows = trust._fit(features, None, shape)
    by_moments = trust._fit(features, trust._moments(features, features[0].double()), shape)
    monkeypatch.setattr(trust, "_WHOLE_EIGH", 8)
    monkeypatch.setattr(trust, "_BLOCK_BYTES", 8 * WIDTH * 7)
    iterated = trust._fit(features, trust._moments(features, features[0].double()), shape)
    fresh = World(seed=1).rows(20)
    want = by_rows.square_distance(fresh)
    torch.testing.assert_close(by_moments.square_distance(fresh), want)
    torch.testing.assert_close(iterated.square_distance(fresh), want)


def test_the_same_input_gives_the_same_region():
    features = World().rows(100)
    for one, other in zip(fit_trust(features), fit_trust(features.clone()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_gives_finite_fp32_tensors_and_a_rounded_response_stays_inside(dtype):
    world = World()
    region = fit_trust(world.rows(1000).to(dtype))
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in region)
    assert beyond(world.rows(1000).to(dtype), region) < 0.08


def test_a_feature_that_never_varied_shows_a_text_in_which_it_does():
    world = World()
    features = world.rows(400)
    features[:, 7] = 3.0
    region = fit_trust(features)
    fresh = world.rows(300)
    fresh[:, 7] = 3.0
    assert beyond(fresh, region) < 0.1
    fresh[:, 7] += world.scale.median()
    assert beyond(fresh, region) == 1


def test_the_rounding_of_a_massive_activation_is_no_distance():
    world = World()
    features = world.rows(400, elsewhere=1)
    features[:, 3] = 1000.0
    region = fit_trust(features.bfloat16())
    fresh = world.rows(300, elsewhere=1)
    fresh[:, 3] = 1004.0  # the next number that bfloat16 holds
    assert beyond(fresh.bfloat16(), region) < 0.1
    fresh[:, 3] = 3000.0
    assert beyond(fresh.bfloat16(), region) == 1


def test_features_of_low_rank_give_a_region_that_fp32_can_use():
    world = World(rank=2)
    features = world.rows(300, elsewhere=0.0)
    region = fit_trust(features, directions=8, shrinkage=0.0)
    assert beyond(world.rows(300, elsewhere=0.0), region) < 0.1
    assert beyond(world.rows(300, elsewhere=0.2), region) == 1
    gap = world.rows(300, elsewhere=0.0) - region.mean
    in_fp32 = (gap.square() @ region.precision + (gap @ region.directions.T).square() @ region.weights).sqrt()
    torch.testing.assert_close(in_fp32.double(), distance(gap + region.mean, region), rtol=0, atol=0.1)


def test_whole_prompts_are_held_out_so_that_a_new_prompt_is_not_foreign():
    world = World(rank=3)
    prompts = torch.arange(40).repeat_interleave(10)

    def answers(shift: Tensor) -> Tensor:
        return world.rows(len(shift) * 10, elsewhere=0.1) + shift.repeat_interleave(10, 0)

    features = answers(2 * world.normal(40, WIDTH) * world.scale)
    fresh = answers(2 * world.normal(200, WIDTH) * world.scale)
    by_prompt, by_row = (beyond(fresh, fit_trust(features, prompts=labels)) for labels in (prompts, None))
    assert by_prompt < by_row
    assert by_prompt < 0.12


def test_the_unit_is_the_spread_of_the_mean_head_within_a_prompt():
    features = World().rows(60)
    head = EnsembleHead(WIDTH, 3)
    head.scale.fill_(2.0)
    mean = head(features).mean.mean(1)
    prompts = torch.arange(20).repeat(3) - 100
    within = torch.stack([mean[prompts == label] for label in prompts.unique()])
    want = (within.var(1, correction=1).mean()).sqrt()
    torch.testing.assert_close(fit_trust(features, prompts=prompts, head=head).unit, want[None])
    # without labels, or with one response a prompt, there is only the spread over all
    for labels in (None, torch.arange(60)):
        torch.testing.assert_close(fit_trust(features, prompts=labels, head=head).unit, mean.std()[None])
    assert fit_trust(features).unit.tolist() == [1]


def test_a_distance_can_read_some_features_alone():
    features, fresh = World().rows(200), World(seed=1).rows(50)
    columns = torch.zeros(WIDTH, dtype=torch.bool)
    columns[5::3] = True
    whole, part = fit_trust(features, blocks=columns.long() - 1), fit_trust(features[:, columns])
    torch.testing.assert_close(distance(fresh, whole), distance(fresh[:, columns], part))
    fresh[:, ~columns] += 100
    torch.testing.assert_close(distance(fresh, whole), distance(fresh[:, columns], part))


def test_of_a_models_taps_the_distance_reads_the_means_and_the_log_probability_of_the_response():
    assert trust.blocks_of_taps(["last:4", "mean:2"], 6).tolist() == [-1] * 3 + [0] * 3
    assert trust.blocks_of_taps(["last:4", "logprob", "mean:2"], 8).tolist() == [-1] * 3 + [1] * 2 + [0] * 3
    assert trust.blocks_of_taps(["last:4", "logprob"], 5).tolist() == [0] * 3 + [1] * 2
    assert trust.blocks_of_taps(["logprob"], 2).tolist() == [1] * 2
    for all_of_one in (None, ["last:4"], ["mean:2", "mean:3"]):
        assert trust.blocks_of_taps(all_of_one, 6) is None


def test_blocks_of_features_weigh_the_same_however_many_features_they_have():
    world = World()
    features = torch.cat([world.rows(400), torch.randn(400, 2, generator=torch.Generator().manual_seed(0))], dim=1)
    blocks = torch.tensor([0] * WIDTH + [1] * 2)
    region = fit_trust(features, blocks=blocks, directions=8)
    assert region.directions.shape == (8, WIDTH + 2)
    parts = [fit_trust(features[:, blocks == b], directions=count) for b, count in ((0, 7), (1, 1))]
    squares = [distance(features[:, blocks == b], part).square() for b, part in zip((0, 1), parts, strict=True)]
    ratio = distance(features, region).square() / (squares[0] + squares[1])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
    far = features[:1].clone()
    far[:, WIDTH:] = 30  # ten standard deviations in two features of many
    assert distance(far, region) > 1.5 * distance(far, fit_trust(features, directions=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(30)}, r"features: expected \[N, D\] of a floating dtype, got \[30\]"),
        ({"features": torch.zeros(30, 4, dtype=torch.int64)}, "features: expected .* got .* torch.int64"),
        ({"features": torch.randn(19, 4)}, "features: expected at least 20 rows, .* got 19"),
        ({"features": torch.full((30, 4), torch.inf)}, "features: expected finite values, got 30 of 30 rows"),
        (
            {"features": torch.ones(30, 4)},
            "features: expected rows that differ in every block, got 30 that are the same",
        ),
        ({"features": torch.randn(30, 4) * 1e-25}, "features: expected a range that fp32 holds"),
        ({"directions": -1}, "directions: expected a whole number, 0 or above, got -1"),
        ({"directions": True}, "directions: expected a whole number, 0 or above, got True"),
        ({"shrinkage": 1.5}, "shrinkage: expected a share from 0 to 1, got 1.5"),
        ({"prompts": torch.zeros(29, dtype=torch.int64)}, r"prompts: expected whole numbers \[30\], got \[29\]"),
        ({"blocks": torch.ones(4)}, r"blocks: expected \[4\] of int64, got \[4\] of torch.float32"),
        ({"blocks": torch.full((4,), -1)}, "blocks: expected at least one feature to read, got none"),
        ({"prompts": torch.zeros(30)}, r"prompts: expected whole numbers \[30\], got .*float32"),
    ],
)
def test_refusals_name_the_argument(change, message):
    arguments = {"features": torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), **change}
    with pytest.raises(ValueError, match=f"^fit_trust: {message}"):
        fit_trust(**arguments)
