"""Train reward heads on cached features, one `preference_step` per batch.

Features of a frozen trunk differ in scale by orders of magnitude between dimensions and between models. The heads are
trained on standardised features, so that one learning rate fits all, and the scaling is folded into the returned head,
which acts on raw features: W' = W / s, b' = b - W m / s.

Centring also keeps std from collapsing. Eq. 8 lowers every std at every step. On features with a nonzero mean, this
moves all D weights along the mean at once, and std reaches its floor in the first epochs. On centred features it moves
the bias alone, by about lr per step, and `max_steps` bounds the number of steps.

The learning rate warms up over 5 % of the steps and decays linearly to 0 (BSR's recipe), so the last epoch is returned:
to choose the best epoch on the held-out pairs would bias the metrics measured on them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...engine.head import EnsembleHead
from ...kernels import Aggregation, EnsembleOutput, nominal_reward, philox_normal, preference_step
from ..evaluation.statistics import pair_correct
from ..job.log import RunLog
from .config import BradleyTerryConfig, BRMEConfig, FitConfig
from .head_training import HeadTraining, schedule
from .losses import bradley_terry, brme, partition

__all__ = [
    "BRMEConfig",
    "BradleyTerryConfig",
    "Fit",
    "FitConfig",
    "PairFeatures",
    "fit_heads",
    "pair_metrics",
    "schedule",
    "standardise",
    "step_noise",
]


_CACHED_BYTES = 4 << 30  # up to this size all standardised features are kept in fp32; above, per batch


class PairFeatures(NamedTuple):
    """Features of P pairs: chosen, rejected [P, D]; p_hat, margin [P] or None; prompts [P] integer labels or None."""

    chosen: Tensor
    rejected: Tensor
    p_hat: Tensor | None = None
    margin: Tensor | None = None
    prompts: Tensor | None = None


class Fit(NamedTuple):
    """head: acts on raw features, not calibrated. history: one dict of numbers per epoch."""

    head: EnsembleHead
    history: list[dict[str, float]]


class Scaling(NamedTuple):
    """x -> (x - shift) * inverse, [D] fp32; inverse is 0 for a dimension that is constant on the training set."""

    shift: Tensor
    inverse: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features.to(torch.float32, copy=True).sub_(self.shift).mul_(self.inverse)

    def fold_into(self, head: EnsembleHead) -> EnsembleHead:
        """The head for raw features that equals `head` on scaled ones: W' = W / s, b' = b - W (m / s)."""
        folded = EnsembleHead(
            head.hidden_size, head.num_heads, aggregation=head.aggregation, std_floor=head.std_floor
        ).to(head.weight.device)
        with torch.no_grad():
            weight = head.weight.double() * self.inverse
            folded.weight.copy_(weight)
            folded.bias.copy_(head.bias - weight @ self.shift.double())
        return folded


def standardise(*features: Tensor) -> Scaling:
    """The scaling that gives the rows of all `features` [N, D] mean 0 and std 1 in every dimension; fp64 sums."""
    blocks = [block for f in features for block in _blocks(f)]
    rows = sum(map(len, blocks))
    mean, variance = (
        torch.zeros(features[0].shape[1], dtype=torch.float64, device=features[0].device) for _ in range(2)
    )
    for block in blocks:
        mean += block.double().sum(dim=0)
    mean /= rows
    for block in blocks:
        variance += (block.double() - mean).square_().sum(dim=0)
    std = (variance / rows).sqrt()
    constant = std <= 1e-6 * mean.abs()  # a constant dimension: its spread is rounding
    inverse = torch.where(constant, torch.zeros_like(std), 1.0 / std)
    return Scaling(mean.float(), inverse.float())


def _blocks(features: Tensor) -> tuple[Tensor, ...]:
    """Split the rows into blocks whose fp64 copy stays in a processor's cache."""
    blocks: tuple[Tensor, ...] = features.split(max(1, (1 << 18) // max(1, features[:1].numel())))
    return blocks


def _total(features: Tensor) -> float:
    """The sum in fp64; not finite if some element is not. One transfer from a GPU."""
    return float(torch.stack([block.sum(dtype=torch.float64) for block in _blocks(features)]).sum())


def fit_heads(
    chosen: Tensor,
    rejected: Tensor,
    config: FitConfig,
    *,
    p_hat: Tensor | None = None,
    margin: Tensor | None = None,
    evaluation: PairFeatures | tuple[Tensor, Tensor] | None = None,
    aggregation: str | Aggregation | None = None,
    log: RunLog | None = None,
    progress: bool = True,
    checkpoint: Path | str | None = None,
) -> Fit:
    """Train reward heads on the features of P pairs by AdamW. Equal inputs and configs give equal bits.

    Args:
        chosen, rejected: [P, D] features, any floating dtype, on the device to train on.
        p_hat: [P] in (0, 1), stage 1's probability that chosen wins; required in stage "brme", refused in "bt".
        margin: [P], in stage "bt" alone.
        evaluation: held-out pairs, evaluated after every epoch.
        aggregation: of the returned head; None: "mean" for stage "bt", "tradeoff:0.4" for "brme".
        log: receives every epoch's numbers, prefixed with the stage.
        checkpoint: file that holds the state after every epoch; if it exists, training resumes from it.

    Raises:
        ValueError: for inputs outside the above; for a checkpoint of another config or other data; for a loss that is
            not finite (the previous epoch's checkpoint is kept).
    """
    data = PairFeatures(chosen, rejected, p_hat, margin)
    held_out = None if evaluation is None else PairFeatures(*evaluation)
    _check(data, config)
    if held_out is not None:
        check_features(held_out.chosen, held_out.rejected, "evaluation ", dim=chosen.shape[1])
    state = _State(data, config, aggregation, None if checkpoint is None else Path(checkpoint))
    bar = tqdm(
        total=state.epochs, initial=state.epoch, desc=f"{config.stage} heads", unit="epoch", disable=not progress
    )
    with bar:
        for epoch in range(state.epoch, state.epochs):
            row = {"epoch": float(epoch + 1), **state.train_epoch(epoch)}
            if held_out is not None and held_out.chosen.shape[0]:
                with torch.no_grad():
                    out = state.scaled_head(torch.cat([held_out.chosen, held_out.rejected]))
                measured = pair_metrics(out, config, held_out.p_hat, held_out.margin)
                row.update({f"eval_{name}": value for name, value in measured.items()})
            state.finish_epoch(row)
            if log is not None:
                log.metrics(state.step, row, prefix=config.stage)
            bar.update()
            bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "eval_accuracy_mean") if k in row})
    return Fit(state.scaling.fold_into(state.head), state.history)


