"""ItemEncoder: what a chat template gets, what it may not leave out, and the errors of items that cannot be encoded."""

from __future__ import annotations

import json

import pytest

from prudent.engine.text import ItemEncoder, ItemError

USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
ALL = (
    "{% if tools %}TOOLS {{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CONTENT_ONLY = "{% for m in messages %}{{ m.role }}:{{ m['content'] }};{% endfor %}"


@pytest.fixture
def make(make_tokenizer):
    def make(template: str | None = ALL) -> ItemEncoder:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        return ItemEncoder(tokenizer, append_eos=True, max_length=None, vocab_size=300)

    return make


def text_of(encoder: ItemEncoder, item) -> str:
    return encoder.tokenizer.decode(encoder.encode(item)[0])


def refusal(encoder: ItemEncoder, item) -> str:
    with pytest.raises(ItemError) as caught:
        encoder.encode(item, "item 7")
    assert str(caught.value) == f"Scorer: item 7: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_a_tool_call_reaches_the_template_however_it_is_written(make, content, arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    item = [USER, {"role": "assistant", "tool_calls": [call], **content}]
    assert text_of(make(), item) == 'user:Weather?;assistant:CALL weather {"city": "Rome"};'


def test_a_template_that_joins_contents_and_arguments_as_texts_gets_texts(make):
    template = (
        "{% for m in messages %}{{ m.role + ':' + m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ 'CALL ' + c.function.arguments }}{% endfor %};{% endfor %}"
    )
    item = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert text_of(make(template), item) == 'user:Weather?;assistant:CALL {"city": "Rome"};'


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("content", ["Sunny.", None])
def test_reasoning_reaches_the_template_under_each_of_its_names(make, name, content):
    item = [USER, {"role": "assistant", "content": content, name: "It is noon."}]
    assert text_of(make(), item) == f"user:Weather?;assistant:(It is noon.){content or ''};"


def test_tools_reach_the_template_beside_messages_or_inside_a_prompt(make):
    answer = {"role": "assistant", "content": "Sunny."}
    for item in (
        {"messages": [USER, answer], "tools": TOOLS},
        {"prompt": "Weather?", "response": "Sunny.", "tools": TOOLS},
        {"prompt": {"messages": [USER], "tools": TOOLS}, "response": [answer]},
    ):
        assert text_of(make(), item) == f"TOOLS {json.dumps(TOOLS)};user:Weather?;assistant:Sunny.;"
    opened = {"prompt": {"messages": [USER], "tools": TOOLS}, "response": "", "complete": False}
    assert text_of(make(), opened) == f"TOOLS {json.dumps(TOOLS)};user:Weather?;assistant:"


@pytest.mark.parametrize(
    ("what", "item"),
    [
        ("tool calls", [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
        ("tools", {"messages": [USER], "tools": TOOLS}),
        ("reasoning", [USER, {"role": "assistant", "content": "Sunny.", "thinking": "It is noon."}]),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(make, what, item):
    assert (
        refusal(make(CONTENT_ONLY), item) == f"expected a chat template that writes {what}, got one that leaves it out"
    )


ANSWER = {"role": "assistant", "content": "Sunny."}
TWO_CALLS = [CALL, {"type": "function", "function": {"name": "news", "arguments": {"city": "Oslo"}}}]


@pytest.mark.parametrize(
    ("what", "template", "item"),
    [
        (
            "the content of message 1 (system)",
            "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }};{% endfor %}",
            {"prompt": {"system": "Be brief.", "text": "Up?"}, "response": "Yes."},
        ),
        (
            "the content of message 2 (tool)",
            "{% for m in messages if m.role != 'tool' %}{{ m.role }}:{{ m.content }};{% endfor %}",
            [USER, {"role": "tool", "content": "21 degrees"}, ANSWER],
        ),
        (
            "the content of message 2 (assistant)",
            "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}{% endfor %}",
            [USER, {**ANSWER, "tool_calls": [CALL]}],
        ),
        (
            "every tool call of a message",
            "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
            "{% endfor %}",
            [USER, {**ANSWER, "tool_calls": TWO_CALLS}],
        ),
        (
            "the arguments of tool calls",
            "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
            "{% endfor %}",
            [USER, {**ANSWER, "tool_calls": [CALL]}],
        ),
    ],
)
def test_a_template_that_leaves_out_a_part_of_a_message_is_refused(make, what, template, item):
    assert refusal(make(template), item) == f"expected a chat template that writes {what}, got one that leaves it out"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}:{{ m.content | trim | upper }};{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }};{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{{ m.content | tojson }};{% endfor %}",
    ],
)
def test_a_template_may_write_a_content_in_another_form(make, template):
    said = {"role": "assistant", "content": ' <think>"a"\n</think> \n'}
    assert text_of(make(template), [USER, said, USER]).startswith("user:")


def test_what_an_earlier_turn_says_beside_its_tool_calls_may_be_left_out_as_templates_do_on_purpose(make):
    template = "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}{% endfor %}"
    messages = [USER, {**ANSWER, "tool_calls": [CALL]}, {"role": "tool", "content": "21"}, ANSWER]
    assert text_of(make(template), messages).endswith("21Sunny.")


def test_reasoning_of_earlier_turns_may_be_left_out_as_templates_do_on_purpose(make):
    earlier = [USER, {"role": "assistant", "content": "Sunny.", "thinking": "It is noon."}, USER]
    assert text_of(make(CONTENT_ONLY), earlier) == "user:Weather?;assistant:Sunny.;user:Weather?;"


def test_a_system_prompt_is_a_turn_or_without_a_template_a_text_in_front(make):
    item = {"prompt": {"system": "Be brief.", "text": "Up? "}, "response": "Yes."}
    assert text_of(make(), item) == "system:Be brief.;user:Up? ;assistant:Yes.;"
    assert text_of(make(None), item) == "Be brief.\n\nUp? Yes.</s>"


@pytest.mark.parametrize(
    "date",
    ["{{ strftime_now('%d %b %Y') }}", "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}"],
)
def test_a_template_that_writes_todays_date_writes_the_same_one_on_every_day(make, date):
    template = "{% if strftime_now is defined %}" + date + "{% endif %};" + CONTENT_ONLY
    assert text_of(make(template), [USER]) == "26 Jul 2024;user:Weather?;"
    template = "{{ strftime_now('%A %-d %B, %H:%M:%S %Y-%m-%d') }} {{ messages[0].content }}"
    assert text_of(make(template), [USER]) == "Friday 26 July, 00:00:00 2024-07-26 Weather?"


def test_the_fixed_date_changes_nothing_else_of_a_template(make):
    for opening in ("", "\n", "  ", "\n  \n"):
        template = opening + "{% if messages %}\n  {{ messages[0].content }}\n{% endif %}"
        dated = text_of(make(template + "{{ strftime_now('%Y') }}"), [USER])
        assert dated == text_of(make(template + "{{ '2024' }}"), [USER])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no such role') }}", "the chat template refuses it: no such role"),
        ("{{ messages[0]['name'] + '' }}", "the chat template refuses it: 'dict object' has no attribute 'name'"),
        ("{{ 1 / 0 }}", "the chat template refuses it: division by zero"),
        ("{{ messages", "the chat template refuses it: unexpected end of template"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(make, template, reason):
    assert refusal(make(template), [USER]).startswith(reason)


def test_a_tokeniser_that_fails_is_one_sentence_too(make, monkeypatch):
    encoder = make(None)

    class Failing:
        bos_token_id = cls_token_id = chat_template = None

        def __call__(self, text):
            raise OverflowError("too\nmuch")

    encoder.tokenizer = Failing()
    assert refusal(encoder, "text") == "the tokeniser cannot read it: too much"


@pytest.mark.parametrize("item", ["Hi \ud83d", [{"role": "user", "content": "Hi \ud83d"}]])
def test_half_a_surrogate_pair_is_no_text(make, item):
    assert refusal(make(), item) == r"expected text, got half of a surrogate pair, '\ud83d'"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ([{"role": "assistant", "content": None}], "expected messages with a role and a content that are texts"),
        ([{**USER, "tool_calls": "weather()"}], "tool_calls: expected a list of objects, got 'weather()'"),
        ({"messages": [USER], "tools": "weather"}, "tools: expected a list of objects, got 'weather'"),
        ({"prompt": {"text": "a"}, "response": "b"}, "system: expected messages (role, content), got NoneType"),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "complete": False},
            "complete: expected true, because the last message has no content to continue",
        ),
    ],
)
def test_what_no_template_can_be_given_is_refused(make, item, reason):
    assert refusal(make(), item).startswith(reason)
