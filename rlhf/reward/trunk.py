"""Train a trunk with its reward heads on preference pairs, by LoRA or in full, with transformers.Trainer."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...engine import EnsembleHead, EnsembleRewardModel
from ...kernels import EnsembleOutput
from ..evaluation.statistics import hidden_norms
from ..job.files import atomic_folder, read_json, writing
from ..job.log import RunLog
from ..models.adapter import load_lora, peft_hushed, save_lora
from .config import TrunkConfig
from .fit import FitConfig, pair_metrics, step_noise
from .losses import bradley_terry, brme, bsr

logger = logging.getLogger(__name__)

__all__ = ["PairTrainer", "TrunkConfig", "TrunkTrainer", "collate", "last_checkpoint", "train_trunk", "train_with"]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows {chosen, rejected: token ids; p_hat, margin: float or None; head: int} of P pairs -> ids and mask [2P, T],
    right padded, chosen first; p_hat, margin [P] float32 if given; head [P] int64.

    chosen_start and rejected_start, where the responses begin, become response_start [2P] int64."""
    sides = ("chosen", "rejected")
    starts = [row[f"{side}_start"] for side in sides for row in rows] if "chosen_start" in rows[0] else None
    batch = padded([row[side] for side in sides for row in rows], starts)
    batch["head"] = torch.tensor([row["head"] for row in rows])
    for name in ("p_hat", "margin"):
        if rows[0][name] is not None:
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    return batch


def _read_by_model(batch: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch of `collate` that the reward model takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "response_start") if name in batch}


