"""Fit a trust region: where the features of the reference responses lie, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import TRUST_DIRECTIONS, TrustRegion
from .head import EnsembleHead
from .taps import LOGPROB_SIZE

LEAST_ROWS = 20  # of fewer rows none lies beyond the 95 % quantile
EDGE = 0.95
FOLDS = 5
_BLOCK_BYTES = 1 << 27  # of fp64 features at once
_WHOLE_EIGH = 1024  # up to this width it is faster to compute all eigenvectors than to ask for some
_GREATEST_RATIO = 1e5  # of variances: the op subtracts in fp32, which leaves two digits at this ratio


@torch.no_grad()
def fit_trust(
    features: Tensor,
    *,
    directions: int = TRUST_DIRECTIONS,
    prompts: Tensor | None = None,
    head: EnsembleHead | None = None,
    shrinkage: float | None = None,
    blocks: Tensor | None = None,
) -> TrustRegion:
    """Fit the region in which the features of reference responses lie.

    The features are standardised, and their correlation matrix gets the form of probabilistic PCA (Tipping and Bishop
    1999): R directions u_r with variance lambda_r, and variance s2, the mean of the other eigenvalues, in all others.
    The distance is the Mahalanobis distance of that Gaussian, divided by the 95 % quantile of its values on rows that
    the fit did not see: 5 folds, each of whole prompts if `prompts` are given. On the rows of the fit itself the
    quantile would be too small, and with few rows far too small.

    Few rows: eigenvalues are drawn towards their mean, by the share that minimises the expected error of the matrix
    (Ledoit and Wolf 2004).

    A feature that never varied, but does in a new text, is the strongest sign of foreign text, so none is left out. Its
    standard deviation is unknown, not 0: each counts as the largest of its own, the rounding of its dtype, and the
    median feature's divided by sqrt(N), as if it differed in one response of N.

    Blocks: two numbers such as log-probabilities would drown among hundreds of states. Of several blocks of features,
    each gets a fit of its own, and its square distance is divided by its own quantile before they are added.

    Args:
        features: [N, D] of reference responses, any floating dtype, any device. The arithmetic is fp64, in blocks; it
            holds three matrices [D, D], or if N < D two of the size of `features`.
        directions: R; fewer if there are not that many: at most D - 1, and at most a quarter of N. Of several blocks
            each gets an even share, and what a small one does not need goes to the larger.
        prompts: [N] int64, a label of each row's prompt.
        head: its mean over heads, calibrated as it is, gives `unit`: the standard deviation within a prompt, or over
            all rows without `prompts` or if no prompt has two. None: unit 1.
        shrinkage: the share by which eigenvalues are drawn towards their mean, in [0, 1]; None: Ledoit and Wolf's.
        blocks: [D] int64, the number of each feature's block, negative for one that the distance does not read; None:
            all are one block. See `blocks_of_taps`.

    Returns:
        A TrustRegion in fp32 on the features' device. The same input gives the same region.

    Raises:
        ValueError: for another shape or dtype, fewer than 20 rows, values that are not finite, rows that are all the
            same, or an option out of range.
    """
    _check(features, directions, prompts, shrinkage, blocks)
    unit = _unit(head, features, prompts)
    n, dim = features.shape
    fold = _folds(n, prompts).to(features.device)
    columns = (
        [torch.arange(dim)] if blocks is None else [(blocks == b).nonzero()[:, 0] for b in blocks.unique() if b >= 0]
    )
    parts, unseen = [], torch.zeros(n, dtype=torch.float64, device=features.device)
    for place, count in zip(columns, _shares(directions, [len(place) for place in columns]), strict=True):
        place = place.to(features.device)
        part, far = _fit_unseen(features if blocks is None else features[:, place], fold, count, shrinkage)
        edge = _edge(far)
        unseen += far / edge
        parts.append((place, part, edge))
    whole = _joined([(place, part.region(edge * _edge(unseen), unit)) for place, part, edge in parts], dim)
    if not all(bool(tensor.isfinite().all()) for tensor in whole):
        raise ValueError("fit_trust: features: expected a range that fp32 holds, got features too small or too large")
    return whole


def blocks_of_taps(taps: Sequence[str] | None, size: int) -> Tensor | None:
    """[size] int64, the blocks of features that a distance reads of a model with these taps (`engine.taps`): 0 for
    states, 1 for the response's log-probability, -1 for what it does not read. None: all, as one.

    Of states it reads the means over the response, if there are any: they show foreign text best, and the last token's
    states beside them only add noise.
    """
    kinds = [str(tap).partition(":")[0] for tap in taps or ()]
    states = [kind for kind in kinds if kind != "logprob"]
    if len(states) == len(kinds) and len({*states}) <= 1:
        return None
    numbers = {"last": -1 if "mean" in kinds else 0, "mean": 0, "logprob": 1}
    width = (size - LOGPROB_SIZE * (len(kinds) - len(states))) // max(1, len(states))
    sizes = [LOGPROB_SIZE if kind == "logprob" else width for kind in kinds]
    return torch.tensor([numbers[kind] for kind in kinds]).repeat_interleave(torch.tensor(sizes))


def _shares(directions: int, sizes: Sequence[int]) -> list[int]:
    """How many directions each block gets: an even share, of which a small one leaves the rest to the larger."""
    shares = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda block: sizes[block])
    for done, block in enumerate(order):
        shares[block] = min(sizes[block] - 1, (directions - sum(shares)) // (len(order) - done))
    return shares


def _edge(square_distance: Tensor) -> Tensor:
    """[]: the 95 % quantile of [N]; torch.quantile takes at most 2^24 numbers."""
    return square_distance.kthvalue(round(EDGE * len(square_distance))).values


def _joined(parts: Sequence[tuple[Tensor, TrustRegion]], dim: int) -> TrustRegion:
    """The region on all `dim` features whose square distance is the sum of the parts', each on its own features."""
    first = parts[0][1]
    directions = first.mean.new_zeros(sum(len(part.weights) for _, part in parts), dim)
    mean, precision = (first.mean.new_zeros(dim) for _ in range(2))
    row = 0
    for place, part in parts:
        mean[place], precision[place] = part.mean, part.precision
        directions[row : row + len(part.weights), place] = part.directions
        row += len(part.weights)
    weights = torch.cat([part.weights for _, part in parts])
    return first._replace(mean=mean, precision=precision, directions=directions, weights=weights)


def _fit_unseen(features: Tensor, fold: Tensor, directions: int, shrinkage: float | None) -> tuple[_Fitted, Tensor]:
    """The fit of all rows, and [N] the square distance of each row in the fit of the other folds."""
    n, dim = features.shape
    shape = _Shape(min(directions, dim - 1, n // 4), shrinkage, torch.finfo(features.dtype).eps)
    unseen = torch.empty(n, dtype=torch.float64, device=features.device)
    pilot = features[:: max(1, n // 1024)].double().mean(0)
    total = _moments(features, pilot) if n >= dim else None
    whole = _fit(features, total, shape)
    shape = shape._replace(shrinkage=whole.share)  # Ledoit and Wolf's share of fewer rows would be larger
    for k in range(int(fold.max()) + 1):
        held, rest = features[fold == k], features[fold != k]
        moments = None if total is None else total.without(_moments(held, pilot))
        unseen[fold == k] = _fit(rest, moments, shape).square_distance(held)
    return whole, unseen


class _Shape(NamedTuple):
    """What to fit: R, the shrinkage (None: Ledoit and Wolf's), the relative rounding of the features' dtype."""

    directions: int
    shrinkage: float | None
    rounding: float


class _Moments(NamedTuple):
    """Of some rows less a pilot mean [D]: their sum [D], and the sum of their outer products [D, D]; fp64."""

    pilot: Tensor
    sum: Tensor
    gram: Tensor

    def without(self, part: _Moments) -> _Moments:
        return _Moments(self.pilot, self.sum - part.sum, self.gram - part.gram)


class _Fitted(NamedTuple):
    """A fit, fp64: mean [D], sd [D]; of the standardised features, basis [R, D] with variance [R], and the rest [].

    share: by which the variances were drawn towards their mean.
    """

    mean: Tensor
    sd: Tensor
    basis: Tensor
    variance: Tensor
    rest: Tensor
    share: float

    def square_distance(self, features: Tensor) -> Tensor:
        """[n, D] -> [n], not divided by the edge."""
        parts = []
        for block in _blocks(features):
            z = (block - self.mean) / self.sd
            along = (z @ self.basis.T).square()
            outside = (z.square().sum(1) - along.sum(1)).clamp_min(0)
            parts.append(outside / self.rest + (along / self.variance).sum(1))
        return torch.cat(parts)

    def region(self, edge: Tensor, unit: Tensor) -> TrustRegion:
        """The op's form, in fp32; `edge` []: the square distance that becomes 1."""
        tensors = (
            self.mean,
            1 / (self.sd.square() * self.rest * edge),
            self.basis / self.sd,
            (1 / self.variance - 1 / self.rest) / edge,
            unit.to(self.mean).reshape(1),
            self.mean.new_ones(1),
        )
        return TrustRegion(*(tensor.float().contiguous() for tensor in tensors))


def _blocks(features: Tensor) -> Iterator[Tensor]:
    rows = max(1, _BLOCK_BYTES // (8 * features.shape[1]))
    return (block.double() for block in features.split(rows))


def _moments(features: Tensor, pilot: Tensor) -> _Moments:
    total, gram = torch.zeros_like(pilot), pilot.new_zeros(len(pilot), len(pilot))
    for block in _blocks(features):
        block = block - pilot
        total += block.sum(0)
        gram.addmm_(block.T, block)
    return _Moments(pilot, total, gram)


def _fit(features: Tensor, moments: _Moments | None, shape: _Shape) -> _Fitted:
    """Fit all rows of features [n, D]; `moments`: of the same rows, needed if n >= D."""
    n, dim = features.shape
    if moments is None:
        mean = features.double().mean(0)
        z = features.double() - mean
        sd = _floored(z.square().mean(0).sqrt(), mean, n, shape)
        z /= sd
        square_norms = z.square().sum(1)
        # the Gram matrix of the rows has the correlation matrix's eigenvalues other than 0
        values, vectors = _top(z @ z.T / n, shape.directions)
        basis = (vectors.T @ z) / (n * values).sqrt()[:, None]
        square_sum = (z @ z.T / n).square().sum()
    else:
        centre = moments.sum / n
        mean, covariance = moments.pilot + centre, moments.gram / n - centre.outer(centre)
        sd = _floored(covariance.diagonal().clamp_min(0).sqrt(), mean, n, shape)
        correlation = covariance / sd / sd[:, None]
        values, vectors = _top(correlation, shape.directions)
        basis, square_sum = vectors.T, correlation.square().sum()
        square_norms = torch.cat([((block - mean) / sd).square().sum(1) for block in _blocks(features)])
    trace = square_norms.mean()
    even = trace / dim
    rest = (trace - values.sum()).clamp_min(0) / (dim - len(values))
    share = shape.shrinkage
    if share is None:
        error = (square_norms.square().mean() - square_sum) / n
        share = float((error / (square_sum - dim * even.square())).clamp(0, 1)) if dim > 1 else 0.0
    variance, rest = (torch.lerp(numbers, even.expand_as(numbers), share) for numbers in (values, rest))
    if len(variance):
        rest = torch.maximum(rest, variance.max() / _GREATEST_RATIO)
    return _Fitted(mean, sd, basis, torch.maximum(variance, rest), rest, share)


def _floored(sd: Tensor, mean: Tensor, n: int, shape: _Shape) -> Tensor:
    varying = sd[sd > 1e-9 * mean.abs()]
    if not len(varying):
        raise ValueError(f"fit_trust: features: expected rows that differ in every block, got {n} that are the same")
    return torch.maximum(sd, mean.abs() * shape.rounding).clamp_min(float(varying.median()) / n**0.5)


def _top(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues [count] of a symmetric matrix [M, M], and their vectors [M, count]."""
    size = len(matrix)
    if count == 0:
        return matrix.new_empty(0), matrix.new_empty(size, 0)
    if size <= _WHOLE_EIGH or count > size // 8:
        values, vectors = torch.linalg.eigh(matrix)
        return values[-count:], vectors[:, -count:]
    import numpy as np
    from scipy.sparse.linalg import eigsh  # takes a second to import

    found = eigsh(matrix.cpu().numpy(), k=count, v0=np.ones(size))
    return tuple(torch.from_numpy(part).to(matrix) for part in found)  # type: ignore[return-value]


def _folds(n: int, prompts: Tensor | None) -> Tensor:
    """[N] int64: the fold of each row; the rows of a prompt share one if there are two prompts or more."""
    labels = torch.arange(n)
    if prompts is not None and int(prompts.max()) != int(prompts.min()):
        labels = prompts.cpu().unique(return_inverse=True)[1]
    count = int(labels.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (order % min(FOLDS, count))[labels]


def _unit(head: EnsembleHead | None, features: Tensor, prompts: Tensor | None) -> Tensor:
    """[]: the standard deviation of the mean head, within a prompt where there are labels."""
    if head is None:
        return torch.ones((), dtype=torch.float64)
    rows = max(1, _BLOCK_BYTES // (8 * features.shape[1]))
    blocks = [head(block.to(head.weight.device), aggregation="mean").mean for block in features.split(rows)]
    mean = torch.cat(blocks).double().mean(1).cpu()
    if prompts is not None:
        labels = prompts.cpu().unique(return_inverse=True)[1]
        counts = labels.bincount()
        if len(mean) > len(counts):
            centre = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, labels, mean) / counts
            mean, freedom = mean - centre[labels], len(mean) - len(counts)
            return torch.sqrt(mean.square().sum() / freedom)
    return mean.std()


def _check(
    features: Tensor, directions: int, prompts: Tensor | None, shrinkage: float | None, blocks: Tensor | None
) -> None:
    def refuse(argument: str, expected: str, got: object) -> None:
        raise ValueError(f"fit_trust: {argument}: expected {expected}, got {got}")

    if features.dim() != 2 or not features.is_floating_point() or features.shape[1] < 1:
        refuse("features", "[N, D] of a floating dtype", f"{list(features.shape)} of {features.dtype}")
    if len(features) < LEAST_ROWS:
        refuse("features", f"at least {LEAST_ROWS} rows, to find their {EDGE:.0%} quantile", len(features))
    bad = sum(int((~block.isfinite()).any(1).sum()) for block in features.split(1 << 14))
    if bad:
        refuse("features", "finite values", f"{bad} of {len(features)} rows with others")
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 0:
        refuse("directions", "a whole number, 0 or above", repr(directions))
    if prompts is not None and (prompts.shape != features.shape[:1] or prompts.is_floating_point()):
        refuse("prompts", f"whole numbers [{len(features)}]", f"{list(prompts.shape)} of {prompts.dtype}")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        refuse("shrinkage", "a share from 0 to 1", shrinkage)
    if blocks is not None:
        if blocks.dtype != torch.int64 or blocks.shape != features.shape[1:]:
            refuse("blocks", f"[{features.shape[1]}] of int64", f"{list(blocks.shape)} of {blocks.dtype}")
        if not bool((blocks >= 0).any()):
            refuse("blocks", "at least one feature to read", "none")
