"""Inputs for the tests of the native library, and the results to compare with: fp64 reference and plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prudent.kernels.ensemble_reward import cpu, reference
from prudent.kernels.ensemble_reward.contract import Inputs, OutputGrads, Outputs
from prudent.kernels.ensemble_reward.trust import measure, price

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPECS = [
    "tradeoff:0.4", "tradeoff:0", "tradeoff:1", "nominal", "mean", "min", "max", "median", "lcb:1", "uwo:0.5",
    "softmin:0.3", "cvar:0.4", "cvar:1", "head:1", "tradeoff:0.3,nominal=relative_std", "tradeoff:0.3,nominal=mean",
    "nominal,nominal=head:1", "tradeoff:0.4,source=mean", "lcb:2,source=mean",
]  # fmt: skip
ALL = (True, True, True, True)
NO_REGION: dict[str, Any] = dict.fromkeys(Inputs._fields[14:])


def backward(execution: Any, grads: Any, inputs: Inputs, needs: Any) -> Any:
    """The execution's gradients, from its own forward's saved tensor."""
    return execution.backward(OutputGrads(*grads), inputs, execution.forward(inputs, True)[-1], needs)


def make(
    dtype: torch.dtype = torch.float32, *, n: int = 37, d: int = 577, k: int = 5, weight_dtype: Any = torch.float32,
    **changes: Any,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(n * d + k)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    values: dict[str, Any] = {
        "hidden": rand(n, d).to(dtype), "weight": (rand(2 * k, d) / d**0.5).to(weight_dtype), "bias": rand(2 * k),
        "rows": None, "norm_weight": (1 + 0.1 * rand(d)).to(dtype), "seed": torch.tensor([2**62 + 12345]),
        "shift": rand(k), "scale": rand(k).abs() + 0.5, "std_ref": rand(k).abs() + 0.5, "group": None, "group_size": 0,
        "norm_eps": 1e-6, "std_floor": 1e-3, "aggregation": "tradeoff:0.4",
    }  # fmt: skip
    return Inputs(**(values | changes))


def region(d: int = 577, rank: int = 3, **changes: Tensor) -> dict[str, Tensor]:
    """A trust region's fields of `Inputs`: distances of about 1, a negative weight, a mean as large as the spread."""
    g = torch.Generator().manual_seed(d + rank)
    directions = torch.linalg.qr(torch.randn(d, max(1, min(rank, d)), generator=g)).Q.T
    directions = directions.repeat(rank, 1)[:rank] if rank else directions[:0]
    weights = torch.tensor([0.3, -0.1 / d] * rank)[:rank]
    values = {
        "mean": torch.randn(d, generator=g), "precision": (0.2 + torch.rand(d, generator=g)) / d,
        "directions": directions, "weights": weights / max(1, rank), "unit": torch.tensor([0.6]),
        "rms": torch.tensor([1.1]),
    }  # fmt: skip
    return {f"trust_{name}": value for name, value in (values | changes).items()}


def double(inputs: Inputs) -> Inputs:
    return Inputs(*[v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs])


def plain(inputs: Inputs) -> Outputs:
    """The usual composition: norm and linear layer in the storage type, as in transformers, then fp32 heads."""
    x = inputs.hidden if inputs.rows is None else inputs.hidden[inputs.rows]
    if inputs.norm_weight is not None:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=1, keepdim=True) + inputs.norm_eps)
        x = inputs.norm_weight * y.to(x.dtype)
    z = F.linear(x, inputs.weight.to(x.dtype)).float()
    identity, spec = torch.eye(z.shape[1]), inputs.spec
    free = str(replace(spec, trust=None, trust_from=0.0, trust_power=2))
    heads = inputs._replace(hidden=z, weight=identity, norm_weight=None, rows=None, aggregation=free, **NO_REGION)
    if inputs.trust is None:
        return reference.forward(heads)
    reward, mean, std, total, _, saved = reference.forward(heads)
    directions = inputs.trust.directions.to(x.dtype)
    distance = measure(x.float(), inputs.trust._replace(directions=directions)).distance
    if spec.trust is not None:
        lost = price(distance, inputs.trust.unit, spec)
        reward, total = reward - lost + reference.group_mean(lost, inputs), total - lost.sum()
    return reward, mean, std, total, distance, saved


