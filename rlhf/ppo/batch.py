"""Samples, the tensors of a forward pass over them, and the results of scoring them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """N sampled responses; the samples of one prompt are adjacent.

    prompts       N lists of ids up to where the response begins (samples of a prompt share one list)
    responses     N lists of drawn ids, with the stop token if one was drawn; at least one token each
    stopped       N: whether the last id is a drawn stop token (False: cut at max_new_tokens)
    prompt_index  N: number of the prompt in the run's list of prompts
    texts         N responses as texts, if the ids were made from texts; None: decode the ids
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    stopped: list[bool]
    prompt_index: list[int]
    texts: list[Any] | None = None


class TokenBatch(NamedTuple):
    """One forward pass over B sequences with R response tokens in all.

    input_ids       [B, T] int64, right padded; packed: [1, S], the sequences one after another
    position_ids    the same shape; restart at 0 for each sequence
    attention_mask  [B, T] int64, 1 for a token; None when packed: positions tell the sequences apart
    rows            [R] int64 into hidden.view(-1, D): the states that predict the response tokens
    targets         [R] int64: the response tokens
    sequence        [R] int64: which of the B sequences
    offset          [R] int64: its index in its response
    last            [B] int64 into hidden.view(-1, D): the last token read, after `closing`: where rewards are read
    first           [B] int64 into hidden.view(-1, D): the first token of what a reward reads as the response, which
                    ends at `last`

    Response tokens are sorted by `sequence`, then `offset`.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    targets: Tensor
    sequence: Tensor
    offset: Tensor
    last: Tensor
    first: Tensor

    def response(self) -> Tensor:
        """[B, T] bool: the tokens that a reward reads as the response; packed: [B, S]."""
        place = torch.arange(self.input_ids.numel(), device=self.last.device).view(self.input_ids.shape)
        return (place >= self.first[:, None]) & (place <= self.last[:, None])


@dataclass(frozen=True, eq=False)
class Scored:
    """N samples with their log-probabilities, values and rewards: N rows, T the longest response; fp32, on one device.

    Entries without a token (`mask` False) are 0.
    """

    samples: Samples
    mask: Tensor  # [N, T] bool: the token was drawn, the stop token included
    logprob: Tensor  # [N, T] of the sampling policy, at the sampling temperature
    ref_logprob: Tensor  # [N, T] of the reference, at the same temperature
    entropy: Tensor  # [N, T] nats, of the sampling policy
    value: Tensor | None  # [N, T] the critic's, before each token; None: the policy has no critic
    reward: Tensor  # [N] aggregated, before penalty, clip and centring; NaN where scoring failed
    nominal: Tensor | None = None  # [N] BRME's nominal reward; None: the reward has one head or none
    worst: Tensor | None = None  # [N] the lowest head's mean; None: as for `nominal`
    head_mean: Tensor | None = None  # [N, K]; None: the reward has no heads
    head_std: Tensor | None = None  # [N, K]; None: the reward has no heads
    distance: Tensor | None = None  # [N] 1 = the edge of the reward's trust region; None: it has none


@dataclass(frozen=True, eq=False, kw_only=True)
class Experience(Scored):
    """Scored samples with the advantages and targets that the update learns from; see `advantages.shape`."""

    score: Tensor  # [N] what the estimator uses: after penalty, clip and centring; NaN where dropped
    advantage: Tensor  # [N, T]; 0 where dropped
    returns: Tensor | None  # [N, T] the critic's targets; None: the estimator fits no critic
    dropped: Tensor  # [N] bool: left out of the update
    kl: Tensor  # [N] sum of log pi / pi_ref over the response, nats


def sequence_length(samples: Samples, index: int, closing: int = 0) -> int:
    """Tokens of sample `index` in `token_batch` with `closing` closing ids."""
    prompt, response = len(samples.prompts[index]), len(samples.responses[index])
    return prompt + response + closing - (samples.stopped[index] or not closing)


def token_batch(
    samples: Samples,
    indices: Sequence[int],
    *,
    closing: Sequence[int] = (),
    packed: bool,
    device: torch.device | str,
) -> TokenBatch:
    """Make the tensors of one forward pass over the samples `indices`, in that order.

    With `closing`, a sequence is prompt + response + closing, and closing replaces a drawn stop token: a reward is then
    read at the same kind of token whether the response ended or was cut off, see `sampling.turn.Turn`. The stop token
    is still a target. Without `closing`, a sequence is prompt + response without the last token, which predicts
    nothing.

    Raises:
        ValueError: for no sample, an empty prompt or an empty response.
    """
    if not len(indices):
        raise ValueError("samples: expected at least one in a batch, got none")
    sequences, targets = [], []
    for index in indices:
        prompt, response = samples.prompts[index], samples.responses[index]
        if not prompt or not response:
            part = "response" if prompt else "prompt"
            raise ValueError(f"samples: expected at least one token in every {part}, got none in that of row {index}")
        read = response[:-1] if samples.stopped[index] or not closing else response
        sequences.append([*prompt, *read, *closing])
        targets.append(response)
    lengths = torch.tensor([len(ids) for ids in sequences])
    counts = torch.tensor([len(ids) for ids in targets])
    first = torch.tensor([len(samples.prompts[index]) - 1 for index in indices])  # predicts a response's first token
    width = int(lengths.max())
    if packed:
        start = lengths.cumsum(0) - lengths
        input_ids = torch.tensor([[token for ids in sequences for token in ids]])
        position_ids = (torch.arange(input_ids.shape[1]) - start.repeat_interleave(lengths))[None]
        attention_mask = None
    else:
        start = torch.arange(len(sequences)) * width
        # any id serves as padding: no token attends to later ones
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
        position_ids = torch.arange(width).expand(len(sequences), width).contiguous()
        attention_mask = (position_ids < lengths[:, None]).long().to(device)
    sequence = torch.arange(len(sequences)).repeat_interleave(counts)
    offset = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    return TokenBatch(
        input_ids.to(device),
        position_ids.to(device),
        attention_mask,
        ((start + first)[sequence] + offset).to(device),
        torch.tensor([token for ids in targets for token in ids]).to(device),
        sequence.to(device),
        offset.to(device),
        (start + lengths - 1).to(device),
        (start + torch.minimum(first + 1, lengths - 1)).to(device),
    )


def micro_batches(
    samples: Samples, indices: Sequence[int], budget_tokens: int, packed: bool, closing: int = 0
) -> list[list[int]]:
    """Cut `indices` into batches of at most `budget_tokens` tokens (padding counted unless packed), longest first.

    A sample longer than the budget is a batch of its own. The cut depends only on the samples' lengths and indices.
    """
    lengths = {index: sequence_length(samples, index, closing) for index in indices}
    batches: list[list[int]] = []
    used = 0  # tokens of the last batch, if packed
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches:
            tokens = used + lengths[index] if packed else (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if tokens <= budget_tokens:
                batches[-1].append(index)
                used += lengths[index]
                continue
        batches.append([index])
        used = lengths[index]
    return batches


def response_mask(samples: Samples, device: torch.device | str) -> Tensor:
    """[N, T] bool: True where the response has a token; T is the longest response."""
    if not samples.responses:
        raise ValueError("samples: expected at least one, got none")
    counts = torch.tensor([len(response) for response in samples.responses])
    return (torch.arange(int(counts.max())) < counts[:, None]).to(device)
