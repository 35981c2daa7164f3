"""Requests to a server: the key, what is retried and for how long, and the reasons of failures."""

import time

import pytest

from reference.training.errors import UserError
from reference.training.rollout import server
from reference.training.rollout.server import Server, ServerError
from tests.helpers.vllm_emulator import Emulator

COMPLETIONS = "/v1/completions"
BODY = {"prompt": [5], "n": 1, "max_tokens": 4}


def complete(emulator, timeout=5.0):
    return Server(emulator.url, timeout).post(COMPLETIONS, BODY)


def test_url_may_end_in_v1(emulator):
    assert Server(emulator.url + "/v1/", 5.0).get("/v1/models") == emulator.models


@pytest.mark.parametrize("failure", [(503, "loading"), (429, "busy"), None])
def test_transient_failures_are_retried(emulator, failure):
    emulator.failures = [failure] * 3
    assert complete(emulator)["choices"][0]["token_ids"] == [5, 1]
    assert len(emulator.bodies) == 4


def test_first_failure_is_in_the_message(emulator):
    emulator.failures = [None] * 99 + [(503, "out of memory")]
    expected = "/v1/completions answered 503: out of memory, then is out of reach: Server disconn"
    with pytest.raises(ServerError, match=expected):
        complete(emulator)


@pytest.mark.parametrize("code", [400, 404, 500])
def test_other_answers_are_final(emulator, code):
    emulator.failures = [(code, "The model `served`\n failed.")]
    with pytest.raises(
        ServerError, match=f"answered {code}: The model `served` failed.$"
    ) as raised:
        complete(emulator)
    assert raised.value.status == code and len(emulator.bodies) == 1


def test_page_of_html_is_no_reason(emulator, monkeypatch):
    monkeypatch.setattr(Emulator, "do_GET", lambda handler: handler.send_error(404))
    with pytest.raises(ServerError, match=r"/v1/models answered 404: Not Found$"):
        Server(emulator.url, 5.0).get("/v1/models")


def test_server_that_never_answers_is_left_at_the_deadline(emulator):
    emulator.failures = [lambda: time.sleep(0.6)] * 2
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"/v1/completions did not answer within 0.2 s$"):
        complete(emulator, timeout=0.2)
    assert time.monotonic() - started < 0.5


def test_deadline_ends_retries(emulator, monkeypatch):
    monkeypatch.setattr(server, "RETRY_S", 60)
    emulator.failures = [(503, "loading")] * 999
    with pytest.raises(ServerError, match=r"answered 503: loading$"):
        complete(emulator, timeout=0.1)


@pytest.mark.parametrize("key", [None, "wrong"])
def test_key_of_the_environment_is_sent(emulator, key, monkeypatch):
    emulator.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    assert complete(emulator)["choices"]
    if key is None:
        monkeypatch.delenv("VLLM_API_KEY")
    else:
        monkeypatch.setenv("VLLM_API_KEY", key)
    for request in (complete, lambda emulator: Server(emulator.url, 5.0).get("/v1/models")):
        with pytest.raises(UserError, match=r"answered 401: Unauthorized \(set \$VLLM_API_KEY to"):
            request(emulator)


def test_unreachable_server_raises_user_error_with_its_url(emulator):
    emulator.shutdown()
    emulator.server_close()
    with pytest.raises(UserError, match=rf"{emulator.url}/v1/models is out of reach: .*refused$"):
        Server(emulator.url, 5.0).get("/v1/models")


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///v1", "http://me:secret@127.0.0.1:1", "http://127.0.0.1:1/?key=secret"],
)
def test_url_is_one_of_a_server_without_a_secret(url):
    with pytest.raises(UserError, match="without a user, password or query; an API key") as raised:
        Server(url, 5.0)
    assert "secret" not in str(raised.value)


def test_url_that_is_none_raises():
    with pytest.raises(UserError, match="--sampler http://x:port"):
        Server("http://x:port", 5.0)


@pytest.mark.parametrize("key", ["se\ncret", "s\u00e9cret"])
def test_key_that_no_header_can_hold_is_not_repeated(monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError, match=r"^\$VLLM_API_KEY must be one line of ASCII$"):
        Server("http://127.0.0.1:1", 5.0)


@pytest.mark.parametrize("answer", ["<html>", "[]", "null", "[" * 100_000])
def test_answer_that_is_no_json_object_raises(emulator, answer):
    emulator.models = answer
    with pytest.raises(UserError, match="/v1/models did not answer with a JSON object"):
        Server(emulator.url, 5.0).get("/v1/models")


def test_answer_that_cannot_be_decompressed_raises(emulator):
    emulator.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match=r"/v1/models .*decompressing"):
        Server(emulator.url, 5.0).get("/v1/models")


@pytest.mark.parametrize("reason", [None, 5, ["a"]])
def test_reason_that_is_no_text_is_shown(emulator, reason):
    emulator.failures = [(400, reason)]
    with pytest.raises(ServerError, match="answered 400: "):
        complete(emulator)


def test_routes_are_found_by_asking(emulator):
    asked = Server(emulator.url, 5.0)
    assert asked.has_route("/collective_rpc") and asked.has_route("/v1/load_lora_adapter")
    emulator.routes = set()
    assert not asked.has_route("/collective_rpc")
    assert emulator.loaded == []


@pytest.mark.parametrize("status", [200, 403, 405, 501])
def test_other_answers_are_not_those_of_a_route(emulator, status):
    emulator.unknown = status
    emulator.routes = set()
    assert not Server(emulator.url, 5.0).has_route("/collective_rpc")
