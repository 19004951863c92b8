"""Short chat templates of our own, modelled on several families: how a finished turn looks, and what opens the next.

Each closes turns with <|end|>, which the tests' tokenisers have as EOS, but where its comment says otherwise.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TURN = "<|{{ m.role }}|> {{ m.content }} <|end|> "
_OPEN = "{% if add_generation_prompt %}<|assistant|> {% endif %}"


def _loop(body: str) -> str:
    return "{% for m in messages %}" + body + "{% endfor %}"


ALIKE = {  # a finished turn is the opened one, the response and its end
    "chatml": _loop(_TURN) + _OPEN,
    "header": _loop("<|{{ m.role }}|>\n\n{{ m.content }}<|end|>")
    + "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}",
    "system": "{% if messages[0].role != 'system' %}<|user|> be kind <|end|> {% endif %}" + _loop(_TURN) + _OPEN,
}
DIFFERENT = {
    # the last turn gets an empty think block that the opened one has not
    "think_in_last_turn": _loop(
        "<|{{ m.role }}|> {% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
        "<think> </think> {% endif %}{{ m.content }} <|end|> "
    )
    + _OPEN,
    # the opened turn begins a think block that the finished one leaves out, with all that was thought
    "think_opened": _loop(
        "<|{{ m.role }}|> {{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }} <|end|> "
    )
    + "{% if add_generation_prompt %}<|assistant|> <think> {% endif %}",
    # a channel stands before the content of a finished turn alone
    "channel": _loop("<|{{ m.role }}|> {% if m.role == 'assistant' %}final: {% endif %}{{ m.content }} <|end|> ")
    + _OPEN,
    # the opened turn is not asked for
    "no_header": _loop(_TURN),
    # spaces at the ends of a content go
    "trimmed": _loop("<|{{ m.role }}|> {{ m.content | trim }} <|end|> ") + _OPEN,
    # the prompt is another once it is answered
    "earlier_turns_change": _loop("<|{{ m.role }}|> {% if not loop.last %}(past) {% endif %}{{ m.content }} <|end|> ")
    + _OPEN,
    # the last turn ends with another token than earlier ones
    "last_end_differs": _loop("<|{{ m.role }}|> {{ m.content }} {{ '<|end|>' if loop.last else '<|user|>' }} ") + _OPEN,
}
ALTERS = _loop("<|{{ m.role }}|> {{ m.content | upper }} <|end|> ") + _OPEN
PLAIN = {  # turns end with plain text
    "newline": (_loop("{{ m.role }}: {{ m.content }}\n") + "{{ 'assistant: ' if add_generation_prompt }}", "\n"),
    "alpaca": (
        _loop(
            "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response:\n"
            "{% else %}{{ m.content }}\n\n{% endif %}"
        ),
        "\n\n",
    ),
}


def a_tokenizer(template: str | None) -> Any:
    """Bytes, a few pairs of them merged, <|end|> as EOS and no other special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), (".", "ĊĊ"), ("o", "n")]
    words = ["<|end|>", *letters, *("".join(pair) for pair in merges)]
    bytewise = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer
