"""Put K heads on one scale: measure each head on a reference set and store the result in the head's buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ensemble_reward
from .head import EnsembleHead

BLOCK_ROWS = 16384  # bounds the fp32 workspace; the statistics do not depend on it


@torch.no_grad()
def calibrate(head: EnsembleHead, features: Tensor) -> None:
    """Set `head.shift`, `head.scale` and `head.std_ref` from reference features, replacing an earlier calibration.

    For head k with raw outputs mean_nk and std_nk over the N reference rows:

        shift_k   = mean over n of mean_nk
        scale_k   = std over n of mean_nk, with N - 1 in the denominator (ddof 1)
        std_ref_k = mean over n of std_nk / scale_k

    so that calibrated means have mean 0 and std 1 over the reference set. (BRME, arXiv 2409.15360, appendix F,
    calibrates whole models in this way.) std_ref has the units of the calibrated std: `nominal=relative_std` picks
    argmin_k (std_nk / scale_k) / std_ref_k = argmin_k std_nk / (mean over n of std_nk), which does not depend on
    scale_k. The unit of a trust region follows the spread of the mean over heads.

    Args:
        head: its buffers change in place; its weights do not.
        features: [N, D] reference hidden states, any floating dtype, any device; moved to the head's device in blocks.

    Raises:
        ValueError: for fewer than 2 rows, a width other than D, a head output that is not finite, or a head whose mean
            is the same on every row.
    """
    if features.dim() != 2 or features.shape[1] != head.hidden_size:
        raise ValueError(f"calibrate: features: expected [N, {head.hidden_size}], got {list(features.shape)}")
    if features.shape[0] < 2:
        raise ValueError(f"calibrate: features: expected at least 2 rows to measure a spread, got {features.shape[0]}")
    means, stds = [], []
    for block in features.split(BLOCK_ROWS):
        # raw outputs: no shift, no scale; the aggregation does not change mean and std
        raw = ensemble_reward(
            block.to(head.weight.device), head.weight, head.bias, aggregation="mean", std_floor=head.std_floor
        )
        means.append(raw.mean.double())
        stds.append(raw.std.double())
    mean, std = torch.cat(means), torch.cat(stds)
    bad = ~(mean.isfinite() & std.isfinite())
    if bool(bad.any()):
        row, k = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"calibrate: features: expected finite head outputs, got {int(bad.any(1).sum())} rows with others, "
            f"first row {row}, head {k}"
        )
    shift, scale = mean.mean(0), mean.std(0, correction=1)
    # a smaller spread is only the rounding of the fp32 means
    noise = 4 * torch.finfo(torch.float32).eps * mean.abs().amax(0)
    flat = (scale <= noise).nonzero()
    if len(flat):
        raise ValueError(
            f"calibrate: features: expected every head's mean to vary over the reference rows, got the same value on "
            f"all {len(mean)} rows from head {int(flat[0])}"
        )
    if head.trust is not None:
        before = (mean / head.scale).mean(1).std()
        head.trust.unit.mul_((mean / scale).mean(1).std() / before)
    head.shift.copy_(shift)
    head.scale.copy_(scale)
    head.std_ref.copy_(std.mean(0) / scale)
