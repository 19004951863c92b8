"""What a step's samples are worth: log-probabilities, values and rewards, in micro-batches without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...engine.eval_mode import evaluating
from ...kernels import nominal_reward
from .batch import Experience, Samples, TokenBatch, micro_batches, response_mask, sequence_length, token_batch
from .config import PPOConfig
from .policy.policy import Policy
from .update import AUTO_MICRO_TOKENS

if TYPE_CHECKING:
    from .rewards.resolve import RewardSource


def score(
    policy: Policy,
    reward: RewardSource | None,
    samples: Samples,
    config: PPOConfig,
    *,
    closing: Sequence[int] = (),
    progress: bool = False,
) -> Experience:
    """Experience of `samples`, up to `reward`; the rest is for `shape`.

    Two forward passes of the trunk: the reference's, whose hidden states also give the ensemble's rewards where the
    policy's reward is `shared`, and the actor's, which give the values where the critic is. A critic or a reward with a
    LoRA of its own is one more pass each. Probabilities and entropies are those at the sampling temperature, of the
    whole vocabulary.

    Args:
        reward: asked where the policy has no reward of its own (`policy.reward_kind` None).
        samples: as drawn.
        config: `update.micro_tokens` bounds the tokens of one forward pass, `rollout.temperature` is read.
        closing: ids read after every response by a reward on the trunk; see `token_batch`.
        progress: a bar over tokens on stderr.

    Raises:
        ValueError: for an empty prompt or response, or where there is no reward at all. A reward that is not finite is
            NaN in the result.
    """
    if policy.reward_kind is None and reward is None:
        raise ValueError("reward: expected a source, because the policy has none of its own, got none")
    work = _Work(policy, samples, config, closing)
    count = len(samples.responses)
    micro = config.update.micro_tokens
    budget = AUTO_MICRO_TOKENS if micro == "auto" else micro
    tokens = sum(sequence_length(samples, i, len(closing)) for i in range(count))
    with (
        evaluating(policy),
        tqdm(total=tokens, desc="score", unit="tok", unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        for indices in micro_batches(samples, range(count), budget, policy.packed, len(closing)):
            work.frozen(indices)
            work.trained(indices)
            bar.update(sum(sequence_length(samples, i, len(closing)) for i in indices))
    if policy.reward_kind is None:
        assert reward is not None
        scored = reward(samples)
        work.take_rewards(slice(None), scored.reward, scored.mean, scored.std, scored.nominal, scored.worst)
    return work.experience


class _Work:
    """The experience as it fills."""

    def __init__(self, policy: Policy, samples: Samples, config: PPOConfig, closing: Sequence[int]) -> None:
        self.policy, self.samples, self.config, self.closing = policy, samples, config, closing
        mask = response_mask(samples, policy.device)
        self.experience = Experience(
            samples=samples,
            mask=mask,
            logprob=_zeros(mask),
            ref_logprob=_zeros(mask),
            entropy=_zeros(mask),
            value=None if policy.value_head is None else _zeros(mask),
            reward=torch.full_like(mask[:, 0], float("nan"), dtype=torch.float32),
        )

    def frozen(self, indices: list[int]) -> None:
        """Reference log-probabilities, and the rewards of heads on the trunk."""
        policy = self.policy
        closing = () if policy.reward_kind is None else self.closing
        batch = self._batch(indices, closing)
        hidden = policy.hidden(batch, "reference")
        logprob = policy.logprobs(hidden, batch, self.config.rollout.temperature, "reference").logprob
        _put(self.experience.ref_logprob, indices, batch, logprob)
        if policy.reward_head is None:
            return
        if policy.reward_kind == "adapter":
            hidden = policy.hidden(batch, "reward")
        head = policy.reward_head
        scored = head(hidden, batch.last, centre="none")
        mean, std = scored.mean, scored.std
        usable = (mean.isfinite() & std.isfinite()).all(1)
        reward = torch.where(usable, scored.reward, float("nan"))
        if head.num_heads == 1:
            self.take_rewards(indices, reward, mean, std)
        else:
            nominal = nominal_reward(mean, std, head.aggregation, head.std_ref)
            self.take_rewards(indices, reward, mean, std, nominal, mean.amin(dim=1))

    def trained(self, indices: list[int]) -> None:
        """Log-probabilities and entropies of the policy that sampled, and values."""
        policy, experience = self.policy, self.experience
        batch = self._batch(indices, ())
        hidden = policy.hidden(batch, "actor")
        out = policy.logprobs(hidden, batch, self.config.rollout.temperature)
        _put(experience.logprob, indices, batch, out.logprob)
        _put(experience.entropy, indices, batch, out.entropy)
        if experience.value is not None:
            if self.config.critic == "adapter":
                hidden = policy.hidden(batch, "critic")
            _put(experience.value, indices, batch, policy.values(hidden.index_select(0, batch.rows)))

    def _batch(self, indices: list[int], closing: Sequence[int]) -> TokenBatch:
        policy = self.policy
        return token_batch(self.samples, indices, closing=closing, packed=policy.packed, device=policy.device)

    def take_rewards(
        self,
        rows: list[int] | slice,
        reward: Tensor,
        mean: Tensor | None,
        std: Tensor | None,
        nominal: Tensor | None = None,
        worst: Tensor | None = None,
    ) -> None:
        """Write rewards [n] and what the heads said [n, K] into `rows`."""
        experience, count = self.experience, len(self.samples.responses)
        given = {"reward": reward, "nominal": nominal, "worst": worst, "head_mean": mean, "head_std": std}
        for name, tensor in given.items():
            if tensor is None:
                continue
            whole = getattr(experience, name)
            if whole is None:
                whole = experience.reward.new_full((count, *tensor.shape[1:]), float("nan"))
                setattr(experience, name, whole)
            whole[rows] = tensor.detach().to(whole)
        experience.reward[~experience.reward.isfinite()] = float("nan")


def _zeros(mask: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=torch.float32)


def _put(whole: Tensor, indices: list[int], batch: TokenBatch, numbers: Tensor) -> None:
    """Numbers [R] of the batch's response tokens into [N, T]."""
    rows = torch.tensor(indices).to(whole.device)
    whole[rows[batch.sequence], batch.offset] = numbers.to(whole)
