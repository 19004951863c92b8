"""Score samples: log-probabilities, values and rewards, in micro-batches without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...engine.eval_mode import evaluating
from ...engine.text import Encoded
from .batch import Samples, Scored, TokenBatch, micro_batches, response_mask, sequence_length, token_batch
from .config import PPOConfig
from .policy.policy import Policy
from .rewards.heads import judge
from .rewards.reading import Reading
from .rewards.sources import Rewards, RewardSource


def score(
    policy: Policy,
    reward: RewardSource | None,
    samples: Samples,
    config: PPOConfig,
    *,
    closing: Sequence[int] = (),
    reading: Reading | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> Scored:
    """Compute log-probabilities, values and rewards of `samples`.

    The trunk runs twice: as the reference, whose hidden states also give the rewards of kind shared, and as the actor,
    whose hidden states also give the values of a shared critic. A critic or a reward with a LoRA of its own takes one
    more pass each. Log-probabilities and entropies are at the sampling temperature, over the whole vocabulary.

    Args:
        reward: the source of rewards if the policy has no reward heads (`policy.reward_head` None).
        samples: as drawn.
        config: `update.micro_tokens` bounds the tokens of one forward pass, `rollout.temperature` is read.
        closing: ids read after every response by a reward on the trunk; see `token_batch`.
        reading: encodes samples as that reward was trained to read them. Samples whose ids then differ from prompt,
            response and closing are read once more, by the reward alone. None: no sample is.
        seed: of the noise of sampled rewards; see `heads.judge`. None: the heads' means.
        progress: show a bar over tokens on stderr.

    Raises:
        ValueError: for an empty prompt or response, or without any reward. A reward that is not finite is NaN in the
            result.
    """
    if policy.reward_head is None and reward is None:
        raise ValueError("reward: expected a source, because the policy has no reward heads, got none")
    tables = _Tables(policy, samples, config, closing)
    count = len(samples.responses)
    tokens = sum(sequence_length(samples, i, len(closing)) for i in range(count))
    with (
        evaluating(policy),
        tqdm(total=tokens, desc="score", unit="tok", unit_scale=True, disable=not progress, leave=False) as bar,
    ):
        for indices in micro_batches(samples, range(count), config.micro_tokens, policy.packed, len(closing)):
            tables.read_frozen(indices)
            tables.read_trained(indices)
            bar.update(sum(sequence_length(samples, i, len(closing)) for i in indices))
        if reading is not None:
            tables.read_again(reading.others(samples, closing), config.micro_tokens)
    if policy.reward_head is None:
        assert reward is not None
        return tables.scored(reward(samples, seed))
    assert tables.features is not None
    return tables.scored(judge(policy.reward_head, tables.features, seed))


class _Tables:
    """[N, T] tables, and the features [N, F] that reward heads read, filled one micro-batch at a time."""

    def __init__(self, policy: Policy, samples: Samples, config: PPOConfig, closing: Sequence[int]) -> None:
        self.policy, self.samples, self.config, self.closing = policy, samples, config, closing
        self.mask = response_mask(samples, policy.device)
        zeros = torch.zeros_like(self.mask, dtype=torch.float32)
        self.logprob, self.ref_logprob, self.entropy = zeros, zeros.clone(), zeros.clone()
        self.value = None if policy.value_head is None else zeros.clone()
        self.features: Tensor | None = None
        if policy.reward_head is not None:
            shape = (len(self.mask), policy.reward_head.hidden_size)
            self.features = torch.full(shape, float("nan"), dtype=policy.dtype, device=policy.device)

    def read_frozen(self, indices: list[int]) -> None:
        """Compute reference log-probabilities, and the features that heads on the trunk read."""
        policy, kind = self.policy, self.policy.reward_kind
        batch = self._batch(indices, () if kind is None else self.closing)
        if kind == "shared":
            hidden, features = policy.read(batch, "reference")
            self._keep(indices, features)
        else:
            hidden = policy.hidden(batch, "reference")
        logprob = policy.logprobs(hidden, batch, self.config.rollout.temperature, "reference").logprob
        _put(self.ref_logprob, indices, batch, logprob)
        del hidden
        if kind == "adapter":
            self._keep(indices, policy.read(batch, "reward")[1])

    def read_again(self, sequences: dict[int, Encoded], budget: int) -> None:
        """Replace the features of samples that the heads read as other `sequences`; by NaN for an empty one."""
        policy = self.policy
        assert self.features is not None
        self.features[[row for row, read in sequences.items() if not read.ids]] = float("nan")
        rows = [row for row, read in sequences.items() if read.ids]
        ids = [sequences[row].ids for row in rows]
        behind = torch.tensor([len(sequences[row].ids) - 1 - sequences[row].start for row in rows])
        # each is a prompt whose response is one stop token, so that the heads read the prompt's last id
        alone = Samples(ids, [[0]] * len(rows), [True] * len(rows), rows)
        for part in micro_batches(alone, range(len(rows)), budget, policy.packed):
            batch = token_batch(alone, part, packed=policy.packed, device=policy.device)
            batch = batch._replace(first=batch.last - behind[part].to(batch.last))
            self._keep([rows[i] for i in part], policy.read(batch, "reward")[1])

    def _keep(self, indices: list[int], features: Tensor) -> None:
        assert self.features is not None
        self.features[indices] = features

    def read_trained(self, indices: list[int]) -> None:
        """Compute log-probabilities and entropies of the policy that sampled, and values."""
        policy = self.policy
        batch = self._batch(indices, ())
        hidden = policy.hidden(batch, "actor")
        out = policy.logprobs(hidden, batch, self.config.rollout.temperature)
        _put(self.logprob, indices, batch, out.logprob)
        _put(self.entropy, indices, batch, out.entropy)
        if self.value is not None:
            if self.config.critic == "adapter":
                hidden = policy.hidden(batch, "critic")
            _put(self.value, indices, batch, policy.values(hidden.index_select(0, batch.rows)))

    def _batch(self, indices: list[int], closing: Sequence[int]) -> TokenBatch:
        policy = self.policy
        return token_batch(self.samples, indices, closing=closing, packed=policy.packed, device=policy.device)

    def scored(self, rewards: Rewards) -> Scored:
        """The tables with `rewards` of all samples, in fp32 on the policy's device; a non-finite reward becomes NaN."""
        reward, nominal, worst, mean, std, distance = (None if t is None else t.to(self.logprob) for t in rewards)
        assert reward is not None
        return Scored(
            samples=self.samples,
            mask=self.mask,
            logprob=self.logprob,
            ref_logprob=self.ref_logprob,
            entropy=self.entropy,
            value=self.value,
            reward=torch.where(reward.isfinite(), reward, float("nan")),
            nominal=nominal,
            worst=worst,
            head_mean=mean,
            head_std=std,
            distance=distance,
        )


def _put(whole: Tensor, indices: list[int], batch: TokenBatch, numbers: Tensor) -> None:
    """Write numbers [R] of the batch's response tokens into `whole` [N, T]."""
    rows = torch.tensor(indices).to(whole.device)
    whole[rows[batch.sequence], batch.offset] = numbers.to(whole)
