"""Read preference pairs in their common formats; check, count and split them by prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ...engine.text import ItemEncoder, ItemError
from ..job.log import say_once
from .reading import read_rows
from .rows import Prompt, RowError, Text, pairs_of_row, unread_of_pairs

Encode = Callable[[Any, str], Any]  # (item, its name in errors), as `Scorer.encode`; raises ItemError


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with the preferred and the rejected response, each a text or a list of messages.

    A prompt may also be {"messages", "tools"} or {"system", "text"}. Two texts are joined unchanged: prompt + response
    is the whole sequence. `margin`: how much the annotator preferred the chosen response (Bradley-Terry's margin).
    Scores: annotations of each response, on their own scale. `where`: file and line, for errors; it is not compared.
    """

    prompt: Prompt
    chosen: Text
    rejected: Text
    margin: float | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    source: str | None = None
    where: str = field(default="", compare=False, repr=False)

    @property
    def prompt_key(self) -> str:
        """A string that is equal for equal prompts only."""
        return _key(self.prompt)

    def items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The chosen and the rejected sequence, as `Scorer` takes them."""
        return {"prompt": self.prompt, "response": self.chosen}, {"prompt": self.prompt, "response": self.rejected}


class PairData(NamedTuple):
    """pairs, and counts of rows, pairs, prompts, bad_rows, duplicates, equal (responses), below_gap.

    counts["unread_columns"] lists the columns that look like content and that no pair contains.
    """

    pairs: list[PreferencePair]
    counts: dict[str, Any]


def load_pairs(
    file_or_name: Path | str,
    *,
    min_score_gap: float = 2.0,
    skip_bad_rows: bool = False,
    limit: int | None = None,
    progress: bool = False,
    key: str = "data",
) -> PairData:
    """Load preference pairs from a JSON-lines or Parquet file, or a Hugging Face data set.

    A row is one of
    - prompt, chosen, rejected: texts, or lists of messages;
    - chosen, rejected: the prompt is their shared beginning (whole messages; of texts, up to the last "Assistant:" turn
      that both have, as in HH-RLHF, else up to the last blank of the shared prefix);
    - prompt, and responses (or completions): a list of texts or {"response": ...} with scores, or with a parallel list
      `scores`: UltraFeedback. Every two responses whose scores differ by at least `min_score_gap` make a pair.
    The prompt may be spread over several columns (system, history, instruction, input, tools, ...); columns.py lists
    them. The first two formats may also have margin (or strength), source, score_chosen and score_rejected; a pair
    whose scores differ by less than `min_score_gap` is dropped (BRME 5.2: "greater than or equal to 2").
    A warning on stderr names the columns that look like content and that nothing reads.

    Args:
        file_or_name: a file that ends in .jsonl, .json (JSON lines too) or .parquet; a folder of
            `Dataset.save_to_disk` or `DatasetDict.save_to_disk`; or a data set's name. ":SPLIT" after a folder or name
            selects another split than `train`.
        min_score_gap: > 0, on the scores' own scale.
        skip_bad_rows: count broken rows and continue instead of raising at the first.
        limit: stop after this many rows.
        key: the config key that errors name.

    Returns:
        PairData. Exact duplicates (margin and scores included) and pairs with two equal responses are counted and
        dropped.

    Raises:
        ValueError: for a broken row, naming key, file and line; for a file that is missing, empty or without a usable
            pair.
    """
    if not min_score_gap > 0:
        raise ValueError(f"min_score_gap: expected a number above 0, got {min_score_gap}")
    name = str(file_or_name)
    numbers = ("rows", "pairs", "prompts", "bad_rows", "duplicates", "equal", "below_gap")
    counts: dict[str, Any] = dict.fromkeys(numbers, 0)
    unread: dict[str, None] = {}
    pairs: list[PreferencePair] = []
    seen: set[str] = set()
    for where, row in tqdm(read_rows(key, name), desc="reading pairs", unit="row", delay=1, disable=not progress):
        if limit is not None and counts["rows"] >= limit:
            break
        counts["rows"] += 1
        try:
            found, below = pairs_of_row(row, min_score_gap)
            unread |= dict.fromkeys(unread_of_pairs(row))
        except RowError as error:
            if not skip_bad_rows:
                raise ValueError(f"{key}: {where}: {error}") from None
            counts["bad_rows"] += 1
            continue
        counts["below_gap"] += below
        for fields in found:
            pair = PreferencePair(**fields, where=where)
            responses = _key(pair.chosen), _key(pair.rejected)
            numbers_of_pair = pair.margin, pair.chosen_score, pair.rejected_score
            whole = json.dumps([pair.prompt_key, *responses, *numbers_of_pair])
            if responses[0] == responses[1]:
                counts["equal"] += 1
            elif whole in seen:
                counts["duplicates"] += 1
            else:
                seen.add(whole)
                pairs.append(pair)
    if counts["rows"] == 0:
        raise ValueError(f"{key}: {name}: expected preference pairs, got an empty file")
    if not pairs:
        dropped = ", ".join(f"{v} {k}" for k, v in counts.items() if v)
        raise ValueError(
            f"{key}: {name}: expected at least one usable pair, got none ({dropped}; min_score_gap {min_score_gap:g})"
        )
    counts["pairs"] = len(pairs)
    counts["prompts"] = len({pair.prompt_key for pair in pairs})
    counts["unread_columns"] = name_unread(key, name, unread)
    return PairData(pairs, counts)


def name_unread(key: str, name: str, columns: Iterable[str]) -> list[str]:
    """Name once on stderr the columns that look like content and are not read; return them."""
    found = list(columns)
    if found:
        say_once(f"{key}: {name}: not read, although it looks like content: {', '.join(found)}")
    return found


def text_reader(tokenizer: Any) -> Encode:
    """Return an encoder to check, before any model is loaded, that `tokenizer` can read an item."""
    return ItemEncoder(tokenizer, append_eos=False, max_length=None, vocab_size=1 << 62).encode


def readable_pairs(
    parts: Sequence[Sequence[PreferencePair]],
    encoders: Sequence[Encode],
    counts: dict[str, Any],
    *,
    prompt_encoders: Sequence[Encode] = (),
    skip_bad_rows: bool = False,
    progress: bool = False,
    key: str = "data",
) -> list[list[PreferencePair]]:
    """Return the pairs of each part whose two sides the chat template and tokeniser of every encoder accept.

    Split before this call if another job must find the same held-out prompts: the split then depends on the data alone.

    Args:
        parts: lists of pairs, such as training and held-out pairs.
        encoders: read both sides.
        prompt_encoders: read the prompt up to where the response begins, as a policy does.
        counts: of `load_pairs`; bad_rows, pairs and prompts are corrected in place.
        skip_bad_rows: leave pairs out instead of raising at the first.
        key: the config key that errors name.

    Raises:
        ValueError: naming key, file and line of the first pair that cannot be read: without `skip_bad_rows` if there is
            one, with it if no pair of the first part can be read.
    """
    bad: dict[str, str] = {}  # where -> why

    def is_readable(pair: PreferencePair) -> bool:
        chosen, rejected = pair.items()
        opened = {"prompt": pair.prompt, "response": "", "complete": False}
        for part, item in (("chosen", chosen), ("rejected", rejected), ("prompt", opened)):
            for encode in prompt_encoders if part == "prompt" else encoders:
                try:
                    encode(item, part)
                except ItemError as error:
                    reason = f"{pair.where or 'a pair'}, {part}: {error.reason}"
                    if not skip_bad_rows:
                        raise ValueError(f"{key}: {reason}") from error
                    bad.setdefault(pair.where, reason)
                    return False
        return True

    options: dict[str, Any] = {"desc": "checking texts", "unit": "pair", "delay": 1, "disable": not progress}
    kept = [[pair for pair in tqdm(part, **options) if is_readable(pair)] for part in parts]
    counts["bad_rows"] += len(bad)
    before, after = ([pair for part in some for pair in part] for some in (parts, kept))
    counts["pairs"] -= len(before) - len(after)
    counts["prompts"] -= len({pair.prompt_key for pair in before}) - len({pair.prompt_key for pair in after})
    if parts[0] and not kept[0]:
        reason = next(iter(bad.values()))
        raise ValueError(f"{key}: expected a pair that the tokeniser can read, got none; the first error: {reason}")
    return kept


def both_sides(pairs: Sequence[PreferencePair]) -> list[dict[str, Any]]:
    """Return every chosen sequence, then every rejected one, as `Scorer` takes them."""
    both = [pair.items() for pair in pairs]
    return [chosen for chosen, _ in both] + [rejected for _, rejected in both]


def names_of_sides(pairs: Sequence[PreferencePair]) -> list[str]:
    """Return the names that errors give the items of `both_sides`: file, line and side."""
    return [f"{pair.where or f'pair {i}'}, {side}" for side in ("chosen", "rejected") for i, pair in enumerate(pairs)]


def split_by_prompt(
    pairs: list[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (train, held out): `fraction` of the prompts, at least one, with all their pairs; 0 holds out none.

    Pairs of one prompt share its text and often a response, so a split by row would hold out texts that training has
    seen. Which prompts are held out depends on the set of prompts and the seed, not on the order of rows.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction: expected a number in [0, 1), got {fraction}")
    if fraction == 0:
        return list(pairs), []
    prompts = sorted({pair.prompt_key for pair in pairs})
    if len(prompts) < 2:
        raise ValueError("eval_fraction: expected at least two prompts to split, got one; 0 trains on everything")
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held_out = set(random.Random(seed).sample(prompts, count))
    train = [pair for pair in pairs if pair.prompt_key not in held_out]
    return train, [pair for pair in pairs if pair.prompt_key in held_out]


def _key(text: Prompt) -> str:
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True)
