"""JSON schemas of the dialects' bodies and replies, for the OpenAPI page."""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_ANY: dict[str, Any] = {}
# not {"type": ["number", "null"]}, which schemathesis 4.32 cannot read
_NUMBER = {"anyOf": [{"type": "number"}, {"type": "null"}]}


def _list(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _object(needed: str = "", **properties: Any) -> dict[str, Any]:
    found = {"type": "object", "properties": properties}
    return {**found, "required": needed.split()} if needed else found


def _either(*schemas: Any) -> dict[str, Any]:
    return {"anyOf": list(schemas)}


_MESSAGE = _object("role content", role=_TEXT, content=_TEXT)
_CHAT = {**_list(_MESSAGE), "minItems": 1}
_PROMPT = _either(_TEXT, _CHAT)
_ANSWER = _object("prompt response", prompt=_PROMPT, response=_PROMPT, complete={"type": "boolean"})
_PAIR = _object("chosen rejected", prompt=_PROMPT, chosen=_PROMPT, rejected=_PROMPT)

SCORE = {
    "oneOf": [
        _object("texts", texts=_list(_TEXT), model=_TEXT),
        _object("chats", chats=_list(_CHAT), model=_TEXT),
        _object("items", items=_list(_either(_ANSWER, _object("messages", messages=_CHAT))), model=_TEXT),
        _object("pairs", pairs=_list(_PAIR), model=_TEXT),
    ]
}
_SCORES = _object(
    "reward nominal worst mean std finite",
    reward=_NUMBER, nominal=_NUMBER, worst=_NUMBER, mean=_list(_NUMBER), std=_list(_NUMBER), distance=_NUMBER,
    finite={"type": "boolean"}, truncated={"type": "boolean"}, tokens={"type": "integer"},
)  # fmt: skip
_PAIR_SCORES = _object(
    "chosen rejected margin preferred",
    chosen=_SCORES, rejected=_SCORES, margin=_NUMBER, preferred={"anyOf": [_TEXT, {"type": "null"}]},
)  # fmt: skip
SCORED = _object("scores", scores=_list(_either(_SCORES, _PAIR_SCORES)))

_ONE_OR_MORE = _either(_NUMBER, _list(_NUMBER))
OPENRLHF = _either(
    _object("query prompts", query=_either(_TEXT, _list(_TEXT)), prompts=_either(_TEXT, _list(_TEXT)), labels=_ANY),
    _object("prompts responses", prompts=_list(_PROMPT), responses=_list(_TEXT)),
)
OPENRLHF_REPLY = _object("rewards", rewards=_ONE_OR_MORE, scores=_ONE_OR_MORE, extra_logs=_object())

SLIME = _object("prompt response", prompt=_PROMPT, response=_TEXT, label=_ANY)
SLIME_REPLY = _either(_NUMBER, _object("reward finite", reward=_NUMBER, finite={"type": "boolean"}))

LLAMA_FACTORY = _object("messages", model=_TEXT, messages=_list(_TEXT))
LLAMA_FACTORY_REPLY = _object("scores", model=_TEXT, scores=_list(_NUMBER))

_PART = _object("type text", type=_TEXT, text=_TEXT)
_SAID = _object("role content", type={"const": "message"}, role=_TEXT, content=_either(_TEXT, _list(_PART)))
NEMO_GYM = _object(
    "responses_create_params response",
    responses_create_params=_object("input", input=_either(_TEXT, _list(_SAID))),
    response=_object("output", output=_list(_SAID)),
)
NEMO_GYM_REPLY = _object("reward", reward={"type": "number"}, reward_components=_object())

_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_INPUT = _either(_TEXT, _IDS, {"type": "array", "items": _either(_TEXT, _IDS), "minItems": 1})
VECTOR = _either(_object("input", model=_TEXT, input=_INPUT), _object("messages", model=_TEXT, messages=_CHAT))


def _vectors(name: str) -> dict[str, Any]:
    entry = _object(f"index {name}", index={"type": "integer"}, **{name: _list({"type": "number"})})
    return _object("object data", object=_TEXT, data=_list(entry))


CLASSIFIED, POOLED, EMBEDDED = _vectors("probs"), _vectors("data"), _vectors("embedding")

COMPARE = _object("prompt responses", prompt=_TEXT, responses={**_list(_TEXT), "minItems": 1}, model=_TEXT)
_NUMBERS = _list(_NUMBER)
COMPARED = _object(
    "model responses aggregations",
    model=_TEXT,
    responses=_list(_object("mean std", mean=_NUMBERS, std=_NUMBERS, distance=_NUMBER)),
    aggregations=_list(_object("aggregation rewards", aggregation=_TEXT, rewards=_NUMBERS)),
)
