"""`EnsembleHead`: K Gaussian reward heads on a trunk's hidden states, with their weights and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import STD_FLOOR, Aggregation, EnsembleOutput, ensemble_reward

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

    Attributes:
        weight: Parameter [2K, D]; rows 0..K-1 the means, K..2K-1 the raw stds.
        bias: Parameter [2K].
        shift, scale: persistent buffers [K] (0, 1): calibrated mean = (mean - shift) / scale, std = std / scale.
        std_ref: persistent buffer [K] (1): each head's mean calibrated std; `nominal=relative_std` divides by it.

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
        self.reset_parameters()

    @property
    def aggregation(self) -> Aggregation:
        """How the heads become one reward; assign an `Aggregation` or its string."""
        return self._aggregation

    @aggregation.setter
    def aggregation(self, value: str | Aggregation) -> None:
        spec = Aggregation.parse(value)
        spec.check_heads(self.num_heads)
        self._aggregation = spec

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights (see the class) and reset the calibration, which was measured on the old weights."""
        k, deviation = self.num_heads, 1.0 / math.sqrt(self.hidden_size + 1)
        self.weight[:k].normal_(0.0, deviation, generator=generator)
        self.weight[k:].normal_(0.0, INITIAL_STD_SPREAD * deviation, generator=generator)
        self.bias[:k].zero_()
        self.bias[k:].fill_(math.log(math.expm1(INITIAL_STD)))
        self.reset_calibration()

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
            EnsembleOutput(reward [N], mean [N, K], std [N, K], reward_sum []), calibrated, fp32.

        Raises:
            ValueError: from the op, naming the argument.
        """
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
                aggregation=self._aggregation if aggregation is None else aggregation,
                centre=centre,
                std_floor=self.std_floor,
            )

    def frozen_copy(self) -> EnsembleHead:
        """A copy with the same weights, aggregation and calibration, its parameters frozen."""
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
