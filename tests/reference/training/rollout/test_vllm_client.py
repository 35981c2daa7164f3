"""The server sampler, against a small server that answers as vLLM does."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from reference.training.config import SamplingSettings
from reference.training.distributed import SINGLE_PROCESS
from reference.training.errors import UserError
from reference.training.rollout import vllm_client as server
from reference.training.rollout.generate import Prompts
from reference.training.rollout.samplers import pick_sampler
from reference.training.rollout.truncation import Truncation

END, PAD, VOCABULARY = 1, 0, 16
TOKENIZER = type("Tokenizer", (), {"pad_token_id": PAD, "__len__": lambda self: VOCABULARY})()
POLICY = SimpleNamespace(
    tokenizer=TOKENIZER,
    device=torch.device("cpu"),
    eos_ids=[END],
    max_new_tokens=4,
    truncation=None,
    ranks=SINGLE_PROCESS,
)
TOP_P = Truncation(top_p=0.8)
PROMPTS = Prompts(
    torch.tensor([[PAD, 5, 6], [7, 8, 9]]), torch.tensor([[False, True, True], [True, True, True]])
)


def pick(url):
    return pick_sampler(SamplingSettings(sampler=url))


class Emulator(BaseHTTPRequestHandler):
    """Completion i of a prompt is its last token, then i more and the end; -0.5 each.

    At the other endpoint each token was drawn from it, token 2 and, in completion i, i more.
    """

    def do_GET(self):
        self.answer(self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.paths.append(self.path)
        if self.server.failures:
            code, message = self.server.failures.pop()
            return self.answer({"error": {"message": message, "code": code}}, code)
        if self.path == "/inference/v1/generate":
            sampling = body["sampling_params"] | {"prompt": body["token_ids"]}
            choices = [self.choice_with_mask(sampling, i) for i in range(sampling["n"])]
        else:
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

    def choice_with_mask(self, sampling, i):
        choice = self.choice(sampling, i)
        ids = choice["token_ids"]
        mask = [[2, *range(10, 10 + i), token] for token in ids]
        content = [{"token_id": token, "logprob": -0.5 - i, "rank": 1} for token in ids]
        return choice | {"logprobs": {"content": content}, "sampling_mask": mask}

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
    emulated.bodies, emulated.paths, emulated.failures = [], [], []
    emulated.change = lambda choice: choice
    threading.Thread(target=emulated.serve_forever, args=[0.01], daemon=True).start()
    emulated.url = f"http://127.0.0.1:{emulated.server_port}"
    yield emulated
    emulated.shutdown()
    emulated.server_close()


def sample(emulator, group_size=3, temperature=0.7, truncation=None):
    policy = SimpleNamespace(**vars(POLICY) | {"truncation": truncation})
    return pick(emulator.url).sample(policy, PROMPTS, group_size, temperature)


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
    assert [body[name] for name in named] == [*("served", 3, 0.7, 1.0, server.NO_TOP_K, 0.0, 1.0)]
    assert (body["max_tokens"], body["stop_token_ids"]) == (4, [END])


def test_support_is_read_from_the_endpoint_that_returns_it(emulator):
    completions = sample(emulator, truncation=TOP_P)
    assert emulator.paths == ["/inference/v1/generate"] * 2
    plain = sample(emulator)
    for name in ("tokens", "mask", "logprob", "finished"):
        assert torch.equal(getattr(completions, name), getattr(plain, name)), name
    assert plain.support is None
    kept = [
        [2, *range(10, 10 + i), token] if here else []
        for i, row, mask in zip([0, 1, 2] * 2, completions.tokens, completions.mask, strict=True)
        for token, here in zip(row.tolist(), mask.tolist(), strict=True)
    ]
    ids, offsets = completions.support
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == kept


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Truncation(top_k=3), (3, 1.0, 0.0)),
        (TOP_P, (server.NO_TOP_K, 0.8, 0.0)),  # vLLM refuses a top_k of 0
        (Truncation(min_p=0.1, top_k=5, top_p=0.9), (5, 0.9, 0.1)),
    ],
)
def test_truncation_is_requested_with_and_without_the_support(emulator, truncation, expected):
    sample(emulator, truncation=truncation)
    completions = sample(emulator, truncation=replace(truncation, return_support=False))
    assert completions.support is None
    assert emulator.paths == ["/inference/v1/generate"] * 2 + ["/v1/completions"] * 2
    with_support, without = emulator.bodies[0]["sampling_params"], emulator.bodies[-1]
    for body in (with_support, without):
        assert tuple(body[name] for name in ("top_k", "top_p", "min_p")) == expected
    named = ("n", "temperature", "repetition_penalty", "max_tokens", "stop_token_ids", "logprobs")
    assert [with_support[name] for name in named] == [without[name] for name in named]
    assert "seed" in with_support and "seed" in without


def test_greedy_completions_are_not_truncated(emulator):
    assert sample(emulator, temperature=0.0, truncation=TOP_P).support is None
    assert emulator.paths == ["/v1/completions"] * 2
    assert {(body["top_k"], body["top_p"]) for body in emulator.bodies} == {(server.NO_TOP_K, 1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_mask": None}, "gave no sampling mask: .* vLLM >= 0.28.*--no-support"),
        ({"sampling_mask": [[6, 9]]}, "gave 2 tokens but 1 sampling masks"),
        ({"sampling_mask": [[6, 9], [2, 3]]}, "drew token 1 and gave a sampling mask of 2 tokens"),
        ({"logprobs": {"content": None}}, "gave no log-probs"),
        ({"logprobs": {"content": [{"logprob": -1.0}]}}, "gave 2 tokens but 1 log-probs"),
    ],
)
def test_incomplete_or_wrong_support_raises(emulator, change, message):
    emulator.change = lambda choice: choice | change
    with pytest.raises(UserError, match=message):
        sample(emulator, group_size=1, truncation=TOP_P)


@pytest.mark.parametrize("code", [403, 404])
def test_server_without_the_endpoint_of_supports_raises_with_its_flags(emulator, code):
    emulator.failures = [(code, "Not here.")] * 2
    with pytest.raises(UserError, match=rf"answered {code}: Not here. \(.*--return-sampling-mask"):
        sample(emulator, truncation=TOP_P)


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
    assert pick(emulator.url + "/v1/").url == emulator.url


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
        pick(emulator.url)


def test_server_without_models_raises(emulator):
    emulator.models = {"object": "list"}
    with pytest.raises(UserError, match="names no model"):
        pick(emulator.url)


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
        pick(emulator.url)
