"""`EnsembleHead`: K Gaussian reward heads on a trunk's hidden states, with their weights and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import STD_FLOOR, Aggregation, EnsembleOutput, TrustRegion, ensemble_reward

INITIAL_STD = 0.5  # without std_floor; half the width of eq. 8's targets at alpha = 1, so neither certain nor all noise
INITIAL_STD_SPREAD = 0.1  # std rows' deviation over mean rows': stds then differ between heads and between inputs


class EnsembleHead(nn.Module):
    """K Gaussian heads, hidden states [..., D] -> means and stds [N, K] -> one pessimistic reward [N].

    BRME (arXiv 2409.15360) 5.1: one linear map D -> 2K gives every head a mean and a standard deviation. The paper does
    not say how a raw output s becomes a std. Here std = softplus(s) + std_floor, because
    - the std is positive: with an unconstrained std, the sampled reward mean + a * std would not depend on its sign,
      and the nominal head, argmin std, would prefer negative values;
    - d std / d s > 0, so the argument of the paper's appendix B.1 (the loss of eq. 8 pulls every std down) holds for s;
    - softplus is exponential for small s and linear for large s: for an outlying hidden state, the std is large, not
      inf as with exp;
    - eq. 8 pulls every std towards 0 without end, and stds are compared and divided by: the floor keeps them above
      rounding.

    Initialisation (`reset_parameters`): mean rows N(0, 1/(D+1)) and bias 0 (BSR, arXiv 2505.07271, 3.1); std rows
    N(0, 0.01/(D+1)) and the bias that gives std = 0.5 + std_floor at features of 0. Every row is drawn independently,
    so heads start different.

    The arithmetic is fp32 with autocast off. Parameters and calibration stay fp32 when the model around them is cast
    to a half precision (`.half()`, `.to(torch.bfloat16)`); `.double()` casts them. A single-head (Bradley-Terry) reward
    is `EnsembleHead(D, 1, aggregation="mean")`.

    Args:
        hidden_size: D, the trunk's width.
        num_heads: K.
        aggregation: how K heads become one reward, an `Aggregation` or its string; assign `head.aggregation` to change
            it.
        std_floor: least std before calibration, >= 0.
        trust_directions: R of a trust region that a checkpoint will fill; until then every distance is 0. None: no
            trust region.

    Attributes:
        weight: Parameter [2K, D]; rows 0..K-1 the means, K..2K-1 the raw stds.
        bias: Parameter [2K].
        shift, scale: persistent buffers [K] (0, 1): calibrated mean = (mean - shift) / scale, std = std / scale.
        std_ref: persistent buffer [K] (1): each head's mean calibrated std; `nominal=relative_std` divides by it.
        trust_mean, ..., trust_rms: persistent buffers, the fields of `trust`; None, and not in the state, without one.

    Raises:
        ValueError: for sizes below 1, a std_floor that is negative or not finite, or an aggregation that names a head
            beyond K.
    """

    shift: Tensor
    scale: Tensor
    std_ref: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 5,
        *,
        aggregation: str | Aggregation = "tradeoff:0.4",
        std_floor: float = STD_FLOOR,
        trust_directions: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_heads", num_heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"EnsembleHead: {name}: expected a whole number above 0, got {value!r}")
        if not (math.isfinite(std_floor) and std_floor >= 0):
            raise ValueError(f"EnsembleHead: std_floor: expected a finite number >= 0, got {std_floor!r}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.std_floor = float(std_floor)
        self.aggregation = aggregation
        # fp32 whatever torch's default dtype: trunks are often built under a half-precision default
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.weight = nn.Parameter(torch.empty(2 * num_heads, hidden_size, **options))
        self.bias = nn.Parameter(torch.empty(2 * num_heads, **options))
        self.register_buffer("shift", torch.zeros(num_heads, **options))
        self.register_buffer("scale", torch.ones(num_heads, **options))
        self.register_buffer("std_ref", torch.ones(num_heads, **options))
        for name in TrustRegion._fields:
            self.register_buffer(f"trust_{name}", None)
        self.reset_parameters()
        if trust_directions is not None:
            self._make_room(trust_directions)

    @property
    def aggregation(self) -> Aggregation:
        """How the heads become one reward; assign an `Aggregation` or its string."""
        return self._aggregation

    @aggregation.setter
    def aggregation(self, value: str | Aggregation) -> None:
        spec = Aggregation.parse(value)
        spec.check_heads(self.num_heads)
        self._aggregation = spec

    @property
    def trust(self) -> TrustRegion | None:
        """Where the reference responses lie; None before `set_trust`."""
        found = [getattr(self, f"trust_{name}") for name in TrustRegion._fields]
        return None if found[0] is None else TrustRegion(*found)

    @torch.no_grad()
    def set_trust(self, region: TrustRegion | None) -> None:
        """Copy a trust region, as `fit_trust` gives it, into the head's buffers; None removes them.

        Fit it on the calibrated head: its unit is in the units of the calibrated reward.

        Raises:
            ValueError: for tensors of other shapes than the head's, or with values that the op refuses.
        """
        if region is None:
            for name in TrustRegion._fields:
                setattr(self, f"trust_{name}", None)
            return
        rank = region.weights.shape[0] if region.weights.dim() == 1 else -1
        shapes = {"mean": [self.hidden_size], "precision": [self.hidden_size], "weights": [rank], "unit": [1]}
        shapes |= {"directions": [rank, self.hidden_size], "rms": [1]}
        for name, tensor in region._asdict().items():
            if list(tensor.shape) != shapes[name]:
                raise ValueError(f"set_trust: {name}: expected {shapes[name]}, got {list(tensor.shape)}")
            positive = name in ("unit", "rms")
            good = tensor.isfinite() & ((tensor > 0) if positive else (tensor >= 0) | (name != "precision"))
            if not bool(good.all()):
                raise ValueError(
                    f"set_trust: {name}: expected finite numbers{' above 0' * positive}, got {float(tensor[~good][0])}"
                )
        for name, tensor in region._asdict().items():
            setattr(self, f"trust_{name}", tensor.detach().to(self.weight).clone())

    def check_price(self, spec: Aggregation) -> None:
        """Raise ValueError for an aggregation that prices a distance if there is no trust region to measure it from."""
        if spec.trust is not None and self.trust is None:
            raise ValueError(
                f"aggregation: expected a model with a trust region for {str(spec)!r}, which prices the distance from "
                "it, got one without: fit one with `prudent calibrate --model DIR --data FILE`, or in Python with "
                "head.set_trust"
            )

    def _make_room(self, directions: int) -> None:
        """Buffers of a region with `directions` directions, in which every distance is 0."""
        wide, one = self.weight.new_zeros(self.hidden_size), self.weight.new_ones(1)
        empty = TrustRegion(
            wide, wide, wide.new_zeros(directions, self.hidden_size), wide.new_zeros(directions), one, one
        )
        for name, tensor in empty._asdict().items():
            setattr(self, f"trust_{name}", tensor.detach().clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for a trust region that the state has: the state of a fitted head loads into a fresh one."""
        stored = state_dict.get(f"{prefix}trust_weights")
        if stored is not None and (self.trust is None or len(self.trust.weights) != len(stored)):
            self._make_room(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights (see the class); reset the calibration and remove the trust region, which were
        measured on the old weights."""
        k, deviation = self.num_heads, 1.0 / math.sqrt(self.hidden_size + 1)
        self.weight[:k].normal_(0.0, deviation, generator=generator)
        self.weight[k:].normal_(0.0, INITIAL_STD_SPREAD * deviation, generator=generator)
        self.bias[:k].zero_()
        self.bias[k:].fill_(math.log(math.expm1(INITIAL_STD)))
        self.reset_calibration()
        self.set_trust(None)

    @torch.no_grad()
    def reset_calibration(self) -> None:
        """Set shift 0, scale 1 and std_ref 1, so that outputs are uncalibrated."""
        self.shift.zero_()
        self.scale.fill_(1.0)
        self.std_ref.fill_(1.0)

    def forward(
        self,
        hidden: Tensor,
        rows: Tensor | None = None,
        seed: Tensor | None = None,
        *,
        aggregation: str | Aggregation | None = None,
        group: Tensor | int | None = None,
        centre: str | None = None,
    ) -> EnsembleOutput:
        """Score rows of hidden states.

        Args:
            hidden: [..., D], any floating dtype, last dimension contiguous.
            rows: [N] int64, the rows of hidden.view(-1, D) to score (the last tokens of [B, T, D]); None: all rows.
            seed: [1] int64 on hidden's device; None: no sampling, the means are used as samples.
            aggregation: the aggregation of this call; None: the head's own.
            group: [N] int64 labels or a group size, with centre="group".
            centre: "none", "batch" or "group"; None: the aggregation's own.

        Returns:
            EnsembleOutput(reward [N], mean [N, K], std [N, K], reward_sum [], distance [N]), calibrated, fp32; distance
            is None without a trust region.

        Raises:
            ValueError: for an aggregation with a price of distance (`trust=`) without a trust region; from the op,
                naming the argument.
        """
        spec = self._aggregation if aggregation is None else Aggregation.parse(aggregation)
        self.check_price(spec)
        with torch.autocast(hidden.device.type, enabled=False):
            return ensemble_reward(
                hidden,
                self.weight,
                self.bias,
                rows=rows,
                seed=seed,
                shift=self.shift,
                scale=self.scale,
                std_ref=self.std_ref,
                group=group,
                aggregation=spec,
                centre=centre,
                std_floor=self.std_floor,
                trust=self.trust,
            )

    def frozen_copy(self) -> EnsembleHead:
        """A copy with the same weights, aggregation, calibration and trust region, its parameters frozen."""
        copy = EnsembleHead(self.hidden_size, self.num_heads, aggregation=self.aggregation, std_floor=self.std_floor)
        copy.to(self.weight.device, self.weight.dtype).load_state_dict(self.state_dict())
        return copy.requires_grad_(False)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, aggregation='{self.aggregation}', "
            f"std_floor={self.std_floor:g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EnsembleHead:
        """Move or cast as torch asks (every `.to` comes here), but stay fp32 when cast to a half precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self
