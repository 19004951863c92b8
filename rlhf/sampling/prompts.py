"""What the policy is asked: read, tokenised, checked once, and in which order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ...engine.config import longest_in_company
from ..data.pairs import FILES, opened, read_rows
from ..data.rows import RowError, Text, prompt_of_row
from .config import RolloutConfig
from .turn import Turn

_PROMPTS = Path(__file__).with_name("prompts.txt")


def read_prompts(file: Path | None, held_out: int) -> list[str]:
    """The prompts of a file, one a line; blank lines and repetitions left out. ValueError if too few remain."""
    try:
        lines = (file or _PROMPTS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: {file}: expected a UTF-8 text file, got {error}") from None
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < held_out + 2:
        raise ValueError(
            f"prompts: expected at least {held_out + 2} different ones ({held_out} are held out), got {len(prompts)}"
        )
    return prompts


class Prompt(NamedTuple):
    """item: the text, or the messages {"role", "content"}; ids: its tokens up to where the response begins."""

    item: Text
    ids: list[int]


def longest_prompt(config: RolloutConfig, model_config: Any, turn: Turn) -> int | None:
    """How many tokens a prompt may have, so that a response and its closing fit the model; None: any number.

    Raises:
        ValueError: if the model's positions hold no prompt beside `max_new_tokens`.
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


def load_prompts(
    source: str | Path, turn: Turn, max_tokens: int | None = None, *, progress: bool = False
) -> list[Prompt]:
    """The prompts of a file or dataset, in its order, each once.

    Args:
        source: a .txt file, one prompt a line (blank lines are none); or what `load_pairs` reads (.jsonl, .json,
            .parquet, a dataset's name), where a row states its `prompt` (or instruction, question) as a text or as
            messages, or is a preference pair, whose prompt is taken.
        turn: the policy's tokeniser and template.
        max_tokens: longer prompts are refused, for a prompt without its beginning is another; see `longest_prompt`.
        progress: show a progress bar on stderr where it takes more than a second.

    Raises:
        ValueError: naming file and line, for a broken row, an empty prompt, one too long, or messages where the
            tokeniser has no chat template; for a source without a prompt.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    name = str(source)
    for where, row in tqdm(_items(name), desc="reading prompts", unit="prompt", delay=1, disable=not progress):
        try:
            if isinstance(row, RowError):
                raise row
            item = row if isinstance(row, str) else prompt_of_row(row)
            if not item or (isinstance(item, str) and not item.strip()):
                raise RowError("expected a prompt with some text, got an empty one")
            key = json.dumps(item, sort_keys=True)
            if key in seen:
                continue
            seen.add(key)
            ids = turn.prompt(item)
        except ValueError as error:  # the encoder's reasons too
            raise ValueError(f"prompts: {where}: {str(error).removeprefix('Scorer: item: ')}") from None
        if max_tokens is not None and len(ids) > max_tokens:
            shown = item if isinstance(item, str) else item[-1]["content"]
            raise ValueError(
                f"prompts: {where}: expected at most {max_tokens} tokens, so that a response fits behind, "
                f"got {len(ids)}: {shown[:60]!r}"
            )
        prompts.append(Prompt(item, ids))
    if not prompts:
        raise ValueError(f"prompts: {name}: expected at least one prompt, got none")
    return prompts


def _items(name: str) -> Iterator[tuple[str, Any]]:
    """(where, text or row)."""
    path = Path(name)
    if path.suffix.lower() != ".txt":
        yield from read_rows("prompts", name, (".txt", *FILES))
        return
    with opened("prompts", path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")  # Windows' tools begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {name}: expected UTF-8, got {error.reason} at byte {error.start}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name}, line {number}", line.rstrip("\r")


def prompt_order(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """The numbers of the `per_step` prompts of step `step` (from 0), all different.

    Every epoch is a shuffle of its own of all `count` prompts, cut into whole steps; the fewer than `per_step` prompts
    that are left over at its end sit that epoch out. A step's prompts follow from these four numbers alone, so that a
    resumed run needs no memory of the order.

    Raises:
        ValueError: for fewer prompts than a step takes.
    """
    if per_step > count:
        raise ValueError(
            f"rollout.prompts_per_step: expected at most {count}, the number of different prompts, got {per_step}"
        )
    epoch, place = divmod(step, count // per_step)
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[place * per_step : (place + 1) * per_step]
