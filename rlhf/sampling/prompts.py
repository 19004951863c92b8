"""Read, tokenise and check the prompts of a policy, and order them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tqdm import tqdm

from ...engine.config import longest_in_company
from ...engine.text import ItemError
from ..data import rows
from ..data.pairs import Encode, name_unread, text_reader
from ..data.reading import FILES, check_source, read_rows, text_lines
from ..data.rows import RowError, prompt_of_row, unread_of_prompt
from ..job.log import say_once
from ..models.loading import load_tokenizer, model_folder
from .config import RolloutConfig
from .turn import Turn

_PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(file: Path | None, held_out: int) -> list[str]:
    """Read the distinct prompts of a text file, one per line; blank lines are ignored. ValueError if too few remain."""
    prompts = list(dict.fromkeys(line.strip() for _, line in text_lines("prompts", file or _PROMPTS)))
    if len(prompts) < held_out + 2:
        raise ValueError(
            f"prompts: expected at least {held_out + 2} different ones ({held_out} are held out), got {len(prompts)}"
        )
    return prompts


class Prompt(NamedTuple):
    """item: see `data.columns.Prompt`; ids: its tokens up to where the response begins."""

    item: rows.Prompt
    ids: list[int]


class PromptData(NamedTuple):
    """The prompts of a source, and how many of its rows were skipped."""

    prompts: list[Prompt]
    bad_rows: int


def longest_prompt(config: RolloutConfig, model_config: Any, turn: Turn) -> int | None:
    """Return the largest number of prompt tokens with which a response and its closing fit the model; None: any number.

    Raises:
        ValueError: if `max_new_tokens` leaves no position for a prompt.
    """
    positions = longest_in_company(model_config)
    if positions is None:
        return config.max_prompt_tokens
    room = positions - config.max_new_tokens - len(turn.closing)
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens: expected at most {positions - len(turn.closing) - 1}, so that a prompt fits the "
            f"model's {positions} positions too, got {config.max_new_tokens}"
        )
    return room if config.max_prompt_tokens is None else min(room, config.max_prompt_tokens)


def check_prompts(source: str | Path) -> None:
    """`check_source` for what `load_prompts` reads."""
    check_source("prompts", str(source), (".txt", *FILES))


def load_prompts(
    source: str | Path,
    turn: Turn,
    max_tokens: int | None = None,
    *,
    readers: Mapping[str, Encode] = MappingProxyType({}),
    skip_bad_rows: bool = False,
    progress: bool = False,
) -> PromptData:
    """Load the distinct prompts of a file or data set, in its order.

    Args:
        source: a .txt file, one prompt per line (blank lines are ignored); or anything that `load_pairs` reads (.jsonl,
            .json, .parquet, a data set), whose rows give a prompt in the columns that `data.columns` lists, or are
            preference pairs, of which the prompt is read. A warning on stderr names columns that look like content and
            are not read.
        turn: the policy's tokeniser and template.
        max_tokens: longer prompts are refused, because a prompt without its beginning is another; see
            `longest_prompt`.
        readers: config key -> encoder of the model it names, which reads the prompts too; see `reward_readers`.
        skip_bad_rows: leave out rows that are broken, too long, or refused by the chat template or the tokeniser; say
            on stderr how many. False: refuse the first.
        progress: show a progress bar on stderr if it takes more than a second.

    Raises:
        ValueError: naming file and line, for a row that cannot be used; for a source without a usable prompt.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    unread: dict[str, None] = {}
    name, bad = str(source), 0
    for where, row in tqdm(_items(name), desc="reading prompts", unit="prompt", delay=1, disable=not progress):
        try:
            item = _item(row)
            if not isinstance(row, str):
                unread |= dict.fromkeys(unread_of_prompt(row))
            key = json.dumps(item, sort_keys=True)
            if key in seen:
                continue
            seen.add(key)
            for reader, encode in readers.items():
                _refuse_unreadable(item, reader, encode)
            prompts.append(_tokenised(item, turn, max_tokens))
        except (RowError, ItemError) as error:
            if not skip_bad_rows:
                reason = error.reason if isinstance(error, ItemError) else error
                raise ValueError(f"prompts: {where}: {reason}") from error
            bad += 1
    name_unread("prompts", name, unread)
    if bad:
        say_once(f"prompts: {name}: {bad} bad row{'s' * (bad != 1)} skipped")
    if not prompts:
        raise ValueError(f"prompts: {name}: expected at least one prompt, got none ({bad} bad rows)")
    return PromptData(prompts, bad)


def _item(row: Any) -> rows.Prompt:
    item = row if isinstance(row, str) else prompt_of_row(row)
    if not item or (isinstance(item, str) and not item.strip()):
        raise RowError("expected a prompt with some text, got an empty one")
    return item


def _refuse_unreadable(item: rows.Prompt, reader: str, encode: Encode) -> None:
    try:
        encode({"prompt": item, "response": "a"}, "prompt")
    except ItemError as error:
        raise RowError(f"{reader}: {error.reason}") from error


def _tokenised(item: rows.Prompt, turn: Turn, max_tokens: int | None) -> Prompt:
    ids = turn.prompt(item)
    if max_tokens is not None and len(ids) > max_tokens:
        last: Any = (item.get("text") or item["messages"]) if isinstance(item, dict) else item
        shown = last if isinstance(last, str) else str(last[-1].get("content", ""))
        raise RowError(
            f"expected at most {max_tokens} tokens, so that a response fits after them, got {len(ids)}: {shown[:60]!r}"
        )
    return Prompt(item, ids)


def reward_readers(key: str, source: str | None) -> dict[str, Encode]:
    """`readers` of `load_prompts` for the reward model `source` that the config's `key` names; none for None."""
    return {} if source is None else {key: text_reader(load_tokenizer(key, model_folder(source)))}


def _items(name: str) -> Iterator[tuple[str, Any]]:
    """(where, text or row)."""
    check_prompts(name)
    path = Path(name)
    if path.suffix.lower() != ".txt":
        yield from read_rows("prompts", name)
        return
    for number, line in text_lines("prompts", path):
        yield f"{name}, line {number}", line


def prompt_order(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Return the numbers of the `per_step` prompts of step `step` (from 0), all different.

    Each epoch shuffles all `count` prompts and cuts them into whole steps; fewer than `per_step` prompts remain, which
    are not used in that epoch. The result depends on the four arguments alone, so a resumed run needs no record of the
    order.

    Raises:
        ValueError: for fewer prompts than a step takes.
    """
    if per_step > count:
        raise ValueError(
            f"rollout.prompts_per_step: expected at most {count}, the number of different prompts, got {per_step}"
        )
    epoch, step_of_epoch = divmod(step, count // per_step)
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[step_of_epoch * per_step : (step_of_epoch + 1) * per_step]