def padded(sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Token ids of N texts -> input_ids and attention_mask [N, T], right padded, and response_start [N] if `starts`
    says where the responses begin."""
    length = max(map(len, sequences))
    # any id can pad: the model uses the mask
    ids = torch.tensor([[*s, *[0] * (length - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch if starts is None else {**batch, "response_start": torch.tensor(starts)}


class TrunkTrainer(Trainer):
    """transformers.Trainer that logs to the run, with the norms of hidden states, and refuses a loss that is not
    finite.

    stage: its name in logs and errors. The last forward pass of a loss on P pairs begins with the P chosen and the P
    rejected texts.
    """

    def __init__(self, *args: Any, stage: str, run_log: RunLog | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage, self.run_log = stage, run_log
        self.model: Any
        self._norms: Tensor | None = None
        self._micro = 0  # number of the micro-batch in its step
        self._logged: list[dict[str, float]] = []
        for module in self.model.modules():
            if isinstance(module, EnsembleHead):
                module.register_forward_pre_hook(self._keep_norms, with_kwargs=True)

    def _keep_norms(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rows = args[0], args[1] if len(args) > 1 else kwargs.get("rows")
        hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self._norms = (hidden if rows is None else hidden[rows]).float().norm(dim=1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step."""
        self._micro = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Make Trainer's step; also record the norms of the hidden states, and refuse a loss that is not finite."""
        pairs = len(inputs["head" if "head" in inputs else "row"])
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._micro += 1
        if not bool(loss.isfinite()):
            kept = last_checkpoint(Path(str(self.args.output_dir)))
            raise ValueError(
                f"{self.stage}: training stopped: the loss is not finite at step {self.state.global_step}; "
                f"a lower trunk.lr than {self.args.learning_rate:g} may help; "
                + ("no checkpoint was written yet" if kept is None else f"the last good checkpoint is {kept}")
            )
        assert self._norms is not None
        self._logged.append(hidden_norms(self._norms[:pairs], self._norms[pairs : 2 * pairs]))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; also write to the run's log."""
        if "loss" in logs and self._logged:
            rows, self._logged = self._logged, []
            logs = {**logs, **{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}}
        super().log(logs, start_time)
        if self.run_log is not None and self.is_world_process_zero():
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            self.run_log.metrics(self.state.global_step, numbers, prefix=self.stage)


class PairTrainer(TrunkTrainer):
    """The loss of stage 1 or stage 2 on preference pairs.

    Micro-batch means are averaged over accumulation steps and ranks, as Trainer does. `losses.bsr_scope`: "micro"
    squares each micro-batch's reward sum (what the paper's code does); "global" squares the sum over all micro-batches
    of a step on all ranks, which takes one more forward pass of each, without gradient.
    """

    def __init__(self, *args: Any, losses: FitConfig, **kwargs: Any) -> None:
        super().__init__(*args, stage=losses.stage, **kwargs)
        self.losses = losses
        self._window: Tensor | None = None  # reward sum and number of pairs of the whole step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the stage on one micro-batch of `collate`."""
        config, pairs = self.losses, len(inputs["head"])
        out = model(**_read_by_model(inputs))
        reward = out.mean.mean(dim=1)
        if config.stage == "bt":
            loss = bradley_terry(reward[:pairs], reward[pairs:], inputs.get("margin"))
        else:
            noise = None
            if config.noise == "sampled":
                # each micro-batch and rank of a step has its own noise
                ranks = self.args.world_size
                micro = self.state.global_step * self.args.gradient_accumulation_steps + self._micro
                draw = micro * ranks + self.args.process_index
                noise = step_noise(config.seed, draw, *out.mean.shape, device=out.mean.device)
            loss = brme(out.mean, out.std, inputs["p_hat"], inputs["head"], config.alpha, noise)
        if config.bsr:
            loss = loss + self._bsr(reward.sum(), pairs)
        return (loss, out) if return_outputs else loss

    def _bsr(self, reward_sum: Tensor, pairs: int) -> Tensor:
        if self._window is None:
            return bsr(reward_sum, pairs, self.losses.bsr)
        # With S the step's sum and B its pairs, the gradient of lam / (4B) S^2 is lam / (2B) S times the gradient of
        # each micro-batch's sum. Trainer and the all-reduce average over micro-batches and ranks, so we multiply by
        # their number. The detached half corrects the value.
        total, count = self._window
        shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        coefficient = self.losses.bsr / (2 * count) * total * shares
        penalty: Tensor = coefficient * (reward_sum - reward_sum.detach() / 2)
        return penalty

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step. Global BSR needs the sum of their rewards before the first backward."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = None
        if self.losses.bsr and self.losses.bsr_scope == "global" and batches:
            sums = torch.zeros(2, device=device)
            with torch.no_grad():
                for batch in batches:
                    inputs = self._prepare_inputs(batch)
                    out = self.model(**_read_by_model(inputs))
                    sums += torch.stack([out.mean.mean(dim=1).sum(), sums.new_tensor(float(len(inputs["head"])))])
            self._window = self.accelerator.reduce(sums, "sum")
        return batches, items

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure accuracy, loss and std on the held-out pairs, over all ranks (`pair_metrics`)."""
        self.model.eval()
        parts: list[tuple[Tensor, ...]] = []
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs, pairs = self._prepare_inputs(batch), len(batch["head"])
            with torch.no_grad():
                out = self.model(**_read_by_model(inputs))
            label = inputs.get("p_hat", inputs.get("margin", torch.zeros(pairs, device=out.mean.device)))
            own = (out.mean[:pairs], out.mean[pairs:], out.std[:pairs], out.std[pairs:], label)
            parts.append(self.accelerator.gather_for_metrics(own))
        self.model.train()
        chosen, rejected, std_c, std_r, label = (torch.cat(column) for column in zip(*parts, strict=True))
        mean, std = torch.cat([chosen, rejected]), torch.cat([std_c, std_r])
        labels = {"p_hat": label} if self.losses.stage == "brme" else {"margin": label}
        output = EnsembleOutput(mean.mean(dim=1), mean, std, mean.sum())
        values = pair_metrics(output, self.losses, **labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in `folder`; a complete one has trainer_state.json, written last."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = read_json(path / "trainer_state.json")["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        cut = next((file for file in sorted(path.rglob("*")) if _is_cut(file)), None)
        if cut is None:
            whole.append((step, str(path)))
        else:
            logger.warning("%s is incomplete: its checkpoint is skipped", cut)
    return max(whole)[1] if whole else None


def _is_cut(file: Path) -> bool:
    """Return whether a file of tensors is truncated; both formats show this without reading the tensors."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return False
        except SafetensorError:
            return True
    return file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file)


