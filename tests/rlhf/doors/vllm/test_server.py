"""A vLLM server with our plugins answers every dialect, and its own forms, as `Scorer` scores the items."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from prudent import Scorer
from prudent.rlhf.doors.client import RewardClient
from prudent.rlhf.doors.dialects import DIALECTS
from prudent.rlhf.evaluation.by_item import by_item

from .conftest import Server

pytestmark = pytest.mark.vllm

PROMPT = "<|user|> my day <|end|><|assistant|> "
CHAT = [{"role": "user", "content": "my day"}, {"role": "assistant", "content": "good food"}]
CUT = {"prompt": "my day", "response": "bad hotel", "complete": False}
TEXT = "the film was a great film"


def close(values: Any) -> Any:
    return pytest.approx(values, abs=1e-5, nan_ok=False)


def wanted(scorer: Scorer, items: Sequence[Any], aggregation: str | None = None) -> list[dict[str, Any]]:
    return list(by_item(scorer.score(items, aggregation=aggregation)))


def vector(result: dict[str, Any]) -> list[float]:
    return [*result["mean"], *result["std"], result["distance"], result["reward"]]


class TestDialects:
    def test_ours_says_everything_of_texts_chats_items_and_pairs(self, server: Server, scorer: Scorer) -> None:
        whole, cut, text = wanted(scorer, [CHAT, CUT, TEXT])
        found = server.post("/score", {"items": [{"messages": CHAT}, CUT, TEXT]})["scores"]
        for got, expected in zip(found, (whole, cut, text), strict=True):
            assert {name: got[name] for name in expected} == {name: close(x) for name, x in expected.items()}
        assert [score["finite"] for score in found] == [True] * 3
        assert server.post("/score", {"texts": [TEXT]})["scores"][0]["reward"] == close(text["reward"])
        pair = {"prompt": "my day", "chosen": "good food", "rejected": "bad hotel"}
        (answer,) = server.post("/score", {"pairs": [pair]})["scores"]
        good, bad = wanted(scorer, [CHAT, {"prompt": "my day", "response": "bad hotel"}])
        assert answer["margin"] == close(good["reward"] - bad["reward"])

    @pytest.mark.parametrize("aggregation", ["mean", "min", "uwo:0.5", "tradeoff:0.4,trust=1"])
    def test_another_aggregation_is_a_query(self, server: Server, scorer: Scorer, aggregation: str) -> None:
        (expected,) = wanted(scorer, [CHAT], aggregation)
        (got,) = server.post(f"/score?aggregation={aggregation}", {"chats": [CHAT]})["scores"]
        assert got["reward"] == close(expected["reward"])

    def test_openrlhf(self, server: Server, scorer: Scorer) -> None:
        whole, cut = wanted(scorer, [CHAT, CUT])
        body = {"query": [PROMPT + "good food <|end|>", PROMPT + "bad hotel"], "prompts": [PROMPT] * 2, "labels": None}
        answer = server.post("/get_reward", body)
        assert answer["rewards"] == close([whole["reward"], cut["reward"]])
        assert answer["extra_logs"]["distance"] == close([whole["distance"], cut["distance"]])
        assert answer["extra_logs"]["std"] == close([sum(one["std"]) / 3 for one in (whole, cut)])
        assert server.post("/get_reward", {"query": [], "prompts": [], "labels": []})["rewards"] == []

    def test_slime(self, server: Server, scorer: Scorer) -> None:
        (whole,) = wanted(scorer, [CHAT])
        answer = server.post("/slime", {"prompt": PROMPT, "response": "good food <|end|>", "label": None})
        assert answer["reward"] == close(whole["reward"])

    def test_llama_factory(self, server: Server, scorer: Scorer) -> None:
        whole, cut = wanted(scorer, [CHAT, CUT])
        body = {"model": "model", "messages": [PROMPT + "good food <|end|>", PROMPT + "bad hotel"]}
        assert server.post("/v1/score/evaluation", body)["scores"] == close([whole["reward"], cut["reward"]])

    def test_nemo_gym(self, server: Server, scorer: Scorer) -> None:
        (whole,) = wanted(scorer, [CHAT])
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "good food"}]}
        body = {"responses_create_params": {"input": "my day"}, "response": {"output": [said]}}
        assert server.post("/verify", body)["reward"] == close(whole["reward"])

    @pytest.mark.parametrize(
        ("path", "key"), [("/classify", "probs"), ("/pooling", "data"), ("/v1/embeddings", "embedding")]
    )
    def test_vectors_end_with_the_reward(self, server: Server, scorer: Scorer, path: str, key: str) -> None:
        """Of a text in the chat template, as verl sends it, of token ids, and of messages."""
        ids = scorer.encode(CHAT)
        whole, plain = wanted(scorer, [CHAT, ids])
        bodies: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"input": PROMPT + "good food <|end|>", "model": "any", "use_activation": False}, whole),
            ({"messages": CHAT}, whole),
            ({"input": ids}, plain),
        ]
        for body, expected in bodies:
            (entry,) = server.post(path, body)["data"]
            assert entry[key] == close(vector(expected))

    @pytest.mark.parametrize("path", ["", "/classify", "/pooling"])
    def test_our_client_speaks_to_it(self, server: Server, scorer: Scorer, path: str) -> None:
        (expected,) = wanted(scorer, [CHAT])
        (got,) = RewardClient(server.url + path).score([CHAT])
        assert got["reward"] == close(expected["reward"])
        assert got["distance"] == close(expected["distance"])

    def test_all_are_mounted(self, server: Server) -> None:
        paths = json.loads(server.ask("GET", "/openapi.json")[1])["paths"]
        assert {dialect.path for dialect in DIALECTS} <= paths.keys()


class TestMany:
    def test_128_requests_at_once_are_not_mixed_up(self, server: Server, scorer: Scorer) -> None:
        words = sorted(word for word in scorer._encoder.tokenizer.get_vocab() if not word.startswith("<"))
        items = [{"prompt": words[i % 40], "response": " ".join(words[i % 7 : i % 7 + 1 + i % 11])} for i in range(128)]
        expected = [result["reward"] for result in wanted(scorer, items)]
        assert len(set(expected)) > 100

        def ask(item: dict[str, str]) -> float:
            return float(server.post("/score", {"items": [item]})["scores"][0]["reward"])

        with ThreadPoolExecutor(64) as threads:
            assert list(threads.map(ask, items)) == close(expected)

    def test_a_group_shares_its_prompt_and_a_response_is_never_taken_from_the_cache(
        self, server: Server, scorer: Scorer
    ) -> None:
        """The second time vLLM has all of it in its prefix cache, where a mean over the response cannot read it."""
        prompt = " ".join(["the film was very good and my day was long"] * 6)
        longer = " ".join(["good food"] * 12)
        items = [{"prompt": prompt, "response": answer} for answer in ("good", "bad", longer, f"{longer} bad")]
        expected = [result["reward"] for result in wanted(scorer, items)]
        for _ in range(2):
            before = server.hits()
            assert [score["reward"] for score in server.post("/score", {"items": items})["scores"]] == close(expected)
        assert server.hits() - before >= 4 * 32

    def test_a_longer_text_loses_its_beginning_as_in_scorer(self, server: Server, scorer: Scorer) -> None:
        text = " ".join(["the film was good"] * 50)
        (expected,) = wanted(scorer, [text])
        (got,) = server.post("/score", {"texts": [text]})["scores"]
        assert got["truncated"]
        assert got["tokens"] == 128
        assert got["reward"] == close(expected["reward"])


class TestRefusals:
    def test_a_client_that_goes_away_leaves_no_request_behind(self, server: Server, scorer: Scorer) -> None:
        body = json.dumps({"texts": [f"{TEXT} " * 20] * 256}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
        deadline = time.monotonic() + 60
        while server.metric("num_requests_running") + server.metric("num_requests_waiting") > 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (expected,) = wanted(scorer, [TEXT])
        assert server.post("/score", {"texts": [TEXT]})["scores"][0]["reward"] == close(expected["reward"])

    @pytest.mark.parametrize(
        ("path", "body", "status", "field"),
        [
            ("/score", {"texts": [""]}, 422, "item 0"),
            ("/score", {"texts": 3}, 422, "texts"),
            ("/score", {"items": [{"prompt": "a"}]}, 422, "items[0]"),
            ("/score?aggregation=none-such", {"texts": [TEXT]}, 422, "aggregation"),
            ("/score?aggregation=mean,centre=batch", {"texts": [TEXT]}, 422, "aggregation"),
            ("/get_reward", {"query": ["a"]}, 422, "prompts"),
            ("/classify", {"input": [5000]}, 422, "item 0"),
            ("/score", b"{", 400, "body"),
        ],
    )
    def test_the_error_names_the_field(self, server: Server, path: str, body: Any, status: int, field: str) -> None:
        got, raw = server.ask("POST", path, body)
        assert got == status, raw
        assert json.loads(raw)["error"]["field"] == field