class _State(HeadTraining):
    """Fresh heads on standardised features, trained epoch by epoch."""

    def __init__(
        self, data: PairFeatures, config: FitConfig, aggregation: str | Aggregation | None, checkpoint: Path | None
    ) -> None:
        self.data, self.config = data, config
        pairs, dim = data.chosen.shape
        device = data.chosen.device
        self.scaling = standardise(data.chosen, data.rejected)
        small = 2 * pairs * dim * 4 <= _CACHED_BYTES
        self.scaled = self.scaling(torch.cat([data.chosen, data.rejected])) if small else None
        self.p_hat, self.margin = (
            None if t is None else t.to(device, torch.float32) for t in (data.p_hat, data.margin)
        )
        spec = aggregation or ("mean" if config.stage == "bt" else "tradeoff:0.4")
        head = EnsembleHead(dim, config.num_heads, aggregation=spec, std_floor=config.std_floor)
        head.reset_parameters(torch.Generator().manual_seed(config.seed))  # drawn on the CPU: the same on every device
        self.assigned = partition(pairs, config.num_heads, config.seed).to(device)
        identity = {"config": config.model_dump(mode="json"), "pairs": pairs, "data": _digest(data)}
        super().__init__(head.to(device), pairs, config, config.stage, identity, checkpoint)

    def scaled_head(self, features: Tensor) -> EnsembleOutput:
        return self.head(self.scaling(features))  # type: ignore[no-any-return]

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the shuffled pairs: mean loss, last learning rate and, of stage brme, mean std."""
        numbers, rate = self.steps_of(epoch, self._gradient)
        loss, *std = numbers.double().mean(dim=0).tolist()
        return {"loss": loss, "lr": rate, **({"std": std[0]} if std else {})}

    def _gradient(self, index: Tensor, step: int) -> Tensor:
        config, data = self.config, self.data
        if self.scaled is None:
            features, rows = self.scaling(torch.cat([data.chosen[index], data.rejected[index]])), None
        else:
            features, rows = self.scaled, torch.cat([index, index + self.pairs])
        sampled = config.stage == "brme" and config.noise == "sampled"
        out = preference_step(
            features,
            self.head.weight,
            self.head.bias,
            loss=config.stage,
            rows=rows,
            head_id=None if self.p_hat is None else self.assigned[index],
            p_hat=None if self.p_hat is None else self.p_hat[index],
            margin=None if self.margin is None else self.margin[index],
            alpha=config.alpha,
            seed=_noise_key(config.seed, step, index.device) if sampled else None,
            bsr=config.bsr,
            std_floor=config.std_floor,
        )
        self.head.weight.grad, self.head.bias.grad = out.dweight, out.dbias
        return torch.stack([out.loss] if out.std is None else [out.loss, out.std])


def step_noise(seed: int, step: int, rows: int, heads: int, *, device: torch.device) -> Tensor:
    """[rows, heads] N(0, 1) of one step: Philox keyed by (seed, step), the same on every device and after a resume."""
    return philox_normal(_noise_key(seed, step, device), rows, heads)


def _noise_key(seed: int, step: int, device: torch.device) -> Tensor:
    return torch.tensor([(seed << 32) + step], device=device)


@torch.no_grad()
def pair_metrics(
    out: EnsembleOutput, config: FitConfig, p_hat: Tensor | None = None, margin: Tensor | None = None
) -> dict[str, float]:
    """Compute metrics of P scored pairs; `out` has 2P rows, chosen first.

    Returns the accuracies of the nominal (least std), mean and worst reward, where a tie counts as wrong; the stage's
    loss; and the mean std. Eq. 8 is averaged over all heads, because none was trained on these pairs.
    """
    pairs, heads = out.mean.shape[0] // 2, out.mean.shape[1]
    rewards = {"mean": out.mean.mean(dim=1)}
    if heads > 1:
        rewards["nominal"] = nominal_reward(out.mean, out.std, Aggregation("nominal"))
        rewards["worst"] = out.mean.min(dim=1).values
    result = {
        f"accuracy_{name}": float(pair_correct(reward[:pairs], reward[pairs:]).double().mean())
        for name, reward in rewards.items()
    }
    if config.stage == "bt":
        result["loss"] = float(bradley_terry(rewards["mean"][:pairs], rewards["mean"][pairs:], margin))
    elif p_hat is not None:
        every = torch.arange(heads, device=out.mean.device)
        losses = [brme(out.mean, out.std, p_hat, head.expand(pairs), config.alpha) for head in every]
        result["loss"] = float(torch.stack(losses).mean())
    result["std"] = float(out.std.mean())
    return result


def _check(data: PairFeatures, config: FitConfig) -> None:
    check_features(data.chosen, data.rejected, "")
    pairs = data.chosen.shape[0]
    if config.num_heads > pairs:
        raise ValueError(f"num_heads: expected at most the number of pairs ({pairs}), got {config.num_heads}")
    for name, value in (("p_hat", data.p_hat), ("margin", data.margin)):
        if value is not None and tuple(value.shape) != (pairs,):
            raise ValueError(f"{name}: expected shape [{pairs}], got {list(value.shape)}")
    if (data.p_hat is None) == (config.stage == "brme"):
        got = "none" if data.p_hat is None else "one"
        raise ValueError(f"p_hat: expected for stage 'brme' only, got {got} for stage {config.stage!r}")
    if data.margin is not None and (config.stage == "brme" or not bool(data.margin.isfinite().all())):
        raise ValueError("margin: expected finite values, for stage 'bt' only")
    # in float32, as eq. 8 reads them: 1 - 1e-9 is 1 there
    if data.p_hat is not None and not bool(((data.p_hat.float() > 0) & (data.p_hat.float() < 1)).all()):
        raise ValueError(
            f"p_hat: expected values in (0, 1), got {float(data.p_hat.min())} to {float(data.p_hat.max())}"
        )


def check_features(chosen: Tensor, rejected: Tensor, what: str, dim: int | None = None) -> None:
    if chosen.dim() != 2 or (dim is not None and chosen.shape[1] != dim):
        raise ValueError(f"{what}chosen: expected shape [P, {dim or 'D'}], got {list(chosen.shape)}")
    if rejected.shape != chosen.shape:
        raise ValueError(f"{what}rejected: expected chosen's shape {list(chosen.shape)}, got {list(rejected.shape)}")
    if chosen.shape[0] == 0 and dim is None:
        raise ValueError("pairs: expected at least one pair, got 0")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if len(value) and not math.isfinite(_total(value)):
            rows = (~value.isfinite().all(dim=1)).nonzero()  # none if finite values overflow the sum
            if len(rows):
                raise ValueError(f"{what}{name}: expected finite features, got NaN or infinity in row {int(rows[0])}")


def _digest(data: PairFeatures) -> list[float]:
    """Sums that distinguish this data from other data, to refuse the checkpoint of another run."""
    return [_total(t) for t in data if t is not None]
