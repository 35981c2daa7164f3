"""Requests to a server: the key, what is retried and for how long, and the reasons of failures."""

import time

import pytest

from reference.training.errors import UserError
from reference.training.rollout import server
from reference.training.rollout.server import Server, ServerError

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


def test_url_that_is_none_raises():
    with pytest.raises(UserError, match="--sampler http://x:port"):
        Server("http://x:port", 5.0)


def test_answer_that_is_not_json_raises(emulator):
    emulator.models = "<html>"
    with pytest.raises(UserError, match="/v1/models did not answer in JSON"):
        Server(emulator.url, 5.0).get("/v1/models")


def test_routes_are_found_by_asking(emulator):
    asked = Server(emulator.url, 5.0)
    assert asked.has_route("/collective_rpc") and asked.has_route("/v1/load_lora_adapter")
    emulator.routes = set()
    assert not asked.has_route("/collective_rpc")
    assert emulator.loaded == []
