"""Train PET on cached features: start from a trained head, and rank the samples again at every step.

The head keeps its calibration. The aggregated reward of an ensemble is trained on calibrated heads, because min, argmin
and trade-off depend on the scales between heads. A single head is trained on its own outputs, which are Bradley-Terry
logits; its shift and scale are restored at the end, so that rewards before and after have one unit.

For a single linear head the objective is convex: a max of linear functions, a linear function, and Bradley-Terry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ....engine.head import EnsembleHead
from ....kernels import Aggregation
from ...evaluation.statistics import pair_correct
from ...job.log import RunLog
from ..fit import Scaling, standardise
from ..head_training import HeadTraining
from .config import PETConfig
from .objective import PETLoss, best_samples, pet_loss, takes_rejected

__all__ = ["PETFeatures", "PETFit", "fit_pet", "measure_pet"]

_ROWS = 65536  # samples scored in one call when all are ranked: bounds the fp32 copy


class PETFeatures(NamedTuple):
    """Features of P pairs and of n reference samples for each of X prompts.

    chosen, rejected  [P, D]
    prompt            [P] int64, each pair's row in `samples`; -1: no samples, for Bradley-Terry alone
    samples           [X, n, D]
    reference         [X, D], one more sample of each prompt; for `reference: sample`
    margin            [P], of the Bradley-Terry loss
    """

    chosen: Tensor
    rejected: Tensor
    prompt: Tensor
    samples: Tensor
    reference: Tensor | None = None
    margin: Tensor | None = None


class PETFit(NamedTuple):
    """head: acts on raw features, with the start's calibration. history: one dict of numbers per epoch.
    before, after: `measure_pet` on the training data and, as eval_*, on the held-out data if any."""

    head: EnsembleHead
    history: list[dict[str, float]]
    before: dict[str, float]
    after: dict[str, float]


def fit_pet(
    head: EnsembleHead,
    data: PETFeatures,
    config: PETConfig,
    *,
    aggregation: str | Aggregation | None = None,
    evaluation: PETFeatures | None = None,
    log: RunLog | None = None,
    progress: bool = True,
    checkpoint: Path | str | None = None,
) -> PETFit:
    """Minimise PET's objective, starting from a trained head. Equal inputs and configs give equal bits.

    The expectation over x runs over the prompts of the pairs, so a prompt with more pairs has more weight; both terms
    are computed on every batch of pairs.

    Args:
        head: the trained start, of K heads; not changed.
        data: on the device to train on; any floating dtype.
        aggregation: the reward to make pessimistic; None: the head's own; for one head, its mean. Never centred.
        evaluation: held-out pairs, evaluated after every epoch; its `samples` may be [0, n, D].
        log: receives every epoch's numbers, as pet/NAME.
        checkpoint: file that holds the state after every epoch; if it exists, training resumes from it.

    Raises:
        ValueError: for inputs outside the above, a checkpoint of another config, start or data, or a loss that is not
            finite (the previous epoch's checkpoint is kept).
    """
    _check(head, data, config, "")
    if evaluation is not None:
        _check(head, evaluation, config, "evaluation ")
    state = _State(head, data, config, aggregation, None if checkpoint is None else Path(checkpoint))

    def measured() -> dict[str, float]:
        row = measure_pet(state.reward, data, config)
        if evaluation is not None and len(evaluation.chosen):
            row |= {f"eval_{k}": v for k, v in measure_pet(state.reward, evaluation, config).items()}
        return row

    if not state.before:
        state.before = measured()
        if log is not None:
            log.metrics(0, state.before, prefix="pet/start")
    with tqdm(total=state.epochs, initial=state.epoch, desc="pet", unit="epoch", disable=not progress) as bar:
        for epoch in range(state.epoch, state.epochs):
            row = {"epoch": float(epoch + 1), **state.train_epoch(epoch)}
            if evaluation is not None and len(evaluation.chosen):
                held_out = measure_pet(state.reward, evaluation, config)
                row |= {f"eval_{name}": value for name, value in held_out.items()}
            state.finish_epoch(row)
            if log is not None:
                log.metrics(state.step, row, prefix="pet")
            bar.update()
            bar.set_postfix({k: f"{row[k]:.3f}" for k in ("gap", "bt", "eval_accuracy") if k in row})
    return PETFit(state.folded(), state.history, state.before, measured())


@torch.no_grad()
def measure_pet(reward: Callable[[Tensor], Tensor], data: PETFeatures, config: PETConfig) -> dict[str, float]:
    """loss, gap, bt and the accuracy of `reward` ([N, D] -> [N]) on all data; loss and gap only if some pair has
    samples. `reference: dataset` is its expectation: half with the chosen, half with the rejected responses."""
    chosen, rejected = reward(data.chosen), reward(data.rejected)
    accuracy = float(pair_correct(chosen, rejected).double().mean())
    sampled = data.prompt >= 0
    if not bool(sampled.any()):
        out = pet_loss(chosen[:0], chosen[:0], chosen, rejected, config, data.margin)
        return {"bt": float(out.bt), "accuracy": accuracy}
    step = max(1, _ROWS // data.samples.shape[1])
    best = torch.cat(
        [reward(block.flatten(0, 1)).view(len(block), -1).amax(dim=1) for block in data.samples.split(step)]
    )
    best = best[data.prompt[sampled]]
    if config.reference == "sample":
        assert data.reference is not None
        references = [reward(data.reference)[data.prompt[sampled]]]
    else:
        references = [chosen[sampled], rejected[sampled]][: 1 if config.reference == "chosen" else 2]
    outs = [pet_loss(best, reference, chosen, rejected, config, data.margin) for reference in references]
    loss, gap, bt = (float(torch.stack(column).mean()) for column in zip(*outs, strict=True))
    return {"loss": loss, "gap": gap, "bt": bt, "accuracy": accuracy}


class _State(HeadTraining):
    """The start's head on standardised features, trained epoch by epoch."""

    def __init__(
        self,
        head: EnsembleHead,
        data: PETFeatures,
        config: PETConfig,
        aggregation: str | Aggregation | None,
        checkpoint: Path | None,
    ) -> None:
        self.start, self.data, self.config = head, data, config
        spec = Aggregation.parse(aggregation or head.aggregation) if head.num_heads > 1 else Aggregation("mean")
        self.spec = spec.with_centre("none")
        given = [data.chosen, data.rejected, data.samples.flatten(0, 1), data.reference]
        self.scaling = standardise(*(rows for rows in given if rows is not None and len(rows)))
        scaled = _scaled(head, self.scaling)
        if head.num_heads == 1:  # the bias cancels in differences: its gradient is rounding, which Adam would amplify
            scaled.bias.requires_grad_(False)
        identity = {
            "config": config.model_dump(mode="json"),
            "aggregation": str(self.spec),
            "start": [float(t.sum(dtype=torch.float64)) for t in head.state_dict().values()],
            "data": [float(t.sum(dtype=torch.float64)) for t in data if t is not None],
        }
        super().__init__(scaled, len(data.chosen), config, "pet", identity, checkpoint)

    def reward(self, features: Tensor) -> Tensor:
        """[N, D] raw features -> [N] rewards, of the aggregation that is made pessimistic."""
        result: Tensor = self.head(self.scaling(features), aggregation=self.spec).reward
        return result

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the shuffled pairs; the means of loss, gap and Bradley-Terry loss."""
        numbers, rate = self.steps_of(epoch, self._gradient)
        loss, gap, bt = numbers.double().mean(dim=0).tolist()
        return {"loss": loss, "gap": gap, "bt": bt, "lr": rate}

    def _gradient(self, index: Tensor, step: int) -> Tensor:
        numbers = self.loss(index, step)
        numbers.loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack(numbers).detach()

    def loss(self, index: Tensor, step: int) -> PETLoss:
        """The objective on the pairs `index`: samples are ranked without gradient, the best ones scored with it."""
        data, config, pairs = self.data, self.config, len(index)
        prompt = data.prompt[index]
        sampled = prompt >= 0
        prompts, inverse = prompt[sampled].unique(return_inverse=True)
        samples = data.samples[prompts]  # [U, n, D]
        with torch.no_grad():
            ranked = self.reward(samples.flatten(0, 1)).view(len(prompts), -1) if len(prompts) else samples[:, :, 0]
        winners = samples[torch.arange(len(prompts), device=samples.device), best_samples(ranked)]
        parts = [data.chosen[index], data.rejected[index], winners]
        if config.reference == "sample":
            assert data.reference is not None
            parts.append(data.reference[prompts])
        rewards = self.reward(torch.cat(parts))
        chosen, rejected, best, *drawn = rewards.split([len(part) for part in parts])
        if drawn:
            reference = drawn[0][inverse]
        else:
            reference = torch.where(takes_rejected(step, pairs, config).to(chosen.device), rejected, chosen)[sampled]
        margin = None if data.margin is None else data.margin[index]
        return pet_loss(best[inverse], reference, chosen, rejected, config, margin)

    @torch.no_grad()
    def folded(self) -> EnsembleHead:
        """The head for raw features, with the start's calibration and, in constant dimensions, its weights."""
        varies = self.scaling.inverse > 0
        inverse = self.scaling.inverse.double()
        weight = torch.where(varies, self.head.weight * inverse, self.start.weight.double())
        folded = self.start.frozen_copy()
        folded.weight.copy_(weight)
        folded.bias.copy_(self.head.bias - weight @ self.scaling.shift.double())
        return folded


@torch.no_grad()
def _scaled(head: EnsembleHead, scaling: Scaling) -> EnsembleHead:
    """The head for scaled features that equals `head` on raw ones: W' = W s, b' = b + W m; ready to train."""
    scaled = head.frozen_copy()
    scaled.set_trust(None)  # it lies in raw features
    if head.num_heads == 1:
        scaled.reset_calibration()
    weight, inverse = head.weight.double(), scaling.inverse.double()
    spread = torch.where(inverse > 0, 1.0 / inverse, torch.zeros_like(inverse))
    scaled.weight.copy_(weight * spread)
    scaled.bias.copy_(head.bias + weight @ scaling.shift.double())
    return scaled.requires_grad_(True)


def _check(head: EnsembleHead, data: PETFeatures, config: PETConfig, what: str) -> None:
    pairs, dim = len(data.chosen), head.hidden_size
    if not pairs and not what:
        raise ValueError("pairs: expected at least one pair, got 0")
    prompts = data.samples.shape[0]
    expected = {
        "chosen": [pairs, dim],
        "rejected": [pairs, dim],
        "prompt": [pairs],
        "samples": [prompts, config.samples, dim],
        "reference": [prompts, dim],
        "margin": [pairs],
    }
    for name, shape in expected.items():
        value: Tensor | None = getattr(data, name)
        if value is None:
            continue
        if list(value.shape) != shape:
            raise ValueError(f"{what}{name}: expected shape {shape}, got {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{what}{name}: expected finite values, got NaN or infinity")
    if config.reference == "sample" and data.reference is None:
        raise ValueError(f"{what}reference: expected features [{prompts}, {dim}] with reference sample, got none")
    if pairs and (int(data.prompt.min()) < -1 or int(data.prompt.max()) >= prompts):
        raise ValueError(
            f"{what}prompt: expected rows from -1 to {prompts - 1}, "
            f"got {int(data.prompt.min())} to {int(data.prompt.max())}"
        )
