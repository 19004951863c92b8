"""Train a trunk with PET: rank the samples with the current model at every step, then score the best ones again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....engine import EnsembleHead, EnsembleRewardModel
from ....engine.eval_mode import evaluating
from ....engine.scorer import micro_batches
from ....engine.text import Encoded
from ...evaluation.statistics import pair_correct
from ...job.log import RunLog
from ..config import TrunkConfig
from ..trunk import TrunkTrainer, padded, train_with
from .config import PETConfig
from .objective import PETLoss, best_samples, pet_loss, takes_rejected


class PETTexts(NamedTuple):
    """What the model reads of P pairs and of n reference samples for each of X prompts; see `PETFeatures`.

    chosen, rejected  P texts
    prompt            P numbers: each pair's row in `samples`; -1: no samples, for Bradley-Terry alone
    samples           X lists of n texts
    reference         X texts, one more sample of each prompt; for `reference: sample`
    margin            P numbers, of the Bradley-Terry loss
    """

    chosen: list[Encoded]
    rejected: list[Encoded]
    prompt: list[int]
    samples: list[list[Encoded]]
    reference: list[Encoded] | None = None
    margin: list[float] | None = None


class PETTrainer(TrunkTrainer):
    """PET's objective on the model's aggregated reward. A step ranks all samples of its pairs' prompts.

    batch_tokens: tokens in one forward pass of the ranking, padding included.
    """

    def __init__(
        self, *args: Any, data: PETTexts, held_out: PETTexts, pet: PETConfig, batch_tokens: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, stage="pet", **kwargs)
        self.data, self.held_out, self.pet, self.batch_tokens = data, held_out, pet, batch_tokens
        for module in self.model.modules():
            if isinstance(module, EnsembleHead) and module.num_heads == 1:
                module.bias.requires_grad_(False)  # it cancels: its gradient is rounding, which Adam would amplify

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective on the pairs of one micro-batch."""
        step = self.state.global_step * self.args.gradient_accumulation_steps + self._micro
        found, _ = self._objective(model, self.data, inputs["row"].tolist(), step)
        return (found.loss, found) if return_outputs else found.loss

    def _objective(self, model: Any, data: PETTexts, rows: list[int], step: int) -> tuple[PETLoss, Tensor]:
        """The objective on the pairs `rows`, and which of them are ranked correctly."""
        config, pairs = self.pet, len(rows)
        own = [data.prompt[row] for row in rows]
        prompts = sorted({prompt for prompt in own if prompt >= 0})
        best = self._best(model, [data.samples[prompt] for prompt in prompts])
        parts = [[data.chosen[row] for row in rows], [data.rejected[row] for row in rows]]
        parts.append([data.samples[prompt][i] for prompt, i in zip(prompts, best, strict=True)])
        if config.reference == "sample":
            assert data.reference is not None
            parts.append([data.reference[prompt] for prompt in prompts])
        rewards = _rewards(model, [text for part in parts for text in part])
        chosen, rejected, winners, *drawn = rewards.split([len(part) for part in parts])
        sampled = torch.tensor([prompt >= 0 for prompt in own], device=rewards.device)
        inverse = torch.tensor([prompts.index(p) for p in own if p >= 0], dtype=torch.int64, device=rewards.device)
        if drawn:
            reference = drawn[0][inverse]
        else:
            reference = torch.where(takes_rejected(step, pairs, config).to(rewards.device), rejected, chosen)[sampled]
        margin = None if data.margin is None else chosen.new_tensor([data.margin[row] for row in rows])
        found = pet_loss(winners[inverse], reference, chosen, rejected, config, margin)
        return found, pair_correct(chosen.detach(), rejected.detach())

    def _best(self, model: Any, samples: list[list[Encoded]]) -> list[int]:
        """The number of the best of each prompt's n samples, ranked without gradient and dropout."""
        if not samples:
            return []
        flat = [text for texts in samples for text in texts]
        order = sorted(range(len(flat)), key=lambda i: (-len(flat[i].ids), i))
        rewards = torch.empty(len(flat))
        with evaluating(model):
            for part in micro_batches([len(flat[i].ids) for i in order], self.batch_tokens):
                rewards[order[part]] = _rewards(model, [flat[i] for i in order[part]]).cpu()
        return best_samples(rewards.view(len(samples), -1)).tolist()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure loss, gap, Bradley-Terry loss and accuracy on the held-out pairs."""
        data, size = self.held_out, self.args.per_device_eval_batch_size
        parts: list[Tensor] = []
        with evaluating(self.model):
            for rows in torch.arange(len(data.chosen)).split(size):
                found, correct = self._objective(self.model, data, rows.tolist(), 0)
                numbers = [*(float(number) for number in found), float(correct.double().mean())]
                parts.append(len(rows) * torch.tensor(numbers, dtype=torch.float64))
        means = (torch.stack(parts).sum(dim=0) / len(data.chosen)).tolist()
        names = ("loss", "gap", "bt", "accuracy")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in zip(names, means, strict=True)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _rewards(model: Any, texts: Sequence[Encoded]) -> Tensor:
    """[N] rewards, by the model's own aggregation."""
    batch = padded([text.ids for text in texts], [text.start for text in texts])
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    rewards: Tensor = model(**inputs).logits[:, 0]
    return rewards


def _collate(rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
    return {"row": torch.tensor([row["row"] for row in rows])}


def train_pet_trunk(
    model: EnsembleRewardModel,
    data: PETTexts,
    held_out: PETTexts,
    pet: PETConfig,
    config: TrunkConfig,
    folder: Path,
    *,
    batch_tokens: int,
    lora: Path | None = None,
    log: RunLog | None = None,
    resume: bool = False,
    progress: bool = True,
) -> EnsembleRewardModel:
    """Make the model's aggregated reward pessimistic by a LoRA on its trunk and its heads; see `train_trunk`.

    model: with the heads to start from, changed in place; a single head without its calibration.
    """

    def trainer(wrapped: Any, arguments: Any) -> TrunkTrainer:
        return PETTrainer(
            model=wrapped,
            args=arguments,
            data_collator=_collate,
            train_dataset=[{"row": row} for row in range(len(data.chosen))],
            eval_dataset=[{"row": row} for row in range(len(held_out.chosen))] or None,
            data=data,
            held_out=held_out,
            pet=pet,
            batch_tokens=batch_tokens,
            run_log=log,
        )

    options: dict[str, Any] = {"evaluates": bool(held_out.chosen), "lora": lora, "resume": resume}
    return train_with(trainer, model, pet.seed, config, "lora", folder, progress=progress, **options)
