"""Train our reward model in TRL's RewardTrainer: BRME's loss for K heads, or the exact Bradley-Terry head.

TRL's own RewardTrainer takes an `EnsembleRewardModel` as it is, and fits the aggregated reward by Bradley-Terry. Here
are the two trainings that need more than the aggregated reward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

try:
    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference
except ImportError as error:
    raise ImportError(f"BRMETrainer is for TRL, which cannot be imported ({error}): pip install trl") from error

from ...engine import Scorer
from ...engine.eval_mode import evaluating
from ..evaluation.statistics import group_labels
from ..reward.convex import RidgeFit, fit_ridge
from ..reward.losses import brme, partition

_COLUMNS = ("p_hat", "head")


def brme_columns(dataset: Any, stage1: Scorer, num_heads: int, *, seed: int = 0) -> Any:
    """A preference data set with the two columns that BRME's loss reads: `p_hat` and `head`.

    Args:
        dataset: of `datasets`, with the columns chosen and rejected, and prompt or not: texts or messages.
        stage1: scores with the trained Bradley-Terry model (BRME's stage 1), not calibrated: p_hat (eq. 2) is the
            sigmoid of its reward difference.
        num_heads: K; each pair trains one head, drawn by `seed` (appendix B.2).
    """
    sides = []
    for side in ("chosen", "rejected"):
        rewards = stage1.score([_item(row, side) for row in dataset], aggregation="mean").reward
        if None in rewards:
            raise ValueError(f"brme_columns: {side}: expected finite rewards, got {rewards.count(None)} that are not")
        sides.append(torch.tensor(rewards, dtype=torch.float64))
    p_hat = torch.sigmoid(sides[0] - sides[1])
    heads = partition(len(p_hat), num_heads, seed)
    return dataset.add_column("p_hat", p_hat.tolist()).add_column("head", heads.tolist())


def _item(row: Mapping[str, Any], side: str) -> Any:
    if row.get("prompt") is not None:
        return {"prompt": row["prompt"], "response": row[side]}
    return row[side]


class _Collator(DataCollatorForPreference):
    """TRL's, with `p_hat` [P] fp32 and `head` [P] int64."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["p_hat"] = torch.tensor([example["p_hat"] for example in examples], dtype=torch.float32)
        batch["head"] = torch.tensor([example["head"] for example in examples], dtype=torch.int64)
        return batch


class BRMETrainer(RewardTrainer):
    """RewardTrainer with BRME's eq. 8 (arXiv 2409.15360) in place of Bradley-Terry on the aggregated reward.

    Its metrics are RewardTrainer's, of the aggregated reward, and `std`, the mean of the heads' stds. The data set
    needs the columns that `brme_columns` adds, the evaluation's too.

    Args:
        alpha: width of the targets, +-alpha / 2 (eq. 8); the default is that of `prudent train`.
        arguments: RewardTrainer's.
    """

    def __init__(self, *arguments: Any, alpha: float = 4.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alpha = alpha
        own: Any = self.data_collator
        self.data_collator: Any = _Collator(pad_token_id=own.pad_token_id, pad_to_multiple_of=own.pad_to_multiple_of)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*dict.fromkeys([*self._signature_columns, *_COLUMNS])]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Eq. 8 in closed form, a mean over the batch's pairs."""
        p_hat, head = inputs.pop("p_hat"), inputs.pop("head")
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = brme(outputs.mean, outputs.std, p_hat, head, self.alpha)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["std"].append(outputs.std.detach().mean().item())
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def fit_exact_head(trainer: RewardTrainer, **options: Any) -> RidgeFit:
    """Replace the model's heads by the exact Bradley-Terry head on the trunk's features of the training pairs.

    Call it after `trainer.train()`, or instead of it to leave the trunk as it is. The model then has one head, whose
    std is a constant without meaning, and the aggregation `mean`. Pairs of one prompt share a fold: the prompt is the
    column of that name, or the messages that chosen and rejected begin with, else each pair is its own.

    Args:
        trainer: TRL's, with an `EnsembleRewardModel` that reads the last token.
        options: of `convex.fit_ridge` (grid, folds, seed, ...).
    """
    model, data = trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset
    collate, size = trainer.data_collator, trainer.args.per_device_train_batch_size
    chosen, rejected = [], []
    device = model.get_input_embeddings().weight.device
    with evaluating(model):
        for start in tqdm(range(0, len(data), size), desc="features", unit="batch", delay=1):
            batch = collate([data[row] for row in range(start, min(start + size, len(data)))])
            features = model.features(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            sides = features.cpu().chunk(2)
            chosen.append(sides[0])
            rejected.append(sides[1])
    fitted = fit_ridge(torch.cat(chosen), torch.cat(rejected), _prompts(data), **options)
    model.score = fitted.head.to(device)
    model.config.num_heads, model.config.aggregation = 1, str(fitted.head.aggregation)
    return fitted


def _prompts(data: Any) -> Tensor:
    """[P] int64: a label of each pair's prompt."""
    return group_labels(str(_prompt(row, place)) for place, row in enumerate(data))


def _prompt(row: Mapping[str, Any], place: int) -> Any:
    if row.get("prompt") is not None:
        return json.dumps(row["prompt"])
    chosen: Sequence[Any] | str | None = row.get("chosen")
    return place if chosen is None or isinstance(chosen, str) else json.dumps(chosen[:-1])
