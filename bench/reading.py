"""Time how `Scorer` turns chats into token ids: one by one, and many with one call of the tokeniser.

    python -m prudent.bench.reading [--model smollm2] [--items 500] [--characters 1600] [--out runs/reading]

Both give the same ids, which is checked first. A chat is a user's and an assistant's message of random words of the
given length in all, and no two are equal. Each round times both, in turns; the figures are medians over the rounds. The
processor's seconds of a thread say what a reward costs a trainer's host; by the clock the tokeniser shares many texts
among its threads (as many as the machine has cores, unless TOKENIZERS_PARALLELISM=false). Writes reading.json and
reading.md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import trange
from transformers import AutoTokenizer

from ..engine.text import Encoded, ItemEncoder
from ..rlhf.job.files import atomic_write_json, atomic_write_text
from ..rlhf.models.embedded import embedded_model
from . import machine

TOGETHER = 512  # texts in a call of the tokeniser, as in `Scorer`


def made_chats(count: int, characters: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and responses of random English-looking words, a third and two thirds of `characters`."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(1, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        made = ""
        while len(made) < length:
            made += draw.choice(words) + " "
        return made[:length]

    return [{"prompt": text(characters // 3), "response": text(2 * characters // 3)} for _ in range(count)]


def measure(encoder: ItemEncoder, items: Sequence[Any], rounds: int, *, progress: bool = True) -> dict[str, Any]:
    """Milliseconds a text, by the clock and of the processor, of both ways. ValueError if their ids differ."""

    def one_by_one() -> list[Encoded]:
        return [encoder.read(item) for item in items]

    def together() -> list[Encoded]:
        return [row for i in range(0, len(items), TOGETHER) for row in encoder.read_all(items[i : i + TOGETHER])]

    ways: dict[str, Callable[[], list[Encoded]]] = {"one by one": one_by_one, "together": together}
    alone = one_by_one()
    if alone != together():
        raise ValueError("reading: expected the same ids from both ways, got others")
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in trange(rounds, desc="reading", unit="round", disable=not progress):
        for name, way in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            way()
            spent[name].append((time.perf_counter() - clock, time.process_time() - processor))
    medians = {
        name: [1000 / len(items) * statistics.median(pair[i] for pair in pairs) for i in (0, 1)]
        for name, pairs in spent.items()
    }
    ratios = {
        name: statistics.median(a[i] / b[i] for a, b in zip(spent["one by one"], spent["together"], strict=True))
        for i, name in enumerate(("clock", "processor"))
    }
    tokens = sum(len(row.ids) for row in alone) / len(items)
    return {"items": len(items), "tokens": tokens, "rounds": rounds, "ms": medians, "ratios": ratios}


def page(found: dict[str, Any], here: machine.Machine, model: str) -> str:
    """reading.md."""
    rows = [f"| {name} | {clock:.3f} | {processor:.3f} |" for name, (clock, processor) in found["ms"].items()]
    ratios = found["ratios"]
    return "\n".join(
        [
            "# Reading chats as token ids\n",
            f"`python -m prudent.bench.reading --model {model}`: {found['items']} chats of {found['tokens']:.0f} "
            f"tokens on average, chat template included; medians of {found['rounds']} rounds.\n",
            "| reading | ms a chat, by the clock | of the processor |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"Together is {ratios['clock']:.2f} times as fast by the clock and {ratios['processor']:.2f} times by the "
            f"processor (medians of the rounds' ratios).\n",
            f"{here.name}, {os.cpu_count()} cores; commit {here.commit[:12]}, {here.date}\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the page, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="folder or hub name of the tokeniser (default %(default)s)")
    parser.add_argument("--items", type=int, default=500, help="chats (default %(default)s)")
    parser.add_argument("--characters", type=int, default=1600, help="of a chat (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/reading"), help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    source = str(embedded_model()) if args.model == "smollm2" else args.model
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    encoder = ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=len(tokenizer))
    found = measure(encoder, made_chats(args.items, args.characters), args.rounds)
    written = page(found, machine.describe("cpu", quick=True), Path(args.model).name)
    print(written)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(args.out / "reading.json", found)
    atomic_write_text(args.out / "reading.md", written)


if __name__ == "__main__":
    main()
