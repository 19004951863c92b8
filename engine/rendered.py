"""Read texts that a chat template has written already, as trainers send them, and close them as it closes a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from .errors import ItemError
from .opening import shared_start

_QUESTION, _ANSWER = "question-6f1d", "answer-6f1d"  # contents that no template writes by itself


class _Turn(NamedTuple):
    """What a chat template writes around an assistant's content, and the BOS token that it begins with ("": none)."""

    opening: str
    closing: str
    bos: str


class _Text(NamedTuple):
    """A text with its end, the part of it before the response (None: unknown), and whether it is complete."""

    whole: str
    opened: str | None
    complete: bool


class RenderedTexts:
    """Token ids of {"rendered": text, "prompt": its beginning, "complete": bool}; the last two may be missing.

    With a chat template, the text must have an assistant's turn in that template. If it ends with the turn's closing or
    with EOS, however it is spelled (a policy stops at <|im_end|>, its template goes on with a newline), it is complete
    and gets exactly the template's closing; if not, it was truncated and gets none. BOS is added where the template
    writes it. Without a template, EOS at the end says whether the text is complete, and BOS and EOS are then those of a
    plain text. `complete` overrides what the end says. A prompt that the text does not begin with is ignored.

    Args:
        tokenizer: a Hugging Face tokeniser.
        tokens: (text, options of the tokeniser) -> ids.
        plain: (plain text, complete) -> ids.
        render: (messages, tools, options of apply_chat_template) -> text.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokens: Callable[..., list[int]],
        plain: Callable[[str, bool], list[int]],
        render: Callable[[list[Mapping[str, Any]], None, dict[str, bool]], str],
    ) -> None:
        self._tokenizer, self._tokens, self._plain, self._render = tokenizer, tokens, plain, render

    def read(self, item: Mapping[str, Any], finds_response: bool) -> tuple[list[int], int]:
        """(ids, the place of the response's first token; 0 unless `finds_response`). Raises ItemError."""
        text, prompt, complete = item["rendered"], item.get("prompt"), item.get("complete")
        for name, value, kind in (("rendered", text, str), ("prompt", prompt, str), ("complete", complete, bool)):
            if not isinstance(value, kind) and (value is not None or name == "rendered"):
                wanted = "true or false" if kind is bool else "a text"
                raise ItemError(f"{name}: expected {wanted}, got {type(value).__name__}")
        if self._tokenizer.chat_template:
            found = self._chat(text, prompt, complete)
            ids = self._tokens(found.whole, add_special_tokens=False)
            opened = None if found.opened is None else self._tokens(found.opened, add_special_tokens=False)
        else:
            found = self._without_template(text, prompt, complete)
            ids = self._plain(found.whole, found.complete)
            # an opening is truncated by definition: it gets no EOS
            opened = None if found.opened is None or not finds_response else self._tokens(found.opened)
        if not finds_response:
            return ids, 0
        if opened is None:
            raise ItemError("expected its prompt too, because the model reads where the response begins, got none")
        return ids, shared_start(opened, ids)

    @cached_property
    def _turn(self) -> _Turn:
        question: list[Mapping[str, Any]] = [{"role": "user", "content": _QUESTION}]
        whole = self._render([*question, {"role": "assistant", "content": _ANSWER}], None, {})
        before, _, closing = whole.partition(_ANSWER)
        plain, asked = self._render(question, None, {}), self._render(question, None, {"add_generation_prompt": True})
        opening = asked.removeprefix(plain) if asked.startswith(plain) else ""
        if not opening.strip():  # a template whose user turn ends by opening the answer: [/INST]
            opening = before.partition(_QUESTION)[2]
        bos = self._tokenizer.bos_token or ""
        return _Turn(opening, closing, bos if bos and whole.startswith(bos) else "")

    def _chat(self, text: str, prompt: str | None, complete: bool | None) -> _Text:
        turn = self._turn
        core = next((core for core in (turn.opening.lstrip(), turn.opening.strip()) if core and core in text), None)
        if core is None:
            raise ItemError(
                "expected a text in the reward model's chat template, with an assistant's turn "
                f"({turn.opening.strip()!r}), got none: send the messages, or a plain prompt and response"
            )
        opened = prompt if prompt is not None and text.startswith(prompt) else text[: text.rfind(core) + len(core)]
        ends = [end for end in (turn.closing.strip(), self._tokenizer.eos_token) if end]
        rest, ended = _without_ends(text, ends)
        complete = ended if complete is None else complete
        if complete:
            blank = turn.closing[: len(turn.closing) - len(turn.closing.lstrip())] if ended else ""
            rest = rest.removesuffix(blank) + turn.closing
        bos = "" if text.startswith(turn.bos) else turn.bos
        return _Text(bos + rest, bos + opened, complete)

    def _without_template(self, text: str, prompt: str | None, complete: bool | None) -> _Text:
        eos, bos = self._tokenizer.eos_token, self._tokenizer.bos_token or ""
        rest, ended = _without_ends(text, [eos] if eos else [])
        opened = prompt.removeprefix(bos) if prompt is not None and rest.startswith(prompt) else None
        return _Text(rest.removeprefix(bos), opened, ended if complete is None else complete)


def _without_ends(text: str, ends: list[str]) -> tuple[str, bool]:
    """(text without any of `ends` at its end, whether there was one)."""
    found = False
    while True:
        shorter = text.rstrip()
        end = next((end for end in ends if shorter.endswith(end)), None)
        if end is None:
            return text, found
        text, found = shorter[: -len(end)], True
