"""PPO's update: epochs of minibatches over one step's experience, with gradients accumulated over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...kernels.linear_logprob.contract import LogprobOutput
from .batch import Experience, TokenBatch, micro_batches, sequence_length, token_batch
from .config import PPOConfig
from .losses import chi2_estimate, chi2_price, kl_estimate, policy_loss, sequence_sum, value_loss

At = tuple[Tensor, Tensor]  # row and column of each response token in an experience's [N, T] tables


class Trainable(Protocol):
    """What the update needs of a `Policy`."""

    packed: bool

    def hidden(self, batch: TokenBatch, role: Any) -> Tensor: ...
    def logprobs(self, hidden: Tensor, batch: TokenBatch, temperature: float) -> LogprobOutput: ...
    def values(self, hidden_rows: Tensor) -> Tensor: ...
    def parameter_groups(self, config: PPOConfig) -> list[dict[str, Any]]: ...
    def train(self, mode: bool = True) -> Any: ...
    @property
    def training(self) -> bool: ...


def open_optimizer(policy: Trainable, config: PPOConfig) -> torch.optim.Optimizer:
    """AdamW over `policy.parameter_groups(config)`: torch's, or bitsandbytes' with 8-bit moments, paged or not.

    Raises:
        ImportError: naming the extra, if update.optimizer needs bitsandbytes and it is not installed.
    """
    groups, chosen = policy.parameter_groups(config), config.update
    for group in groups:
        group["initial_lr"] = group["lr"]
    if chosen.optimizer == "adamw":
        on_gpu = all(p.is_cuda for group in groups for p in group["params"])
        # fused, because on a GPU the unfused form makes temporary copies of every trained parameter
        return torch.optim.AdamW(groups, weight_decay=chosen.weight_decay, fused=on_gpu)
    try:
        import bitsandbytes  # type: ignore[import-not-found]
    except ImportError:
        message = f"update.optimizer {chosen.optimizer} needs bitsandbytes: pip install 'prudent[bitsandbytes]'"
        raise ImportError(message) from None
    kind = bitsandbytes.optim.AdamW8bit if chosen.optimizer == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, weight_decay=chosen.weight_decay)
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, config: PPOConfig, step: int) -> None:
    """Set each group's rate in step `step` (from 0) of the loop: its own times min(1, (step + 1) / update.warmup).

    The rate depends on the step alone, so a resumed run has nothing to restore.
    """
    share = min(1.0, (step + 1) / max(1, config.update.warmup))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def update(
    policy: Trainable,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PPOConfig,
    *,
    kl_coef: float,
    generator: torch.Generator,
    progress: bool = False,
) -> dict[str, float]:
    """Train the policy and its critic by PPO on one step's experience.

    An epoch cuts the samples that are not dropped, shuffled, into update.minibatches of nearly equal numbers of rows;
    each is one optimizer step on

        mean over tokens of [policy_loss + value_coef value_loss - entropy_coef entropy + kl_coef KL (kl.place loss)]
        + kl.chi2 sqrt(chi^2)                                                   of the minibatch's sequences

    A minibatch goes through the model in micro-batches of at most update.micro_tokens tokens, one autograd graph at a
    time. Each micro-batch's loss is divided by the tokens of the whole minibatch, so the gradients add up to that of
    one big batch, whatever the lengths. sqrt(chi^2) is not a sum over micro-batches: if kl.chi2 is above 0 and there
    are several, an extra forward pass without gradient measures the minibatch's chi^2 under the current policy, which
    gives the slope of the square root for all micro-batches. The ratios of the sampling policy would cost nothing, but
    are right only for the first optimizer step.

    If the minibatch's mean KL(sampling || updated) per token is above update.max_kl, its step is not made and the
    update ends. A step whose loss or gradient is not finite is skipped and counted.

    With policy.lora_dropout above 0 the ratios do not start at 1, because samples are scored without dropout and
    trained on with it: some are clipped, and KL(sampling || updated) is above 0, before the first step.

    Args:
        policy: its mode (train, eval) is restored afterwards.
        experience: from `shape`.
        kl_coef: the present KL coefficient; read only with kl.place loss, because `shape` applies it to the reward.
        generator: on the CPU; decides the minibatches and what dropout drops. torch's own generators are restored.
        progress: show a bar over tokens on stderr.

    Returns:
        policy/loss, policy/clip_fraction, value/loss   means over the minibatches
        policy/update_kl      nats per token, KL(sampling || updated) before the last minibatch's step
        policy/grad_norm      before clipping, mean over the steps made
        update/epochs         minibatches processed / minibatches per epoch
        update/steps, update/skipped   optimizer steps made, and skipped: for a number that was not finite, or because
                              every sample was dropped
        NaN if there is nothing to measure; value/loss only with a critic to fit.
    """
    kept = torch.nonzero(~experience.dropped)[:, 0].tolist()
    gradient = MinibatchGradient(policy, experience, config, kl_coef)
    count = min(config.update.minibatches, len(kept))
    tokens = sum(sequence_length(experience.samples, row) for row in kept) * config.update.epochs
    tally = Tally(count)
    if not kept:
        tally.skipped = config.update.epochs * config.update.minibatches
    training = policy.training
    policy.train()
    try:
        with (
            _dropout_seed(generator, experience.mask.device),
            tqdm(total=tokens, desc="update", unit="tok", unit_scale=True, disable=not progress, leave=False) as bar,
        ):
            for rows in _minibatches(kept, count, config.update.epochs, generator):
                if not minibatch_step(gradient, optimizer, rows, tally, bar):
                    break
    finally:
        policy.train(training)
        optimizer.zero_grad(set_to_none=True)
    return tally.metrics(value=gradient.critic != "none")


def _minibatches(kept: list[int], count: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield all rows `epochs` times, each time shuffled and cut into `count` parts whose sizes differ by at most 1."""
    for _ in range(epochs):
        order = [kept[i] for i in torch.randperm(len(kept), generator=generator).tolist()]
        for part in range(count):
            yield order[part * len(order) // count : (part + 1) * len(order) // count]


@contextmanager
def _dropout_seed(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from, from ours; restore them afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Means(NamedTuple):
    """Means over the tokens of a minibatch, or a micro-batch's share of them; `loss` is what was differentiated."""

    loss: float
    policy: float
    clipped: float
    kl: float
    value: float


def minibatch_step(
    gradient: MinibatchGradient, optimizer: torch.optim.Optimizer, rows: list[int], tally: Tally, bar: Any
) -> bool:
    """Compute a minibatch's gradient and make its step, unless it is skipped; return whether the update continues."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    means = gradient(rows, bar)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, gradient.config.update.max_grad_norm))
    if not (math.isfinite(means.loss) and math.isfinite(norm)):
        tally.skipped += 1
        return True
    limit = gradient.config.update.max_kl
    if limit is not None and means.kl > limit:
        tally.means.append(means)
        return False
    optimizer.step()
    tally.means.append(means)
    tally.norms.append(norm)
    return True


class MinibatchGradient:
    """The gradient of a minibatch, one micro-batch at a time."""

    def __init__(self, policy: Trainable, experience: Experience, config: PPOConfig, kl_coef: float) -> None:
        self.policy = policy
        self.experience = experience
        self.config = config
        self.kl_coef = kl_coef if config.kl.place == "loss" else 0.0
        self.critic = config.critic if experience.returns is not None else "none"
        self.packed = policy.packed

    def __call__(self, rows: list[int], bar: Any) -> Means:
        """Add the gradient of the minibatch `rows` to `.grad`."""
        samples, weight = self.experience.samples, self.config.kl.chi2
        micros = micro_batches(samples, rows, self.config.micro_tokens, self.packed)
        tokens = sum(len(samples.responses[row]) for row in rows)
        # the slope of the square root needs the mean over the whole minibatch
        chi2 = self._chi2(micros) if weight > 0 and len(micros) > 1 else None
        total = torch.zeros(len(Means._fields), dtype=torch.float64, device=self.experience.mask.device)
        for indices in micros:
            total += self.micro_batch(*self._batch(indices), tokens, len(rows), chi2)
            bar.update(sum(sequence_length(samples, row) for row in indices))
        return Means(*total.tolist())

    def micro_batch(self, batch: TokenBatch, at: At, tokens: int, sequences: int, chi2: float | None) -> Tensor:
        """Add one micro-batch's share of the gradient to `.grad`; reads nothing back from the device.

        Args:
            batch, at: the forward pass, and the places of its response tokens in the experience's [N, T] tables.
            tokens, sequences: numbers in the whole minibatch.
            chi2: the minibatch's estimate, if kl.chi2 is above 0; None: this micro-batch's own (read back).

        Returns:
            [5] fp64: its share of `Means`.
        """
        config, update = self.config, self.config.update
        hidden = self.policy.hidden(batch, "actor")
        out = self.policy.logprobs(hidden, batch, config.rollout.temperature)
        loss, means = self._policy_loss(out, batch, at, tokens)
        if config.kl.chi2 > 0:
            terms = self._chi2_terms(out.logprob, batch, at)
            _, slope = chi2_price(float(terms.detach().mean()) if chi2 is None else chi2)
            loss = loss + config.kl.chi2 * slope * terms.sum() / sequences
        value = loss.new_zeros(())
        if self.critic == "shared":
            value = self._value_loss(hidden, batch, at, tokens)
            loss = loss + update.value_coef * value
        loss.backward()
        whole = loss.detach()
        if self.critic == "adapter":
            # after the actor's backward pass: one graph at a time
            value = self._value_loss(self.policy.hidden(batch, "critic"), batch, at, tokens)
            (update.value_coef * value).backward()
            whole = whole + update.value_coef * value.detach()
        return torch.stack([number.detach().double() for number in (whole, *means, value)])

    def _batch(self, indices: list[int]) -> tuple[TokenBatch, At]:
        device = self.experience.mask.device
        batch = token_batch(self.experience.samples, indices, packed=self.packed, device=device)
        return batch, (torch.tensor(indices, device=device)[batch.sequence], batch.offset)

    def _policy_loss(
        self, out: LogprobOutput, batch: TokenBatch, at: At, tokens: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the loss terms that are means over tokens; and surrogate, clip fraction, KL(sampling || updated)."""
        experience, update = self.experience, self.config.update
        old = experience.logprob[at]
        surrogate, clipped = policy_loss(out.logprob, old, experience.advantage[at], update.clip)
        loss = surrogate.sum() / tokens
        means = loss, clipped.sum() / tokens, kl_estimate(old - out.logprob.detach(), "k3").sum() / tokens
        if update.entropy_coef > 0:
            loss = loss - update.entropy_coef * out.entropy.sum() / tokens
        if self.kl_coef > 0:
            price = kl_estimate(out.logprob - experience.ref_logprob[at], self.config.kl.estimator)
            loss = loss + self.kl_coef * price.sum() / tokens
        return loss, means

    def _value_loss(self, hidden: Tensor, batch: TokenBatch, at: At, tokens: int) -> Tensor:
        experience = self.experience
        assert experience.returns is not None
        assert experience.value is not None
        values = self.policy.values(hidden[batch.rows])
        clip = self.config.update.value_clip
        return value_loss(values, experience.value[at], experience.returns[at], clip).sum() / tokens

    def _chi2_terms(self, logprob: Tensor, batch: TokenBatch, at: At) -> Tensor:
        log_ratio = logprob - self.experience.ref_logprob[at]
        longest = self.experience.mask.shape[1]
        return chi2_estimate(sequence_sum(log_ratio, batch.sequence, batch.offset, len(batch.last), longest))

    @torch.no_grad()
    def _chi2(self, micros: list[list[int]]) -> float:
        """The minibatch's chi^2 under the current policy."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.experience.mask.device), 0
        for indices in micros:
            batch, at = self._batch(indices)
            out = self.policy.logprobs(self.policy.hidden(batch, "actor"), batch, self.config.rollout.temperature)
            total += self._chi2_terms(out.logprob, batch, at).sum()
            count += len(indices)
        return float(total) / count


class Tally:
    """Counts and means of an update's minibatches."""

    def __init__(self, minibatches: int) -> None:
        self.minibatches = minibatches
        self.means: list[Means] = []
        self.norms: list[float] = []
        self.skipped = 0

    def metrics(self, value: bool) -> dict[str, float]:
        processed = len(self.norms) + self.skipped if self.minibatches else 0  # without a sample there is no epoch
        metrics = {
            "policy/loss": _mean([m.policy for m in self.means]),
            "policy/clip_fraction": _mean([m.clipped for m in self.means]),
            "policy/update_kl": self.means[-1].kl if self.means else math.nan,
            "policy/grad_norm": _mean(self.norms),
            "update/epochs": processed / max(1, self.minibatches),
            "update/steps": float(len(self.norms)),
            "update/skipped": float(self.skipped),
        }
        return {**metrics, "value/loss": _mean([m.value for m in self.means])} if value else metrics


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan
