"""The training loop of heads on cached features: shuffled epochs, learning-rate schedule, a checkpoint every epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...engine.head import EnsembleHead
from ...engine.weights import reading_weights
from ..job.files import atomic_file

logger = logging.getLogger(__name__)


class LoopConfig(Protocol):
    """The fields of `FitConfig` and `PETConfig` that the loop uses."""

    @property
    def epochs(self) -> int: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def seed(self) -> int: ...


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate at `step` of `total`: linear warm-up over a share of the steps, then linear decay."""
    rising = warmup * total
    if step + 1 < rising:
        return (step + 1) / rising
    return (total - step) / max(total - rising, 1.0) if step > rising else 1.0


class HeadTraining:
    """Train a head with AdamW on P pairs, and keep the state that a checkpoint holds.

    Args:
        head: on the device of the features; a bias that requires a gradient is trained, without weight decay.
        pairs: P.
        stage: its name in errors.
        identity: fingerprint of config and data; only a checkpoint with the same fingerprint is resumed.
        checkpoint: file that holds the state after every epoch; if it exists, training resumes from it.
    """

    def __init__(
        self,
        head: EnsembleHead,
        pairs: int,
        config: LoopConfig,
        stage: str,
        identity: dict[str, Any],
        checkpoint: Path | None,
    ) -> None:
        self.head, self.pairs, self.checkpoint = head, pairs, checkpoint
        self._loop, self._stage, self._identity = config, stage, json.dumps(identity)
        decayed = {"params": [head.weight], "weight_decay": config.weight_decay}
        undecayed = {"params": [p for p in [head.bias] if p.requires_grad], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([decayed, undecayed], lr=config.lr)
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.before: dict[str, float] = {}  # measured before the first epoch, if at all
        self.steps_per_epoch = -(-pairs // config.batch_size)
        steps = config.epochs * self.steps_per_epoch
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)

    @property
    def step(self) -> int:
        """Number of optimizer steps taken."""
        return min(self.epoch * self.steps_per_epoch, self.total_steps)

    def steps_of(self, epoch: int, gradient: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, float]:
        """One pass over the shuffled pairs.

        Args:
            gradient: (pairs [B] int64, step) -> [m] detached: the loss, then other numbers to report. It sets the
                gradients of the head's parameters, which are None when it is called.

        Returns:
            The numbers [steps, m], still on the device, because to read them at every step would make a GPU wait; and
            the last step's learning rate.
        """
        config, device = self._loop, self.head.weight.device
        generator = torch.Generator().manual_seed((config.seed << 32) + epoch)
        order = torch.randperm(self.pairs, generator=generator).to(device)
        first = epoch * self.steps_per_epoch
        rows, rate = [], 0.0
        for step, index in zip(range(first, self.total_steps), order.split(config.batch_size), strict=False):
            rate = config.lr * schedule(step, self.total_steps, config.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            rows.append(gradient(index, step))
            self.optimizer.step()
        numbers = torch.stack(rows)
        self._refuse_nonfinite(numbers[:, 0], epoch)
        return numbers, rate

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Add the epoch's numbers to the history and write the checkpoint."""
        self.epoch += 1
        self.history.append(row)
        if self.checkpoint is None:
            return
        state = {
            "identity": self._identity,
            "epoch": self.epoch,
            "history": self.history,
            "before": self.before,
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.checkpoint) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)  # errors of a stream give the reason; those of torch's own writer do not

    def _load(self, checkpoint: Path) -> None:
        try:
            with reading_weights(checkpoint):
                saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except ValueError as error:
            logger.warning("%s: the stage restarts", error)
            return
        if saved["identity"] != self._identity:
            theirs, ours = json.loads(saved["identity"]), json.loads(self._identity)
            other = [name for name in ours if theirs.get(name) != ours[name]]
            raise ValueError(
                f"checkpoint {checkpoint}: expected one of this run, got one with another {' and '.join(other)}"
            )
        self.epoch, self.history, self.before = saved["epoch"], saved["history"], saved["before"]
        self.head.load_state_dict(saved["head"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _refuse_nonfinite(self, losses: Tensor, epoch: int) -> None:
        bad = (~losses.isfinite()).nonzero()
        if len(bad) or not all(p.isfinite().all() for p in self.head.parameters()):
            step = epoch * self.steps_per_epoch + (int(bad[0]) if len(bad) else len(losses) - 1)
            kept = f"; the state after epoch {epoch} is kept in {self.checkpoint}" if self.checkpoint and epoch else ""
            raise ValueError(
                f"{self._stage}: training stopped: the loss is not finite at step {step} (epoch {epoch + 1}); "
                f"a lower lr than {self._loop.lr:g} may help{kept}"
            )
