"""The wire dialects: what each asks for, how it is answered, and how each broken body is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from prudent.rlhf.doors.dialects import DIALECTS, Asked, DialectError
from prudent.rlhf.doors.vector_dialects import scores_of_vector

from . import bodies

RESULT = {"reward": 0.5, "nominal": 0.75, "worst": 0.25, "mean": [0.25, 0.75], "std": [1.0, 2.0], "distance": 1.5}
NOTHING = {"reward": None, "nominal": None, "worst": None, "mean": [None, 0.75], "std": [1.0, None], "distance": 1.5}
WITHOUT_DISTANCE = {name: value for name, value in RESULT.items() if name != "distance"}
READ = {dialect.name: dialect.read for dialect in DIALECTS}


def read(name: str, body: Any, **query: str) -> Asked:
    return READ[name](body, query)


def reply(name: str, body: Any, *results: Mapping[str, Any], **query: str) -> Any:
    answer = read(name, body, **query).reply(results)
    json.dumps(answer, allow_nan=False)
    return answer


class TestOpenRLHF:
    def test_a_query_is_a_text_in_the_policys_template_and_its_prompt_is_the_beginning(self) -> None:
        (item,) = read("openrlhf", bodies.OPENRLHF).items
        assert item == {"rendered": bodies.PROMPT + bodies.COMPLETE, "prompt": bodies.PROMPT}

    def test_one_query_is_answered_by_scalars_which_openrlhf_puts_into_tensors_of_one(self) -> None:
        assert reply("openrlhf", bodies.OPENRLHF, RESULT) == {
            "rewards": 0.5,
            "scores": 0.5,
            "extra_logs": {"std": 1.5, "gap": 0.5, "distance": 1.5},
        }

    def test_several_queries_are_answered_by_lists(self) -> None:
        body = {name: column * 2 for name, column in bodies.OPENRLHF.items()}
        answer = reply("openrlhf", body, RESULT, {**RESULT, "reward": -1.0})
        assert answer["rewards"] == answer["scores"] == [0.5, -1.0]
        assert answer["extra_logs"]["std"] == [1.5, 1.5]

    def test_no_query_is_answered_by_nothing_because_every_server_is_asked(self) -> None:
        assert read("openrlhf", bodies.OPENRLHF_EMPTY).items == []
        assert reply("openrlhf", bodies.OPENRLHF_EMPTY)["rewards"] == []

    def test_a_prompt_that_was_truncated_is_no_beginning_and_is_left_out(self) -> None:
        (item,) = read("openrlhf", {**bodies.OPENRLHF, "prompts": ["another prompt"]}).items
        assert item == {"rendered": bodies.PROMPT + bodies.COMPLETE}

    @pytest.mark.parametrize(
        "label",
        [
            [{"role": "user", "content": "my day"}],
            {"messages": [{"role": "user", "content": "my day"}]},
            {"prompt": [{"role": "user", "content": "my day"}], "answer": 42},
        ],
    )
    def test_messages_carried_by_the_label_are_the_prompt_and_the_response_is_cut_out(self, label: Any) -> None:
        (item,) = read("openrlhf", {**bodies.OPENRLHF_MESSAGES, "labels": [label]}).items
        assert item == {
            "prompt": [{"role": "user", "content": "my day"}],
            "response": "good food ",
            "complete": True,
        }

    def test_a_response_without_closing_tokens_was_truncated(self) -> None:
        body = {**bodies.OPENRLHF_TRUNCATED, "labels": [{"prompt": "my day"}]}
        assert read("openrlhf", body).items == [{"prompt": "my day", "response": "bad hotel", "complete": False}]

    def test_a_reward_that_is_not_finite_is_null_and_flagged(self) -> None:
        answer = reply("openrlhf", bodies.OPENRLHF, NOTHING)
        assert answer["rewards"] is None
        assert answer["extra_logs"]["nonfinite"] == 1.0

    def test_responses_are_scored_with_their_prompts_and_answered_as_prudent_ppo_reads_them(self) -> None:
        body = {"prompts": ["my day"], "responses": ["good"], "query": ["ignored"]}
        assert read("openrlhf", body).items == [{"prompt": "my day", "response": "good"}]
        assert reply("openrlhf", body, RESULT) == {
            "rewards": [0.5],
            **{name: [RESULT[name]] for name in ("nominal", "worst", "mean", "std", "distance")},
        }

    def test_a_model_without_a_trust_region_has_no_distance(self) -> None:
        assert "distance" not in reply("openrlhf", bodies.OPENRLHF, WITHOUT_DISTANCE)["extra_logs"]


class TestSlime:
    def test_prompt_and_response_in_the_template_are_one_text(self) -> None:
        assert read("slime", bodies.SLIME).items == [
            {"rendered": bodies.PROMPT + bodies.COMPLETE, "prompt": bodies.PROMPT}
        ]

    def test_a_response_whose_special_tokens_were_skipped_counts_as_complete(self) -> None:
        (item,) = read("slime", {**bodies.SLIME, "response": "good food"}).items
        assert item["complete"] is True

    def test_messages_are_left_to_the_reward_models_template(self) -> None:
        expected = [{"prompt": [{"role": "user", "content": "my day"}], "response": "good food"}]
        assert read("slime", bodies.SLIME_MESSAGES).items == expected

    def test_a_prompt_without_a_template_is_said_to_have_none(self) -> None:
        body = {"prompt": "my day", "response": "good", "label": None}
        assert read("slime", body, rendered="false").items == [{"prompt": "my day", "response": "good"}]

    def test_the_answer_is_an_object_for_reward_key_or_a_number(self) -> None:
        assert reply("slime", bodies.SLIME, RESULT, value="number") == 0.5
        assert reply("slime", bodies.SLIME, RESULT) == {
            "reward": 0.5, "std": 1.5, "gap": 0.5, "distance": 1.5, "finite": True,
        }  # fmt: skip
        assert reply("slime", bodies.SLIME, NOTHING)["finite"] is False


class TestLlamaFactory:
    def test_texts_are_in_the_template_and_scores_a_list(self) -> None:
        asked = read("llama-factory", bodies.LLAMA_FACTORY)
        assert [item["rendered"] for item in asked.items] == bodies.LLAMA_FACTORY["messages"]
        assert asked.model is None  # the constant "model" names none
        assert reply("llama-factory", bodies.LLAMA_FACTORY, RESULT, RESULT)["scores"] == [0.5, 0.5]

    def test_a_score_that_is_not_finite_is_null_and_its_index_is_named(self) -> None:
        answer = reply("llama-factory", bodies.LLAMA_FACTORY, RESULT, NOTHING)
        assert (answer["scores"], answer["nonfinite"]) == ([0.5, None], [1])


class TestNeMoGym:
    def test_input_and_output_are_one_chat_without_the_reasoning(self) -> None:
        assert read("nemo-gym", bodies.NEMO_GYM).items == [
            {"messages": [{"role": "user", "content": "my day"}, {"role": "assistant", "content": "good food"}]}
        ]

    def test_instructions_tools_calls_and_their_results_are_part_of_it(self) -> None:
        body = copy.deepcopy(bodies.NEMO_GYM)
        body["responses_create_params"] = {"input": "hi", "instructions": "be nice", "tools": [{"type": "function"}]}
        body["response"]["output"][:1] = [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "done"},
        ]
        (item,) = read("nemo-gym", body).items
        assert [message["role"] for message in item["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
        assert item["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
        assert item["tools"] == [{"type": "function"}]

    def test_an_incomplete_response_gets_no_end(self) -> None:
        body = copy.deepcopy(bodies.NEMO_GYM)
        body["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
        assert read("nemo-gym", body).items[0]["complete"] is False

    def test_the_reply_is_the_request_with_the_reward(self) -> None:
        answer = reply("nemo-gym", bodies.NEMO_GYM, RESULT)
        assert answer.items() >= bodies.NEMO_GYM.items()
        assert (answer["reward"], answer["std"], answer["distance"]) == (0.5, 1.5, 1.5)
        assert answer["reward_components"] == {"nominal": 0.75, "worst": 0.25}

    def test_a_reward_that_is_not_finite_is_masked(self) -> None:
        answer = reply("nemo-gym", bodies.NEMO_GYM, NOTHING)
        assert (answer["reward"], answer["mask_sample"]) == (0.0, True)


class TestVectors:
    @pytest.mark.parametrize(
        ("name", "body", "key"),
        [
            ("classify", bodies.VERL_VLLM, "probs"),
            ("pooling", bodies.VERL_VLLM, "data"),
            ("embeddings", bodies.VERL_SGLANG, "embedding"),
        ],
    )
    def test_the_vector_has_means_stds_distance_and_the_reward_last(self, name: str, body: Any, key: str) -> None:
        assert read(name, body).items == [{"rendered": bodies.PROMPT + bodies.COMPLETE}]
        answer = reply(name, body, RESULT)
        assert answer["data"][-1][key] == [0.25, 0.75, 1.0, 2.0, 1.5, 0.5]
        assert answer["data"][-1][key][-1] == RESULT["reward"]  # what verl reads

    def test_a_vector_is_taken_apart_by_its_length(self) -> None:
        for result in (RESULT, WITHOUT_DISTANCE):
            vector = reply("classify", bodies.VERL_VLLM, result)["data"][0]["probs"]
            expected = {name: result[name] for name in result if name not in ("nominal", "worst")}
            assert scores_of_vector(vector, "probs") == expected

    def test_the_input_may_be_texts_token_ids_or_messages(self) -> None:
        assert read("classify", {"input": ["a", [1, 2]]}).items == [{"rendered": "a"}, [1, 2]]
        assert read("classify", {"input": [1, 2]}).items == [[1, 2]]
        chat = [{"role": "user", "content": "a"}]
        assert read("classify", {"messages": chat}).items == [{"messages": chat}]

    def test_a_score_that_is_not_finite_is_an_error_because_a_vector_holds_numbers(self) -> None:
        with pytest.raises(DialectError, match=r"data\[1\]: expected finite scores") as error:
            reply("classify", {"input": ["a", "b"]}, RESULT, NOTHING)
        assert error.value.status == 422  # which verl does not repeat

    def test_a_busy_server_says_503_where_verl_reads_because_it_gives_up_after_any_4xx(self) -> None:
        busy = {dialect.name: dialect.busy for dialect in DIALECTS}
        assert (busy["classify"], busy["embeddings"], busy["openrlhf"]) == (503, 503, 429)


class TestScore:
    def test_texts_chats_items_and_pairs(self) -> None:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert read("prudent", {"texts": ["a", "b"]}).items == ["a", "b"]
        assert read("prudent", {"chats": [chat]}).items == [{"messages": chat}]
        item = {"prompt": "a", "response": "b", "complete": False}
        assert read("prudent", {"items": [item]}).items == [item]
        pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
        assert [item["response"] for item in read("prudent", {"pairs": [pair]}).items] == ["b", "c"]

    def test_items_may_have_every_form_of_scorer(self) -> None:
        chat = [{"role": "user", "content": "a"}]
        rendered, system = {"rendered": "a"}, {"prompt": {"system": "a", "text": "b"}, "response": "c"}
        items = read("prudent", {"items": ["a", [1, 2], chat, rendered, system]}).items
        assert items == ["a", [1, 2], {"messages": chat}, rendered, system]

    def test_a_score_has_everything_and_says_whether_it_is_finite(self) -> None:
        answer = reply("prudent", {"texts": ["a", "b"]}, RESULT, NOTHING)
        assert answer == {"scores": [{**RESULT, "finite": True}, {**NOTHING, "finite": False}]}

    @pytest.mark.parametrize(
        ("rejected", "margin", "preferred"),
        [(0.25, 0.25, "chosen"), (1.0, -0.5, "rejected"), (0.5, 0.0, None), (None, None, None)],
    )
    def test_a_pair_says_which_response_wins_and_by_how_much(self, rejected: Any, margin: Any, preferred: Any) -> None:
        body = {"pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
        (score,) = reply("prudent", body, RESULT, {**RESULT, "reward": rejected})["scores"]
        assert (score["margin"], score["preferred"]) == (margin, preferred)
        assert score["chosen"]["reward"] == 0.5

    def test_the_aggregation_is_a_query_parameter_of_every_dialect(self) -> None:
        assert read("prudent", {"texts": ["a"]}, aggregation="lcb:1").aggregation == "lcb:1"
        assert read("openrlhf", bodies.OPENRLHF, aggregation="min").aggregation == "min"
        assert read("prudent", {"texts": ["a"], "model": "b"}).model == "b"


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("body", [None, [], "text", 3, True])
def test_a_body_that_is_no_object_is_refused(name: str, body: Any) -> None:
    with pytest.raises(DialectError, match=r"^body: expected a JSON object, got "):
        read(name, body)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("openrlhf", {}, "prompts: expected a list of prompts, got nothing"),
        ("openrlhf", {"prompts": []}, "query: expected a list of texts, got nothing"),
        ("openrlhf", {"prompts": ["a"], "query": ["a", 3]}, "query[1]: expected a text, got 3"),
        ("openrlhf", {"prompts": ["a"], "query": ["a", "b"]},
         "prompts: expected a list of 2, one per query, got a list of 1"),
        ("openrlhf", {"prompts": ["a"], "query": ["a"], "labels": 3},
         "labels: expected a list of 1, one per query, got 3"),
        ("openrlhf", {"prompts": ["a"], "query": ["b"], "labels": [{"prompt": "c"}]},
         'query[0]: expected a text that begins with its prompt, to cut the response out, got "b"'),
        ("openrlhf", {"prompts": [], "responses": ["a"]},
         "prompts: expected a list of 1, one per response, got an empty list"),
        ("openrlhf", {"prompts": [3], "responses": ["a"]}, "prompts[0]: expected a text or messages, got 3"),
        ("slime", {"prompt": "a"}, "response: expected a text, got nothing"),
        ("slime", {"prompt": 3, "response": "a"}, "prompt: expected a list of messages (role, content), got 3"),
        ("llama-factory", {"messages": [[]]}, "messages[0]: expected a text, got an empty list"),
        ("nemo-gym", {"responses_create_params": {"input": "a"}}, "response: expected an object, got nothing"),
        ("nemo-gym", {"responses_create_params": {"input": "a"}, "response": {}},
         "response.output: expected a list of items (OpenAI responses), got null"),
        ("nemo-gym", {"responses_create_params": {"input": [{"type": "image"}]}, "response": {}},
         "responses_create_params.input[0].type: expected message, function_call, function_call_output or reasoning, "
         'got "image"'),
        ("classify", {}, "input: expected a text, token ids, or a list of them; or the key messages, got nothing"),
        ("classify", {"input": []}, "input: expected a text, token ids, or a list of them, got an empty list"),
        ("classify", {"input": ["a", {}]}, "input[1]: expected a text or token ids, got an object with no keys"),
        ("classify", {"input": "a", "model": 3}, "model: expected a text, got 3"),
        ("classify", {"input": "a", "encoding_format": "base64"}, 'encoding_format: expected "float", got "base64"'),
        ("classify", {"messages": []}, "messages: expected a list of messages (role, content), got an empty list"),
        ("prudent", {}, "body: expected exactly one of texts, chats, items, pairs, got none of them"),
        ("prudent", {"texts": [], "items": []},
         "body: expected exactly one of texts, chats, items, pairs, got texts and items"),
        ("prudent", {"items": {}}, "items: expected a list, got an object with no keys"),
        ("prudent", {"texts": ["a"], "aggregation": "max"},
         "aggregation: expected no other key than texts and model (aggregation is a query parameter), got it in the "
         "body"),
        ("prudent", {"items": [{"prompt": "a"}]},
         "items[0]: expected the fields prompt and response, messages, or chosen and rejected, got prompt"),
        ("prudent", {"items": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
         "items[0]: expected one response (a pair belongs into pairs), got 2 responses"),
        ("prudent", {"pairs": [{"prompt": "a", "response": "b"}]},
         "pairs[0]: expected chosen and rejected, got 1 responses"),
        ("prudent", {"chats": [[{"content": "a"}]]},
         "chats[0][0]: expected a message with a role and a content, got an object with 'content'"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_what_was_expected_and_what_came(name: str, body: Any, message: str) -> None:
    with pytest.raises(DialectError) as error:
        read(name, body)
    assert str(error.value) == message


def test_a_wrong_query_parameter_is_refused() -> None:
    with pytest.raises(DialectError, match=r'^rendered: expected true or false, got "maybe"'):
        read("slime", bodies.SLIME, rendered="maybe")
    with pytest.raises(DialectError, match=r'^value: expected number or object, got "list"'):
        read("slime", bodies.SLIME, value="list")