def some_grads(inputs: Inputs) -> OutputGrads:
    g = torch.Generator().manual_seed(5)
    n, k = inputs.num_rows, inputs.num_heads
    given = [torch.randn(shape, generator=g) for shape in ((n,), (n, k), (n, k), ())]
    return OutputGrads(*given, None if inputs.trust is None else torch.randn(n, generator=g))


def same(found: Iterable[Tensor | None], wanted: Iterable[Tensor | None]) -> bool:
    """Whether two results have the same bits, and None in the same places."""
    return all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(found, wanted, strict=True)
    )


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max()) if exact.numel() else 0.0


def check_forward(inputs: Inputs) -> None:
    got, exact, lowly = cpu.forward(inputs), reference.forward(double(inputs)), plain(inputs)
    for name, a, b, c in zip(("reward", "mean", "std", "reward_sum"), got[:4], exact[:4], lowly[:4], strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        # reward_sum adds N rewards, and so their errors
        tolerance = 2e-5 * (1 + (inputs.num_rows if name == "reward_sum" else 0))
        assert error(a, b) <= error(c, b) + tolerance, name
        assert error(a, b) <= 2 * tolerance, f"{name}: not fp32-grade"
    if got[4] is not None and exact[4] is not None and lowly[4] is not None:
        tolerance = 2e-6 * float(exact[4].max()) if exact[4].numel() else 0.0
        assert error(got[4], exact[4]) <= error(lowly[4], exact[4]) + tolerance, "distance"
        assert error(got[4], exact[4]) <= 5 * tolerance, "distance: not fp32-grade"


def check_backward(inputs: Inputs, grads: Any = None, needs: tuple[bool, ...] = ALL) -> None:
    grads = some_grads(inputs) if grads is None else grads
    needs = tuple(n and t is not None for n, t in zip(needs, targets(inputs), strict=True))
    got = backward(cpu, grads, inputs, needs)
    exact = backward(reference, [g if g is None else g.double() for g in grads], double(inputs), needs)
    lowly = plain_backward(inputs, grads)
    for name, a, b, c, target in zip(("hidden", "weight", "bias", "norm_weight"), got, exact, lowly, targets(inputs),
                                     strict=True):  # fmt: skip
        assert (a is None) == (b is None), name
        if a is None or b is None or b.numel() == 0:
            continue
        assert a.dtype == target.dtype
        assert a.shape == b.shape
        grain = max(torch.finfo(a.dtype).eps, 2e-5) * float(b.abs().max())  # one rounding to its type, or fp32's sums
        assert error(a, b) <= grain, name
        # autograd's own is NaN where a spread has its kink
        assert c is None or c.isnan().any() or error(a, b) <= error(c, b) + grain, name


def targets(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return inputs.hidden, inputs.weight, inputs.bias, inputs.norm_weight


def plain_backward(inputs: Inputs, grads: Any) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in targets(inputs)]
    hidden, weight, bias, norm_weight = leaves
    outputs = plain(inputs._replace(hidden=hidden, weight=weight, bias=bias, norm_weight=norm_weight))[:5]
    pairs = [(o, g) for o, g in zip(outputs, OutputGrads(*grads), strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]


OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no noise": {"seed": None},
    "no norm": {"norm_weight": None},
    "no bias": {"bias": None},
    "bare": {"norm_weight": None, "bias": None, "seed": None, "shift": None, "scale": None, "std_ref": None},
    "repeating rows": {"rows": torch.tensor([36, 0, 0, 7, 12, 0, 36, 1] * 5)},
    "increasing rows": {"rows": torch.tensor([0, 3, 4, 20, 36])},
    "strided rows": {"rows": torch.arange(37)[::3]},
    "weight in bf16": {"weight_dtype": torch.bfloat16, "norm_weight": None},
    "weight in bf16, norm in fp32": {"weight_dtype": torch.bfloat16, "norm_weight": torch.linspace(0.5, 2, 577)},
    "weight in fp16": {"weight_dtype": torch.float16},
    "strided vectors": {
        "bias": torch.randn(10, 2)[:, 0],
        "shift": torch.ones(1).expand(5),
        "scale": torch.ones(15)[::3],
    },
    "batch centring": {"aggregation": "tradeoff:0.4,centre=batch"},
    "centring by size": {"aggregation": "min,centre=group", "group_size": 5, "n": 35},
    "centring by label": {"aggregation": "lcb:1,centre=group", "group": torch.tensor([0, 30, 2, 2, 0] * 7 + [36, 3])},
}
