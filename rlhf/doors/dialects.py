"""The wire dialects of trainers and engines: a parsed JSON body to items for `Scorer`, and results to a reply.

Pure functions: they know no web framework and not who scores. `DIALECTS` lists them all; a server mounts each at its
path, calls `read(body, query)`, scores `items`, and answers `reply(results)`.

A number that is not finite never leaves. Where the client can hold a null, the reply has null and says so beside it:

    dialect        not finite
    openrlhf       "rewards": null and extra_logs.nonfinite = 1; OpenRLHF then stops, for it has no missing reward
    slime          "reward": null, "finite": false
    llama-factory  null in "scores" and its index in "nonfinite"; its client stops
    nemo-gym       "reward": 0.0 with "mask_sample": true and a failure_reason: NeMo-Gym leaves the sample out
    vllm forms     an error of status 422, because their vectors hold numbers alone; verl does not repeat a 422
    prudent        null, "finite": false
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import schemas
from .score_dialect import read_score
from .vector_dialects import read_classify, read_embeddings, read_pooling
from .wire import (
    Asked,
    Dialect,
    DialectError,
    Result,
    flag,
    is_messages,
    messages_of,
    needed,
    object_of,
    shown,
    text_of,
    texts_of,
    uncertainty,
    unwrapped,
    without_end,
)

__all__ = ["DIALECTS", "Asked", "Dialect", "DialectError", "Result"]

_LOSSLESS = ("nominal", "worst", "mean", "std")  # of an item, which `prudent ppo` reads beside the rewards


def read_openrlhf(body: Any, query: Mapping[str, str]) -> Asked:
    """OpenRLHF's remote reward: {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}.

    `query` is prompt and response in the policy's chat template, special tokens included, and begins with its entry of
    `prompts`. It is scored as a text that the reward model's template has written, closed as that template closes an
    answer. If the templates differ, carry the raw prompt through `labels` (--data.label_key): a list of messages, or
    {"prompt": a text or messages}; the response is then cut out of `query` and loses its closing tokens. A response
    without closing tokens was truncated.

    With `responses`, which `prudent ppo` sends, prompts and responses are scored as `prudent score` reads them, and the
    reply also has `nominal`, `worst`, `mean` and `std` a response.

    One query gets scalars, several get lists: OpenRLHF puts each value into a tensor of one. No query gets empty lists:
    it asks every one of its servers, also with nothing.
    """
    body = object_of(body)
    prompts = needed(body, "prompts", "a list of prompts")
    if body.get("responses") is not None:
        return Asked(_plain_pairs(prompts, body["responses"]), _ppo_reply, aggregation=query.get("aggregation"))
    wholes = texts_of(needed(body, "query", "a list of texts"), "query")
    prompts = texts_of(prompts, "prompts")
    labels = body.get("labels")
    if labels is None:
        labels = [None] * len(wholes)
    for name, column in (("prompts", prompts), ("labels", labels)):
        if not isinstance(column, list) or len(column) != len(wholes):
            raise DialectError(name, f"a list of {len(wholes)}, one per query", shown(column))
    items = [
        _generated(whole, prompt, label, f"query[{index}]")
        for index, (whole, prompt, label) in enumerate(zip(wholes, prompts, labels, strict=True))
    ]
    return Asked(items, _openrlhf_reply, aggregation=query.get("aggregation"))


def _generated(whole: str, prompt: str, label: Any, field: str) -> dict[str, Any]:
    raw = _raw_prompt(label)
    if raw is None:
        # a prompt that OpenRLHF has truncated is no beginning of the query: the encoder then looks for the last turn
        return {"rendered": whole, "prompt": prompt} if whole.startswith(prompt) else {"rendered": whole}
    if not whole.startswith(prompt):
        raise DialectError(field, "a text that begins with its prompt, to cut the response out", shown(whole))
    response, ended = without_end(whole[len(prompt) :])
    return {"prompt": raw, "response": response, "complete": ended}


def _raw_prompt(label: Any) -> Any:
    """The prompt that a label carries: messages, {"prompt"} or {"messages"}; None if it carries none."""
    if is_messages(label):
        return messages_of(label, "labels")
    if isinstance(label, Mapping):
        for key in ("prompt", "messages"):
            if is_messages(label.get(key)):
                return messages_of(label[key], f"labels.{key}")
        if isinstance(label.get("prompt"), str):
            return label["prompt"]
    return None


def _openrlhf_reply(results: Sequence[Result]) -> dict[str, Any]:
    rewards = [result["reward"] for result in results]
    logs = [uncertainty(result) for result in results]
    extra = {name: unwrapped([log[name] for log in logs]) for name in (logs[0] if logs else ())}
    nonfinite = [float(reward is None) for reward in rewards]
    if any(nonfinite):
        extra["nonfinite"] = unwrapped(nonfinite)
    return {"rewards": unwrapped(rewards), "scores": unwrapped(rewards), "extra_logs": extra}


def _plain_pairs(prompts: Any, responses: Any) -> list[dict[str, Any]]:
    responses = texts_of(responses, "responses")
    if not isinstance(prompts, list) or len(prompts) != len(responses):
        raise DialectError("prompts", f"a list of {len(responses)}, one per response", shown(prompts))
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list, Mapping)):
            raise DialectError(f"prompts[{index}]", "a text or messages", shown(prompt))
    return [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]


def _ppo_reply(results: Sequence[Result]) -> dict[str, Any]:
    reply: dict[str, Any] = {"rewards": [result["reward"] for result in results]}
    for name in _LOSSLESS:
        reply[name] = [result[name] for result in results]
    if results and "distance" in results[0]:
        reply["distance"] = [result["distance"] for result in results]
    return reply


def read_slime(body: Any, query: Mapping[str, str]) -> Asked:
    """slime's remote_rm: one {"prompt", "response", "label"} -> {"reward", "std", "gap", "distance", "finite"}.

    Start slime with --rm-type remote_rm --reward-key reward; `?value=number` answers the bare number instead. A prompt
    of messages is rendered by the reward model's template, as is one that `label` carries (see `read_openrlhf`). A
    prompt that is a text was written by the policy's chat template (--apply-chat-template); `?rendered=false`: it was
    not.
    """
    body = object_of(body)
    prompt = needed(body, "prompt", "a text or messages")
    response = text_of(needed(body, "response", "a text"), "response")
    raw = _raw_prompt(body.get("label"))
    as_number = query.get("value", "object")
    if as_number not in ("number", "object"):
        raise DialectError("value", "number or object", shown(as_number))
    item: dict[str, Any]
    if raw is None and isinstance(prompt, str) and flag(query, "rendered", True):
        item = {"rendered": prompt + response, "prompt": prompt}
        # with skip_special_tokens slime's responses have no end, truncated or not
        item |= {} if without_end(response)[1] else {"complete": True}
    else:
        if raw is None:
            raw = prompt if isinstance(prompt, str) else messages_of(prompt, "prompt")
        item = {"prompt": raw, "response": without_end(response)[0]}

    def reply(results: Sequence[Result]) -> Any:
        (result,) = results
        if as_number == "number":
            return result["reward"]
        return {"reward": result["reward"], **uncertainty(result), "finite": result["reward"] is not None}

    return Asked([item], reply, aggregation=query.get("aggregation"))


def read_llama_factory(body: Any, query: Mapping[str, str]) -> Asked:
    """LLaMA-Factory's reward model of type `api`: {"model", "messages": [text, ...]} -> {"scores": [...]}.

    A text is prompt and response in the policy's template, special tokens included. The name in `model` is the constant
    "model" and selects none; `?model=NAME` does.
    """
    body = object_of(body)
    texts = texts_of(needed(body, "messages", "a list of texts"), "messages")

    def reply(results: Sequence[Result]) -> dict[str, Any]:
        scores = [result["reward"] for result in results]
        found: dict[str, Any] = {"id": "score", "object": "score.evaluation", "model": "model", "scores": scores}
        missing = [index for index, score in enumerate(scores) if score is None]
        return {**found, "nonfinite": missing} if missing else found

    return Asked([{"rendered": text} for text in texts], reply, aggregation=query.get("aggregation"))


def read_nemo_gym(body: Any, query: Mapping[str, str]) -> Asked:
    """NeMo-Gym's `/verify`: {"responses_create_params", "response"} -> the same with reward and reward_components.

    The prompt is the input of `responses_create_params` with its instructions and tools; the response is the messages,
    tool calls and tool results in `response.output`. Reasoning is not scored. An incomplete response gets no end.

    reward_components are rewards (nominal, worst); std, gap and distance stand beside `reward`, where NeMo-Gym's
    metrics read them.
    """
    body = object_of(body)
    asked = object_of(needed(body, "responses_create_params", "an object"), "responses_create_params")
    response = object_of(needed(body, "response", "an object"), "response")
    messages = [*_openai_input(asked), *_openai_output(response.get("output"), "response.output")]
    item: dict[str, Any] = {"messages": messages}
    if response.get("status") == "incomplete" or response.get("incomplete_details"):
        item["complete"] = False
    tools = asked.get("tools")
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DialectError("responses_create_params.tools", "a list of objects", shown(tools))
        item["tools"] = tools

    def reply(results: Sequence[Result]) -> dict[str, Any]:
        (result,) = results
        reward = result["reward"]
        scores = {"reward": 0.0, "mask_sample": True, "failure_reason": "the reward is not finite"}
        if reward is not None:
            components = {name: result[name] for name in ("nominal", "worst")}
            scores = {"reward": reward, "reward_components": components, **uncertainty(result)}
        return {**body, **scores}

    return Asked([item], reply, aggregation=query.get("aggregation"))


def _openai_input(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = "responses_create_params.input"
    given = needed(asked, "input", "a text or a list of messages")
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else _openai_output(given, name)
    instructions = asked.get("instructions")
    system = [{"role": "system", "content": text_of(instructions, "instructions")}] if instructions else []
    return [*system, *prompt]


def _openai_output(output: Any, field: str) -> list[dict[str, Any]]:
    """OpenAI's input or output items as messages."""
    if not isinstance(output, list):
        raise DialectError(field, "a list of items (OpenAI responses)", shown(output))
    messages: list[dict[str, Any]] = []
    for index, part in enumerate(output):
        where = f"{field}[{index}]"
        kind = object_of(part, where).get("type", "message")
        if kind == "message":
            role = "system" if part.get("role") == "developer" else text_of(part.get("role"), f"{where}.role")
            messages.append({"role": role, "content": _openai_text(part.get("content"), f"{where}.content")})
        elif kind == "function_call":
            function = {"name": part.get("name"), "arguments": part.get("arguments")}
            call = {"id": part.get("call_id"), "type": "function", "function": function}
            messages.append({"role": "assistant", "tool_calls": [call]})
        elif kind == "function_call_output":
            content = _openai_text(part.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": part.get("call_id"), "content": content})
        elif kind != "reasoning":
            raise DialectError(
                f"{where}.type", "message, function_call, function_call_output or reasoning", shown(kind)
            )
    return messages


def _openai_text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DialectError(field, "a text or a list of parts", shown(content))
    texts = []
    for index, part in enumerate(content):
        texts.append(text_of(object_of(part, f"{field}[{index}]").get("text"), f"{field}[{index}].text"))
    return "".join(texts)


DIALECTS = (
    Dialect("prudent", "/score", "Score texts, chats, responses or pairs, with everything the model knows.",
            read_score, schemas.SCORE, schemas.SCORED),
    Dialect("openrlhf", "/get_reward", "OpenRLHF's remote reward (--reward.remote_url), and that of `prudent ppo`.",
            read_openrlhf, schemas.OPENRLHF, schemas.OPENRLHF_REPLY),
    Dialect("slime", "/slime", "slime's remote reward (--rm-type remote_rm --rm-url URL --reward-key reward).",
            read_slime, schemas.SLIME, schemas.SLIME_REPLY),
    Dialect("llama-factory", "/v1/score/evaluation", "LLaMA-Factory's reward model of type api.",
            read_llama_factory, schemas.LLAMA_FACTORY, schemas.LLAMA_FACTORY_REPLY),
    Dialect("nemo-gym", "/verify", "NeMo-Gym's verifier.", read_nemo_gym, schemas.NEMO_GYM, schemas.NEMO_GYM_REPLY),
    Dialect("classify", "/classify", "vLLM's classification, which verl reads: probs end with the reward.",
            read_classify, schemas.VECTOR, schemas.CLASSIFIED, 503),
    Dialect("pooling", "/pooling", "vLLM's pooling: data ends with the reward.",
            read_pooling, schemas.VECTOR, schemas.POOLED),
    Dialect("embeddings", "/v1/embeddings", "The embeddings that verl reads of SGLang: they end with the reward.",
            read_embeddings, schemas.VECTOR, schemas.EMBEDDED, 503),
)  # fmt: skip
