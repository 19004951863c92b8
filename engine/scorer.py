"""Score texts, chats or token ids; an item's reward, means and stds do not depend on the other items."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels import Aggregation, aggregate, nominal_reward, philox_normal
from .config import max_positions
from .eval_mode import evaluating
from .text import Encoded, Item, ItemEncoder

logger = logging.getLogger(__name__)
_TOKEN = np.dtype(np.int32)
_READ_TOGETHER = 512  # items in a call of the tokeniser, which shares them among its threads


@dataclass(frozen=True)
class Scores:
    """Scores of N items by K heads, in the items' order.

    reward, nominal, worst  lists of N floats; None for an item whose mean, std or reward is not finite
    mean, std               [N, K] fp32 on the CPU, calibrated, with any non-finite numbers
    distance                [N] fp32 on the CPU, from the reference responses, 1 = their 95 % quantile; None if the
                            model has no trust region
    num_nonfinite           how many items have None
    num_truncated           how many items were longer than max_length and lost their beginning
    """

    reward: list[float | None]
    nominal: list[float | None]
    worst: list[float | None]
    mean: Tensor
    std: Tensor
    distance: Tensor | None
    num_nonfinite: int
    num_truncated: int


class HeadScores(NamedTuple):
    """What K heads say of N items, on the CPU, in fp32: mean and std [N, K], distance [N] or None, as in `Scores`."""

    mean: Tensor
    std: Tensor
    distance: Tensor | None
    num_truncated: int = 0


class Scorer:
    """Score texts, chats or token ids on the model's own device, in eval mode and without gradients.

    An item is one of
    - a text: the whole sequence, prompt and response, tokenised with the tokeniser's special tokens;
    - a list of token ids: used unchanged;
    - a list of messages {"role", "content"}, or {"messages": [...]}: rendered by the tokeniser's chat template;
    - {"prompt", "response"}, each a text or a list of messages: with a chat template, texts become a user and an
      assistant message; without one, two texts are concatenated. A prompt may also be {"messages", "tools"}, or
      {"system", "text"}: a system and a user message, or without a template two texts with a blank line between.
    - {"rendered", "prompt"}: a text that a chat template has written already, and its beginning up to the response, if
      it is known; see `rendered.RenderedTexts`.
    - what `read` gave for such an item.
    A mapping may have "tools" for the chat template. A mapping with "complete": False holds a truncated response: its
    turn or text gets no end.

    Messages may have tool calls and reasoning (reasoning_content, thinking or reasoning). A chat template that leaves
    out tools, tool calls, a message's content or the last message's reasoning is refused, as is one that raises.
    Templates that write today's date always get 26 July 2024, so that a text has the same reward on every day.

    Where the response begins matters to a model that reads it (`EnsembleRewardConfig.taps`): at the end
    of what the item's tokens share with those of the prompt alone, its turn opened; of messages, the last one of role
    assistant is the response. A plain text and token ids have no prompt: all of it is the response.

    How a sequence ends: a complete plain text gets the tokeniser's EOS token if the model's `config.append_eos` is true
    and the tokeniser has not added it; a chat template ends its own turns; token ids stay unchanged.

    Sequences are sorted by length and scored in micro-batches of at most `batch_tokens` padded tokens (a longer one
    alone). Equal sequences are scored once. The micro-batches depend on the set of sequences and not on their order, so
    an item's score is bit for bit the same in a shuffled list; in another list it is the same up to the trunk's
    rounding.

    Args:
        model: `EnsembleRewardModel`, or one wrapped by peft.
        tokenizer: a Hugging Face tokeniser; it needs no padding token.
        batch_tokens: tokens in a micro-batch, padding included.
        max_length: longer items lose their beginning, except a BOS or CLS token. None: the smaller of the length that
            the heads were trained on (the model's `config.max_score_length`) and the trunk's number of positions, as
            far as they are known.
        progress: show a progress bar on stderr if scoring takes more than a second.

    Raises:
        ValueError: for a batch_tokens or max_length out of range. From every method: for an item that is empty or has
            another form, or messages that have no chat template or that the template refuses; the error names the item
            by its index.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        progress: bool = True,
    ) -> None:
        limit = max_positions(model.config.text_config)
        if batch_tokens < 1:
            raise ValueError(f"Scorer: batch_tokens: expected a number above 0, got {batch_tokens}")
        if max_length is not None and (max_length < 1 or (limit is not None and max_length > limit)):
            raise ValueError(
                f"Scorer: max_length: expected 1 to {limit or 'any'} (the trunk's positions), got {max_length}"
            )
        if max_length is None:
            max_length = min((n for n in (model.config.max_score_length, limit) if n is not None), default=None)
        self.model = model
        self.batch_tokens = batch_tokens
        self.progress = progress
        self._encoder = ItemEncoder(
            tokenizer,
            append_eos=model.config.append_eos,
            max_length=max_length,
            vocab_size=model.get_input_embeddings().num_embeddings,
            finds_response=model.config.reads_response,
        )

    @property
    def max_length(self) -> int | None:
        """The longest sequence that is not truncated; None: no limit."""
        return self._encoder.max_length

    @property
    def tokenizer(self) -> Any:
        """The tokeniser that reads the items."""
        return self._encoder.tokenizer

    def encode(self, item: Item, name: str = "item") -> list[int]:
        """The token ids that the model reads for this item, truncated to max_length; errors call the item `name`."""
        return self._encoder.encode(item, name)[0]

    def read(self, item: Item, name: str = "item") -> Encoded:
        """`encode`, whether the item was truncated, and where the response begins if the model reads it."""
        return self._encoder.read(item, name)

    def read_all(self, items: Sequence[Item], first: int = 0) -> list[Encoded]:
        """`read` for many items, faster, because the tokeniser gets all their texts at once.

        Raises the error of the first item that cannot be encoded; it is called item `first` + its place.
        """
        return self._encoder.read_all(items, first)

    def features(self, items: Sequence[Item]) -> Tensor:
        """The hidden states the heads read: [N, F] on the CPU in the trunk's dtype, in the items' order."""
        sequences, _ = self._encode_all(items)
        return self._map(sequences, self.model.features, self.model.config.feature_size, self.model.dtype)

    def score(
        self, items: Sequence[Item], *, aggregation: str | Aggregation | None = None, seed: int | None = None
    ) -> Scores:
        """Score items.

        Args:
            items: see the class.
            aggregation: how the heads become one reward; None: the model's own. centre=batch centres over the finite
                rewards of this call; centre=group is an error, because items have no groups.
            seed: sample each head (mean + std * noise) before aggregating; the noise depends on the item's index in the
                list. None: the means are used as samples.

        Returns:
            Scores. `nominal` is the aggregation's nominal reward (by default, as in BRME 5.1, the mean of the head with
            the least std), `worst` the reward of the lowest head, both without a price of distance.

        Raises:
            ValueError: also for an aggregation that prices a distance (`trust=`) which the model does not measure.
        """
        self._spec(aggregation)  # before the forward passes, not after them
        return self.combine(self.heads(items), aggregation=aggregation, seed=seed)

    def heads(self, items: Sequence[Item]) -> HeadScores:
        """What the heads say of the items, before any aggregation; see the class for items and errors."""
        head = self.model.score
        k, measures = head.num_heads, head.trust is not None
        sequences, num_truncated = self._encode_all(items)

        def numbers(input_ids: Tensor, attention_mask: Tensor, start: Tensor | None) -> Tensor:
            output = head(self.model.features(input_ids, attention_mask, start), aggregation="mean")
            far = output.mean[:, :0] if output.distance is None else output.distance[:, None]
            return torch.cat([output.mean, output.std, far], dim=1)

        mean, std, *far = self._map(sequences, numbers, 2 * k + measures, torch.float32).tensor_split((k, 2 * k), dim=1)
        distance = far[0][:, 0].contiguous() if measures else None
        return HeadScores(mean.contiguous(), std.contiguous(), distance, num_truncated)

    def combine(
        self, heads: HeadScores, *, aggregation: str | Aggregation | None = None, seed: int | None = None
    ) -> Scores:
        """Make the rewards of what `heads` found; arguments, result and errors as of `score`."""
        spec, head = self._spec(aggregation), self.model.score
        mean, std, distance, num_truncated = heads
        values = mean
        if seed is not None and spec.source == "sample":
            values = mean + std * philox_normal(torch.tensor([seed]), *mean.shape)
        std_ref = head.std_ref.detach().float().cpu()
        unit = None if head.trust is None else head.trust.unit.cpu()
        finite = (mean.isfinite() & std.isfinite()).all(1)
        reward = torch.full((len(mean),), float("nan"))
        if bool(finite.any()):  # without the others, which would spoil the worst head of the batch
            near = None if distance is None else distance[finite]
            reward[finite] = aggregate(mean[finite], std[finite], values[finite], spec, std_ref, near, unit)
        finite &= reward.isfinite()
        if spec.centre == "batch":
            reward = reward - reward[finite].mean()

        def listed(column: Tensor) -> list[float | None]:
            return [x if good else None for x, good in zip(column.tolist(), finite.tolist(), strict=True)]

        num_nonfinite = int((~finite).sum())
        if num_nonfinite:
            logger.warning("%d of %d items have a reward that is not finite", num_nonfinite, len(mean))
        return Scores(
            reward=listed(reward),
            nominal=listed(nominal_reward(mean, std, spec, std_ref)),
            worst=listed(values.min(dim=1).values),
            mean=mean,
            std=std,
            distance=distance,
            num_nonfinite=num_nonfinite,
            num_truncated=num_truncated,
        )

    def _spec(self, aggregation: str | Aggregation | None) -> Aggregation:
        head = self.model.score
        spec: Aggregation = head.aggregation if aggregation is None else Aggregation.parse(aggregation)
        spec.check_heads(head.num_heads)
        head.check_price(spec)
        if spec.centre == "group":
            raise ValueError(f"Scorer: aggregation: expected centre=none or centre=batch, got {str(spec)!r}")
        return spec

    def _encode_all(self, items: Sequence[Item]) -> tuple[list[_Sequence], int]:
        """Each item as the model reads it, and how many items were truncated here."""
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise ValueError(f"Scorer: items: expected a list of items, got {type(items).__name__}")
        sequences: list[_Sequence] = []
        num_truncated = 0
        bar = tqdm(total=len(items), desc="tokenising", delay=1, disable=not self.progress, leave=False)
        with bar:
            for first in range(0, len(items), _READ_TOGETHER):
                part = items[first : first + _READ_TOGETHER]
                for item, (ids, truncated, start) in zip(part, self._encoder.read_all(part, first), strict=True):
                    # a list of Python ints takes nine times as much
                    sequences.append(_Sequence(np.asarray(ids, dtype=_TOKEN).tobytes(), start))
                    num_truncated += truncated and not isinstance(item, Encoded)
                bar.update(len(part))
        if num_truncated:
            logger.warning(
                "%d of %d items are longer than %s tokens and lose their beginning",
                num_truncated,
                len(items),
                self.max_length,
            )
        return sequences, num_truncated

    def _map(
        self,
        sequences: list[_Sequence],
        fn: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        width: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Call fn(input_ids [B, T], mask [B, T], response_start [B]) -> [B, width] on micro-batches; [N, width] in the
        sequences' order. response_start is None for a model that does not read it."""
        result = torch.empty(len(sequences), width, dtype=dtype)
        rows: dict[_Sequence, list[int]] = {}
        for row, sequence in enumerate(sequences):
            rows.setdefault(sequence, []).append(row)
        # the longest first, so that a lack of memory shows at once; ids break ties, so that the items' order does not
        # matter
        unique = sorted(rows, key=lambda sequence: (-len(sequence.ids), sequence))
        device = self.model.get_input_embeddings().weight.device
        bar = tqdm(total=len(unique), desc="scoring", unit="seq", delay=1, disable=not self.progress)
        with bar, evaluating(self.model):
            for part in micro_batches([len(ids) // _TOKEN.itemsize for ids, _ in unique], self.batch_tokens):
                batch = unique[part]
                input_ids, mask = _right_padded([sequence.ids for sequence in batch])
                start = None
                if self._encoder.finds_response:
                    start = torch.tensor([sequence.start for sequence in batch]).to(device)
                output = fn(input_ids.to(device), mask.to(device), start).cpu()
                for sequence, value in zip(batch, output, strict=True):
                    result[rows[sequence]] = value
                bar.update(len(batch))
        return result


class _Sequence(NamedTuple):
    """ids: the bytes of an int32 array. start: as in `Encoded`."""

    ids: bytes
    start: int


def micro_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[slice]:
    """Split lengths, sorted from long to short, into slices of at most `batch_tokens` padded tokens or one sequence."""
    start = 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, batch_tokens // lengths[start]))
        yield slice(start, stop)
        start = stop


def _right_padded(batch: list[bytes]) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T] int64. The padding id is 0; any would do, because only the mask says what is padding."""
    arrays = [np.frombuffer(ids, dtype=_TOKEN) for ids in batch]
    input_ids = np.zeros((len(batch), max(map(len, arrays))), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(arrays):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)