def train_trunk(
    model: EnsembleRewardModel,
    train: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    losses: FitConfig,
    config: TrunkConfig,
    mode: Literal["lora", "full"],
    folder: Path,
    *,
    lora: Path | None = None,
    log: RunLog | None = None,
    resume: bool = False,
    progress: bool = True,
) -> EnsembleRewardModel:
    """Train trunk and heads on rows of `collate`, with checkpoints in `folder`.

    In mode lora the LoRA is merged into the returned trunk, and saved unmerged in `folder`/adapter. lora: the adapter/
    of an earlier stage, from whose weights it starts; None: from fresh ones.
    """

    def trainer(wrapped: Any, arguments: TrainingArguments) -> TrunkTrainer:
        return PairTrainer(
            model=wrapped,
            args=arguments,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=held_out or None,
            losses=losses,
            run_log=log,
        )

    options: dict[str, Any] = {"evaluates": bool(held_out), "lora": lora, "resume": resume, "progress": progress}
    return train_with(trainer, model, losses.seed, config, mode, folder, **options)


def train_with(
    make: Callable[[Any, TrainingArguments], TrunkTrainer],
    model: EnsembleRewardModel,
    seed: int,
    config: TrunkConfig,
    mode: Literal["lora", "full"],
    folder: Path,
    *,
    evaluates: bool,
    lora: Path | None,
    resume: bool,
    progress: bool,
) -> EnsembleRewardModel:
    """Train trunk and heads with the trainer that `make` opens; see `train_trunk`."""
    wrapped: Any = _with_lora(model, config, seed, lora) if mode == "lora" else model
    trainer = make(wrapped, _arguments(config, mode, seed, folder, evaluates=evaluates, progress=progress))
    trainer.remove_callback(PrinterCallback if not progress else ProgressCallback)
    if progress:
        trainer.add_callback(_Bar)
    with writing(folder):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    if evaluates:
        trainer.evaluate()
    if mode == "lora":
        with atomic_folder(folder / "adapter") as target:
            save_lora(wrapped, "default", target, trunk_prefix=_prefixes(model))
    trained: EnsembleRewardModel = wrapped.merge_and_unload() if mode == "lora" else model
    trained.requires_grad_(False)
    trained.train(False)
    return trained


def _arguments(
    config: TrunkConfig, mode: Literal["lora", "full"], seed: int, folder: Path, *, evaluates: bool, progress: bool
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"gradient_checkpointing": True} if config.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.lr or (1e-4 if mode == "lora" else 5e-6),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type="linear",
        seed=seed,
        use_cpu=not on_gpu,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.save_every,
        save_steps=config.save_every,
        save_total_limit=2,  # a kill can leave the newest incomplete
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not progress,
        **options,
    )
    # with several GPUs in one process Trainer uses DataParallel, which splits a batch by rows, and so splits pairs
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class _Bar(ProgressCallback):
    """A progress bar that prints no line at logged steps; the numbers are in the run's log."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def _prefixes(model: EnsembleRewardModel) -> tuple[str, str]:
    """The trunk's name in the reward model and in its causal language model, for `save_lora`."""
    return "model", model.model.base_model_prefix


def _with_lora(model: EnsembleRewardModel, config: TrunkConfig, seed: int, start: Path | None) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'prudent[train]'") from None
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        modules_to_save=["score"],  # the heads train in full beside the adapters
    )
    torch.manual_seed(seed)
    prefixes = _prefixes(model)
    with peft_hushed():
        wrapped = get_peft_model(model, lora)
    if start is not None:
        load_lora(wrapped, "default", start, trunk_prefix=prefixes)
    return wrapped
