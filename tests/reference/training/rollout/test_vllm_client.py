"""The server sampler, against a small server that answers as vLLM does."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.rollout import vllm_client as server
from reference.training.rollout.generate import Prompts
from reference.training.rollout.samplers import pick_sampler

END, PAD, VOCABULARY = 1, 0, 16
TOKENIZER = type("Tokenizer", (), {"pad_token_id": PAD, "__len__": lambda self: VOCABULARY})()
POLICY = SimpleNamespace(
    tokenizer=TOKENIZER,
    device=torch.device("cpu"),
    eos_ids=[END],
    max_new_tokens=4,
    ranks=SINGLE_PROCESS,
)
PROMPTS = Prompts(
    torch.tensor([[PAD, 5, 6], [7, 8, 9]]), torch.tensor([[False, True, True], [True, True, True]])
)


class Emulator(BaseHTTPRequestHandler):
    """Completion i of a prompt is its last token, then i more and the end; -0.5 each."""

    def do_GET(self):
        self.answer(self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.failures:
            code, message = self.server.failures.pop()
            return self.answer({"error": {"message": message, "code": code}}, code)
        choices = [self.choice(body, i) for i in range(body["n"])]
        self.answer({"choices": [self.server.change(each) for each in reversed(choices)]})

    def choice(self, body, i):
        ids = [body["prompt"][-1]] * (i + 1) + [END]
        reason = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        logprobs = {
            "tokens": [f"token_id:{each}" for each in ids],
            "token_logprobs": [-0.5 - i] * len(ids),
            "top_logprobs": [{f"token_id:{each}": -0.5 - i} for each in ids],
        }
        return {"index": i, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def emulator(monkeypatch):
    monkeypatch.setattr(server, "BACK_OFF_S", 0.001)
    emulated = ThreadingHTTPServer(("127.0.0.1", 0), Emulator)
    emulated.models = {"data": [{"id": "served"}, {"id": "an adapter"}]}
    emulated.bodies, emulated.failures, emulated.change = [], [], lambda choice: choice
    threading.Thread(target=emulated.serve_forever, daemon=True).start()
    emulated.url = f"http://127.0.0.1:{emulated.server_port}"
    yield emulated
    emulated.shutdown()
    emulated.server_close()


def sample(emulator, group_size=3, temperature=0.7):
    return pick_sampler(emulator.url)(POLICY, PROMPTS, group_size, temperature)


def without_ids(choice):
    return {name: value for name, value in choice.items() if name != "token_ids"}


@pytest.mark.parametrize("change", [lambda choice: choice, without_ids], ids=["ids", "texts"])
def test_completions_are_in_the_order_of_prompts_and_choices(emulator, change):
    emulator.change = change
    completions = sample(emulator)
    expected = [[q] * (i + 1) + [END] + [PAD] * (2 - i) for q in (6, 9) for i in range(3)]
    assert completions.tokens.tolist() == expected
    assert completions.mask.sum(-1).tolist() == [2, 3, 4] * 2
    assert completions.finished.all()
    logprobs = [[-0.5 - i] * (i + 2) + [0.0] * (2 - i) for i in range(3)]
    assert completions.logprob.tolist() == logprobs * 2


def test_truncated_completion_is_not_finished(emulator):
    completions = sample(emulator, group_size=4)
    assert completions.finished.tolist() == [True, True, True, False] * 2
    assert completions.mask[3].all()


def test_request_has_no_truncation_and_names_the_first_model(emulator):
    sample(emulator)
    body = min(emulator.bodies, key=lambda each: len(each["prompt"]))
    assert body["prompt"] == [5, 6]  # without the padding
    named = ("model", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    assert [body[name] for name in named] == ["served", 3, 0.7, 1.0, 0, 0.0, 1.0]
    assert (body["max_tokens"], body["stop_token_ids"]) == (4, [END])


def test_request_seeds_follow_the_seed_of_the_run(emulator):
    for _ in range(2):
        torch.manual_seed(3)
        sample(emulator)
    seeds = [body["seed"] for body in emulator.bodies]
    assert sorted(seeds[:2]) == sorted(seeds[2:]) and seeds[0] != seeds[1]


def test_greedy_completions_are_requested_once_and_repeated(emulator):
    completions = sample(emulator, group_size=2, temperature=0.0)
    assert [body["n"] for body in emulator.bodies] == [1, 1]
    assert completions.tokens.tolist() == [[6, END], [6, END], [9, END], [9, END]]


def test_url_may_end_in_v1(emulator):
    assert pick_sampler(emulator.url + "/v1/").url == emulator.url


def test_server_failures_are_retried(emulator):
    emulator.failures = [(503, "loading")] * 3
    assert sample(emulator).tokens.shape == (6, 4)
    assert len(emulator.bodies) == 5


def test_persistent_server_failure_raises(emulator):
    emulator.failures = [(500, "out of memory")] * 100
    with pytest.raises(UserError, match=r"answered 500: out of memory \(after 5 attempts\)"):
        sample(emulator)


def test_client_error_is_not_retried(emulator):
    emulator.failures = [(404, "The model `served` does not exist.")] * 2
    with pytest.raises(UserError, match="answered 404: The model `served` does not exist"):
        sample(emulator)
    assert len(emulator.bodies) <= 2


def test_unreachable_server_raises_user_error_with_its_url(emulator):
    emulator.shutdown()
    emulator.server_close()
    with pytest.raises(UserError, match=rf"{emulator.url}/v1/models is out of reach"):
        pick_sampler(emulator.url)


def test_server_without_models_raises(emulator):
    emulator.models = {"object": "list"}
    with pytest.raises(UserError, match="names no model"):
        pick_sampler(emulator.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": None}, "gave no log-probs"),
        ({"logprobs": {"tokens": ["a"], "token_logprobs": [None]}}, "gave no log-probs"),
        ({"token_ids": None, "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}, "token ids"),
        ({"token_ids": [4, 5, 6, 7, 8]}, "gave 5 tokens but"),
        ({"token_ids": [6, 99], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, "99 is not among"),
        ({"token_ids": [6], "logprobs": {"token_logprobs": [-1.0]}}, "ended a completion with"),
    ],
)
def test_incomplete_or_wrong_response_raises(emulator, change, message):
    emulator.change = lambda choice: choice | change
    with pytest.raises(UserError, match=message):
        sample(emulator, group_size=1)


def test_response_that_is_not_json_raises(emulator, monkeypatch):
    monkeypatch.setattr(server.json, "load", lambda response: json.loads("<html>"))
    with pytest.raises(UserError, match="did not answer in JSON"):
        pick_sampler(emulator.url)
