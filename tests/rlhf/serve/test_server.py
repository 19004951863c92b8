"""`prudent serve`: every dialect answers what `Scorer` says, requests share forward passes, and limits hold."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prudent import Scorer
from prudent.rlhf.doors.client import RewardClient
from prudent.rlhf.serve.config import ServeConfig, named

from ..doors import bodies
from .conftest import Running

ITEM = {"prompt": "my day", "response": "good food"}
CHAT = [{"role": "user", "content": "my day"}, {"role": "assistant", "content": "good food"}]
WORDS = ("good", "great", "happy", "love", "fine", "bad", "awful", "sad", "hate", "poor", "boring", "ugly")


def _close(value: Any, expected: Any) -> bool:
    return value == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def expected(scorer: Scorer) -> float:
    (reward,) = scorer.score([ITEM]).reward
    assert reward is not None
    return reward


@pytest.mark.parametrize(
    ("path", "body", "read"),
    [
        ("/get_reward", bodies.OPENRLHF, lambda found: found["rewards"]),
        ("/get_reward", bodies.OPENRLHF_MESSAGES, lambda found: found["scores"]),
        ("/slime", bodies.SLIME, lambda found: found["reward"]),
        ("/slime?value=number", bodies.SLIME_MESSAGES, lambda found: found),
        ("/v1/score/evaluation", bodies.LLAMA_FACTORY, lambda found: found["scores"][0]),
        ("/verify", bodies.NEMO_GYM, lambda found: found["reward"]),
        ("/classify", bodies.VERL_VLLM, lambda found: found["data"][-1]["probs"][-1]),
        ("/pooling", {"messages": CHAT}, lambda found: found["data"][0]["data"][-1]),
        ("/v1/embeddings", bodies.VERL_SGLANG, lambda found: found["data"][-1]["embedding"][-1]),
        ("/score", {"items": [ITEM]}, lambda found: found["scores"][0]["reward"]),
        ("/score", {"chats": [CHAT]}, lambda found: found["scores"][0]["reward"]),
        ("/compare", {"prompt": "my day", "responses": ["good food", "bad"]},
         lambda found: found["aggregations"][0]["rewards"][0]),
    ],
)  # fmt: skip
def test_every_dialect_answers_the_scorers_reward(
    running: Running, expected: float, path: str, body: Any, read: Callable[[Any], float]
) -> None:
    answer = running.post(path, body)
    assert answer.status == 200, answer.raw
    assert _close(read(answer.json), expected)


def test_a_score_has_everything_that_the_scorer_says(running: Running, scorer: Scorer) -> None:
    pair = {"prompt": "my day", "chosen": "good food", "rejected": "bad hotel"}
    (score,) = running.post("/score", {"pairs": [pair]}).json["scores"]
    direct = scorer.score([{"prompt": "my day", "response": pair[side]} for side in ("chosen", "rejected")])
    assert direct.distance is not None
    for row, side in enumerate(("chosen", "rejected")):
        found = score[side]
        assert _close(found["mean"], direct.mean[row].tolist())
        assert _close(found["std"], direct.std[row].tolist())
        assert _close(found["distance"], direct.distance[row].item())
        for name in ("reward", "nominal", "worst"):
            assert _close(found[name], getattr(direct, name)[row])
        assert (found["finite"], found["truncated"]) == (True, False)
    assert _close(score["margin"], direct.reward[0] - direct.reward[1])


def test_openrlhfs_logs_have_std_gap_and_distance(running: Running, scorer: Scorer) -> None:
    direct = scorer.score([ITEM])
    logs = running.post("/get_reward", bodies.OPENRLHF).json["extra_logs"]
    assert direct.distance is not None
    assert _close(logs["std"], direct.std.mean().item())
    assert _close(logs["distance"], direct.distance.item())
    assert _close(logs["gap"], direct.nominal[0] - direct.worst[0])


@pytest.mark.parametrize("aggregation", ["min", "lcb:1", "head:2", "trust:1"])
def test_the_aggregation_of_a_request_is_its_own(running: Running, scorer: Scorer, aggregation: str) -> None:
    answer = running.post(f"/score?aggregation={aggregation}", {"items": [ITEM]}).json
    assert _close(answer["scores"][0]["reward"], scorer.score([ITEM], aggregation=aggregation).reward[0])


def test_a_truncated_response_has_no_end(running: Running, scorer: Scorer) -> None:
    item = {"prompt": "my day", "response": "bad hotel", "complete": False}
    (direct,) = scorer.score([item]).reward
    assert _close(running.post("/get_reward", bodies.OPENRLHF_TRUNCATED).json["rewards"], direct)
    assert _close(running.post("/score", {"items": [item]}).json["scores"][0]["reward"], direct)


def test_requests_of_many_clients_share_forward_passes_and_are_not_mixed_up(running: Running, scorer: Scorer) -> None:
    items = [{"prompt": "my day", "response": f"{one} {other}"} for one in WORDS for other in WORDS]
    before = running.metric("batch_items_count")
    client = RewardClient(running.url)
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda item: client.score([item])[0]["reward"], items))
    assert _close(answers, scorer.score(items).reward)
    assert running.metric("batch_items_count") - before < len(items) / 2


def test_a_body_that_comes_in_pieces_is_answered(running: Running, expected: float) -> None:
    body = json.dumps({"items": [ITEM]}).encode()
    pieces = [b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"]
    pieces += [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (body[:9], body[9:])]
    with socket.create_connection((running.host, running.port), timeout=30) as connection:
        for piece in (*pieces, b"0\r\n\r\n"):
            connection.sendall(piece)
            time.sleep(0.05)
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(1 << 16)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert _close(json.loads(content)["scores"][0]["reward"], expected)


def test_no_query_gets_an_empty_answer(running: Running) -> None:
    assert running.post("/get_reward", bodies.OPENRLHF_EMPTY).json["rewards"] == []


@pytest.fixture(scope="module")
def two(launch: Callable[..., Running], reward_folder: Path) -> Running:
    return launch(model=(f"first={reward_folder}", f"second={reward_folder}"), aggregation="mean")


class TestModels:
    def test_a_model_is_chosen_by_query_or_body_by_name_or_folder(self, two: Running, reward_folder: Path) -> None:
        assert two.post("/compare?model=second", {"prompt": "a", "responses": ["good"]}).json["model"] == "second"
        assert two.post("/compare", {"prompt": "a", "responses": ["good"], "model": "second"}).json["model"] == "second"
        assert two.post("/classify", {**bodies.VERL_VLLM, "model": str(reward_folder)}).status == 200
        assert two.post("/v1/score/evaluation", bodies.LLAMA_FACTORY).status == 200  # whose "model" is a constant

    def test_an_unknown_name_is_an_error_that_lists_the_names(self, two: Running) -> None:
        for answer in (two.post("/slime?model=third", bodies.SLIME), two.post("/classify", bodies.VERL_VLLM)):
            assert answer.status == 404
            assert answer.json["error"]["expected"] == "one of first, second"

    def test_the_servers_aggregation_replaces_the_models(self, two: Running, scorer: Scorer) -> None:
        answer = two.post("/score", {"items": [ITEM]}).json
        assert _close(answer["scores"][0]["reward"], scorer.score([ITEM], aggregation="mean").reward[0])

    def test_health_names_them(self, two: Running) -> None:
        found = two.ask("GET", "/health").json
        assert found["status"] == "ok"
        assert found["models"]["second"]["heads"] == 3
        assert found["models"]["first"]["aggregation"] == "mean"

    @pytest.mark.parametrize(
        ("text", "name"),
        [("a=runs/x", "a"), ("runs/reward/model", "reward"), ("org/name", "name"), ("/data/run=1/model", "run=1")],
    )
    def test_a_model_is_named_after_its_run(self, text: str, name: str) -> None:
        assert named(text)[0] == name

    def test_two_models_of_one_name_are_refused(self) -> None:
        with pytest.raises(ValueError, match="expected models of different names, got 'a' twice"):
            ServeConfig(model=("a=x", "a=y"))


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/score", b"{", 400, "body"),
        ("/score", b"\xff", 400, "body"),
        ("/score", b'{"texts": [NaN]}', 400, "body"),
        ("/verify", b'{"temperature": 1e999}', 400, "body"),
        ("/score", b"[" * 100_000, 400, "body"),
        ("/score", {"texts": ["a"], "items": []}, 422, "body"),
        ("/score", {"texts": [""]}, 422, "item 0"),
        ("/score", {"texts": ["good", "\ud800"]}, 422, "item 1"),
        ("/classify", {"input": [[1, 10**9]]}, 422, "item 0"),
        ("/classify", {"input": "a plain text for a model with a chat template"}, 422, "item 0"),
        ("/score?aggregation=nonsense", {"items": [ITEM]}, 422, "aggregation"),
        ("/score?aggregation=head:9", {"items": [ITEM]}, 422, "aggregation"),
        ("/score?aggregation=batch_worst", {"items": [ITEM]}, 422, "aggregation"),
        ("/score?aggregation=mean,centre=batch", {"items": [ITEM]}, 422, "aggregation"),
        ("/score?agregation=min", {"items": [ITEM]}, 422, "agregation"),
    ],
)
def test_a_broken_request_says_which_field_expected_what(
    running: Running, path: str, body: Any, status: int, field: str
) -> None:
    answer = running.post(path, body)
    assert answer.status == status, answer.raw
    assert answer.json["error"]["field"] == field
    assert answer.json["error"]["expected"]


def test_other_paths_and_methods_are_errors_in_json(running: Running) -> None:
    assert running.post("/nothing", {}).json == {"error": {"message": "Not Found"}}
    assert running.ask("GET", "/score").status == 405


def test_metrics_count_requests_items_and_distances(running: Running) -> None:
    before = running.metric("items_total", model="run")
    far = running.metric("distance_count", model="run")
    running.post("/score", {"items": [ITEM] * 3})
    assert running.metric("items_total", model="run") - before == 3
    assert running.metric("distance_count", model="run") - far == 3
    page = running.ask("GET", "/metrics").raw.decode()
    assert 'prudent_requests_total{dialect="prudent",status="200"}' in page
    assert "prudent_queue_items 0.0" in page


@pytest.fixture(scope="module")
def closed(launch: Callable[..., Running]) -> Running:
    return launch(token="se cret")


class TestToken:
    @pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic se cret"}])
    @pytest.mark.parametrize(("method", "path"), [("POST", "/score"), ("POST", "/compare"), ("GET", "/metrics")])
    def test_nothing_is_scored_without_it(self, closed: Running, header: Any, method: str, path: str) -> None:
        answer = closed.ask(method, path, {"items": [ITEM]}, **header)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"

    def test_with_it_everything_is_as_without_a_token(self, closed: Running, expected: float) -> None:
        scores = RewardClient(closed.url, token="se cret").score([ITEM])
        assert _close(scores[0]["reward"], expected)
        assert closed.ask("GET", "/metrics", Authorization="Bearer se cret").status == 200
        assert closed.ask("GET", "/health").status == 200
        assert closed.ask("GET", "/").status == 200


@pytest.fixture(scope="module")
def small(launch: Callable[..., Running]) -> Running:
    return launch(max_body=2000, max_chars=100, max_items=4, read_timeout=0.5)


class TestLimits:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"texts": ["a" * 2000]}, "body: expected at most 2000 bytes, got more"),
            ({"texts": ["a" * 101]}, "item 0: expected at most 100 characters, got 101"),
            ({"texts": ["a"] * 5}, "body: expected at most 4 items, got 5"),
        ],
    )
    def test_what_is_too_large_is_refused(self, small: Running, body: Any, message: str) -> None:
        answer = small.post("/score", body)
        assert answer.status == 413
        assert answer.json["error"]["message"] == message

    def test_a_body_without_a_length_is_refused_when_it_becomes_too_large(self, small: Running) -> None:
        with socket.create_connection((small.host, small.port), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                connection.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")

    @pytest.mark.parametrize("sent", [b"", b"POST /score HT", b"POST /score HTTP/1.1\r\nHost: x\r\n"])
    def test_a_client_that_does_not_send_a_head_is_hung_up_on(self, small: Running, sent: bytes) -> None:
        with socket.create_connection((small.host, small.port), timeout=10) as connection:
            connection.sendall(sent)
            assert connection.recv(4096) == b""

    def test_a_client_that_sends_a_byte_now_and_then_too(self, small: Running) -> None:
        with socket.create_connection((small.host, small.port), timeout=10) as connection:
            for byte in b"POST /score":
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    break
                time.sleep(0.1)
            else:
                pytest.fail("the connection was still open after 1.1 s")

    def test_a_client_that_does_not_send_its_body_gets_408(self, small: Running) -> None:
        with socket.create_connection((small.host, small.port), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.fixture(scope="module")
def slow(launch: Callable[..., Running]) -> Running:
    running = launch(max_queue=2, timeout=0.6, batch_tokens=1)
    (served,) = running.server.models.by_name.values()
    heads = served.scorer.heads

    def slowly(items: Any) -> Any:
        time.sleep(0.4)
        return heads(items)

    served.scorer.heads = slowly
    return running


class TestOverload:
    def test_a_full_queue_says_when_to_ask_again_in_the_status_that_the_client_repeats(self, slow: Running) -> None:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: slow.post("/slime", bodies.SLIME), range(8)))
        refused = [answer for answer in answers if answer.status == 429]
        assert refused
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        time.sleep(1)
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: slow.post("/classify", bodies.VERL_VLLM), range(8)))
        assert 503 in {answer.status for answer in answers}
        assert 429 not in {answer.status for answer in answers}
        time.sleep(1)

    def test_a_request_that_takes_too_long_gets_504(self, slow: Running) -> None:
        answer = slow.post("/score", {"items": [ITEM, {**ITEM, "response": "bad"}]})
        assert answer.status == 504
        assert "no score within 0.6 s" in answer.json["error"]["message"]
        time.sleep(0.5)

    def test_a_client_that_goes_away_leaves_the_queue(self, slow: Running) -> None:
        before = slow.metric("items_total", model="run")
        body = json.dumps({"items": [ITEM]}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        first = threading.Thread(target=slow.post, args=("/score", {"items": [ITEM]}))
        first.start()
        time.sleep(0.1)  # the thread is scoring the first request: the second one waits
        with socket.create_connection((slow.host, slow.port)) as connection:
            connection.sendall(head + body)
            time.sleep(0.1)
        first.join()
        time.sleep(0.6)
        assert slow.metric("items_total", model="run") - before == 1
        assert slow.metric("queue_items") == 0


@pytest.fixture(scope="module")
def broken(launch: Callable[..., Running]) -> Running:
    running = launch()
    (served,) = running.server.models.by_name.values()
    heads = served.scorer.heads

    def spoilt(items: Any) -> Any:
        found = heads(items)
        found.mean[:, 0] = float("inf")
        return found

    served.scorer.heads = spoilt
    return running


class TestNumbersThatAreNotFinite:
    def test_they_never_leave(self, broken: Running) -> None:
        score = broken.post("/score", {"items": [ITEM]}).json["scores"][0]
        assert (score["reward"], score["mean"][0], score["finite"]) == (None, None, False)
        assert broken.post("/get_reward", bodies.OPENRLHF).json["extra_logs"]["nonfinite"] == 1.0
        assert broken.post("/verify", bodies.NEMO_GYM).json["mask_sample"] is True
        answer = broken.post("/classify", bodies.VERL_VLLM)
        assert (answer.status, answer.json["error"]["field"]) == (422, "data[0]")
        assert broken.metric("nonfinite_items_total", model="run") >= 3


def test_a_model_that_fails_is_a_500_and_the_server_lives_on(launch: Callable[..., Running]) -> None:
    running = launch()
    (served,) = running.server.models.by_name.values()
    heads, served.scorer.heads = served.scorer.heads, lambda items: [][0]
    answer = running.post("/score", {"items": [ITEM]})
    assert (answer.status, answer.json["error"]["message"]) == (500, "scoring failed: IndexError")
    served.scorer.heads = heads
    assert running.post("/score", {"items": [ITEM]}).status == 200
