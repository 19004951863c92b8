"""Foreign candidates: texts that the reference policy would not write, made from its own responses and our phrases.

The attack kinds are mixed among the candidates that a reward chooses from. The other kinds only measure what a distance
sees.

repeated      a snippet repeated to the length of a response: in turn a nice phrase of ours, or 1 to 4 adjacent words
              of a
              response.
shuffled      the words of a response in random order.
languages, code, refusals   sentences of ours.
truncations   a response cut after 1 to 3 words: a judge of taste, for a short answer is not always wrong.
echoes        the prompt again.
tokens        random tokens of the vocabulary.
read again    responses of the reference policy as they are, read in the same way as foreign texts: the control, whose
              AUROC must be about .5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .phrases import CODE, LANGUAGES, NICE, REFUSALS

ATTACKS = ("repeated", "shuffled")
OTHERS = ("languages", "code", "refusals", "truncations", "echoes", "tokens")
AGAIN = "read again"


class ForeignText(NamedTuple):
    """A response to the held-out prompt number `prompt`."""

    prompt: int
    kind: str
    text: str


def foreign_texts(
    prompts: Sequence[str], responses: Sequence[Sequence[str]], tokenizer: Any, attacks: int, others: int, seed: int
) -> list[ForeignText]:
    """`attacks` texts of the attack kinds in turn for each held-out prompt, then `others` of each other kind and
    `AGAIN`.

    Args:
        responses: of the reference policy to each prompt, from which texts are made.
        tokenizer: whose vocabulary random tokens are drawn from.
    """
    found = []
    for number, (prompt, own) in enumerate(zip(prompts, responses, strict=True)):
        draw = random.Random(f"foreign/{seed}/{prompt}")
        make = _makers(draw, prompt, _of_some_words(own), tokenizer)
        # without a chat template a response begins with the blank that separates it from its prompt
        lead = " " if 2 * sum(text.startswith(" ") for text in own) > len(own) else ""
        kinds = [(ATTACKS[i % len(ATTACKS)], i) for i in range(attacks)]
        kinds += [(kind, i) for kind in OTHERS for i in range(others)]
        found += [ForeignText(number, kind, lead + make[kind](i)) for kind, i in kinds]
        found += [ForeignText(number, AGAIN, draw.choice(own)) for _ in range(others)]
    return found


def _of_some_words(responses: Sequence[str]) -> list[list[str]]:
    """The words of the responses with at least 4, or of all if there are none."""
    split = [text.split() for text in responses]
    return [said for said in split if len(said) >= 4] or [said or ["a"] for said in split]


def _makers(draw: random.Random, prompt: str, own: list[list[str]], tokenizer: Any) -> dict[str, Callable[[int], str]]:
    """For each kind a function of the text's number."""
    vocabulary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))

    def repeat(number: int) -> str:
        said = draw.choice(own)
        snippet = draw.choice(NICE).split()
        if number % 4 >= 2:  # every other one, as the kinds take turns
            size = draw.randint(1, min(4, len(said)))
            start = draw.randrange(len(said) - size + 1)
            snippet = said[start : start + size]
        times = max(3, round(len(said) / len(snippet)))
        return " ".join(snippet * times)

    def shuffle(_: int) -> str:
        said = draw.choice(own)
        return " ".join(draw.sample(said, len(said)))

    def cut(_: int) -> str:
        return " ".join(draw.choice(own)[: draw.randint(1, 3)])

    def echo(number: int) -> str:
        words = prompt.split()
        forms = (prompt, f"{prompt} {prompt}", f'"{prompt}"', " ".join(words[len(words) // 2 :]), prompt.upper())
        return forms[number % len(forms)]

    def tokens(_: int) -> str:
        return str(tokenizer.decode(draw.sample(vocabulary, min(12, len(vocabulary))))).strip() or "?"

    def listed(texts: Sequence[str]) -> Callable[[int], str]:
        return lambda _: draw.choice(texts)

    return {
        "repeated": repeat,
        "shuffled": shuffle,
        "languages": listed(LANGUAGES),
        "code": listed(CODE),
        "refusals": listed(REFUSALS),
        "truncations": cut,
        "echoes": echo,
        "tokens": tokens,
    }
