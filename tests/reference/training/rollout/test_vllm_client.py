"""The server sampler, against a small server that answers as vLLM does."""

import os
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from reference import train
from reference.training.config import SamplingSettings
from reference.training.distributed import SINGLE_PROCESS, Ranks
from reference.training.errors import UserError
from reference.training.model import lora
from reference.training.rollout.generate import Prompts
from reference.training.rollout.samplers import pick_sampler
from reference.training.rollout.truncation import Truncation
from reference.training.rollout.vllm_client import NO_TOP_K
from tests.helpers.model_directories import make_family
from tests.helpers.training_runs import left_by, tiny
from tests.helpers.vllm_emulator import END, LOAD_ADAPTER

PAD, VOCABULARY = 0, 16
TOKENIZER = type("Tokenizer", (), {"pad_token_id": PAD, "__len__": lambda self: VOCABULARY})()
POLICY = SimpleNamespace(
    tokenizer=TOKENIZER,
    device=torch.device("cpu"),
    eos_ids=[END],
    max_new_tokens=4,
    truncation=None,
    ranks=SINGLE_PROCESS,
    longest_prompt=7,
)
TOP_P = Truncation(top_p=0.8)
PROMPTS = Prompts(
    torch.tensor([[PAD, 5, 6], [7, 8, 9]]), torch.tensor([[False, True, True], [True, True, True]])
)


def pick(url):
    return pick_sampler(SamplingSettings(sampler=url))


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
    assert [body[name] for name in named] == [*("served", 3, 0.7, 1.0, NO_TOP_K, 0.0, 1.0)]
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
        (TOP_P, (NO_TOP_K, 0.8, 0.0)),  # vLLM refuses a top_k of 0
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
    assert {(body["top_k"], body["top_p"]) for body in emulator.bodies} == {(NO_TOP_K, 1.0)}


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


def test_client_error_is_not_retried(emulator):
    emulator.failures = [(404, "The model `served` does not exist.")] * 2
    with pytest.raises(UserError, match="answered 404: The model `served` does not exist"):
        sample(emulator)
    assert len(emulator.bodies) <= 2


@pytest.mark.parametrize("ends_by", ["failure", "Ctrl-C"])
def test_requests_in_flight_are_not_waited_for(emulator, ends_by):
    release = threading.Event()
    emulator.failures = [(400, "too long")] if ends_by == "failure" else []
    emulator.failures += [lambda: release.wait(20)] * (2 - len(emulator.failures))
    if ends_by == "Ctrl-C":
        emulator.failures[0] = lambda: os.kill(os.getpid(), signal.SIGINT) or release.wait(20)
    started = time.monotonic()
    error = {"failure": UserError, "Ctrl-C": KeyboardInterrupt}[ends_by]
    with pytest.raises(error, match=r"answered 400: too long|^$"):
        sample(emulator)
    assert time.monotonic() - started < 10
    release.set()


@pytest.mark.parametrize("failed", [0, 1])
def test_answer_is_the_reason_rather_than_a_lost_connection(emulator, failed):
    emulator.failures = [None] * 99
    emulator.failures[98 - failed] = (500, "the engine died")
    with pytest.raises(UserError, match=r"answered 500: the engine died \(a server on a CPU must"):
        sample(emulator)


def test_completion_that_the_server_cut_short_raises(emulator):
    emulator.change = lambda choice: choice | {"finish_reason": "length"}
    with pytest.raises(
        UserError, match=r"cut a completion after [23] of 4 tokens: .*--max-model-len"
    ):
        sample(emulator)


def make_policy(directory="", rank=None):
    model, tokenizer = make_family("Llama")
    model.config._name_or_path = str(directory)
    model = model if rank is None else lora.add_lora(model, rank, 8.0)
    return SimpleNamespace(**vars(POLICY) | {"model": model, "tokenizer": tokenizer})


def test_completions_come_from_the_weights_of_the_last_sync(emulator, tmp_path):
    emulator.routes = {LOAD_ADAPTER}
    policy, sampler = make_policy(rank=2), pick(emulator.url)
    (tmp_path / "weights" / "weights-of-a-run-that-was-killed").mkdir(parents=True)
    sampler.start(policy, tmp_path)
    assert len(emulator.loaded) == 1  # so that a server that cannot ends the run at its start
    with torch.no_grad():
        for param in policy.model.parameters():
            param += 1
    sampler.sync(policy)
    sampler.sample(policy, PROMPTS, 1, 1.0)
    assert {body["model"] for body in emulator.bodies} == emulator.adapters
    (path, tensors) = emulator.loaded[-1]
    assert [*(tmp_path / "weights").iterdir()] == [path]
    assert all((x > 0.5).any() for x in tensors.values())
    sampler.close()
    sampler.close()
    assert not path.parent.exists()


def test_weights_pass_through_the_directory_of_the_settings(emulator, tmp_path):
    settings = SamplingSettings(sampler=emulator.url, weights_dir=tmp_path / "shared")
    sampler = pick_sampler(settings)
    sampler.start(make_policy(), tmp_path)
    assert emulator.loaded[0][0].parent == tmp_path / "shared"
    assert sampler.dtype == torch.bfloat16


def test_stale_server_gets_no_weights(emulator, tmp_path):
    emulator.routes = set()
    policy = make_policy()
    with pytest.raises(UserError, match="takes over no weights"):
        pick(emulator.url).start(policy, tmp_path)
    sampler = pick_sampler(SamplingSettings(sampler=emulator.url, stale_sampler=True))
    sampler.start(policy, tmp_path)
    sampler.sync(policy)
    sampler.sample(policy, PROMPTS, 1, 1.0)
    sampler.close()
    assert emulator.loaded == [] and emulator.bodies[0]["model"] == "served"
    assert [*tmp_path.iterdir()] == []


def test_failed_sync_of_the_first_rank_ends_all(emulator, tmp_path):
    class Others(Ranks):
        """Rank 1; the value of rank 0 is the failure."""

        def broadcast(self, value):
            assert value == (None, None)
            return None, UserError("rank 0 could not push")

    policy = make_policy()
    policy.ranks = Others(1, 1)
    with pytest.raises(UserError, match="rank 0 could not push"):
        pick(emulator.url).start(policy, tmp_path)
    assert emulator.loaded == []


@pytest.mark.parametrize(
    ("served", "trained", "is_same"),
    [
        ("here/tiny", "here/tiny", True),
        ("here/link", "here/tiny", True),
        ("here/tiny", "there/tiny", False),  # both exist, and are two
        ("/elsewhere/Tiny", "here/tiny", True),
        ("/elsewhere/other", "here/tiny", False),
        ("ORG/tiny", "hub/models--ORG--tiny/snapshots/0123", True),
        ("ORG/tiny-base", "hub/models--ORG--tiny/snapshots/0123", False),
    ],
)
def test_server_must_serve_the_model_that_trains(
    emulator, tmp_path, monkeypatch, served, trained, is_same
):
    monkeypatch.chdir(tmp_path)
    for name in ("here/tiny", "there/tiny", "hub/models--ORG--tiny/snapshots/0123"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here/link").symlink_to(tmp_path / "here/tiny")
    emulator.models = {"data": [{"id": "any name", "root": served}]}
    sampler, policy = pick(emulator.url), make_policy(trained)
    if is_same:
        return sampler.start(policy, tmp_path)
    with pytest.raises(UserError, match=f"serves {served}: expected --model, which is {trained}"):
        sampler.start(policy, tmp_path)


def test_context_must_hold_the_longest_prompt_and_its_completion(emulator, tmp_path):
    emulator.models = {"data": [{"id": "served", "max_model_len": 11}]}
    pick(emulator.url).start(make_policy(), tmp_path)
    emulator.models["data"][0]["max_model_len"] = 10
    with pytest.raises(UserError, match=r"--max-model-len 10: .*prompt, 7 tokens, .*-tokens 4$"):
        pick(emulator.url).start(make_policy(), tmp_path)


def test_run_whose_server_dies_saves_and_resumes(emulator, tmp_path, tiny_model, capsys):
    run = tmp_path / "run"
    flags = ["--model", tiny_model, "--steps", "4", "--prompts", "2", "--stale-sampler"]
    emulator.failures = [None] * 99 + [lambda: None] * 4  # two requests per step
    assert tiny(run, *flags, "--sampler", emulator.url, "--checkpoint-every", "None") == 2
    said = capsys.readouterr().err
    assert f"to go on after step 2: python reference/train.py --resume {run}\n" in said
    assert f"error: {emulator.url}/v1/completions is out of reach: Server disconnected" in said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    emulator.failures = []
    assert train.main(["--resume", str(run)]) == 0
    complete = left_by(run)
    assert len(complete["metrics"]) == 6  # of four steps, and two evaluations

    # A run that cannot start replaces no other.
    emulator.models["data"][0]["max_model_len"] = 1
    assert tiny(run, *flags, "--sampler", emulator.url, "--overwrite") == 2
    assert "--max-model-len 1: expected at least" in capsys.readouterr().err
    assert left_by(run) == complete


@pytest.mark.parametrize("data", [None, [], {}, "x", [1], [{}]])
def test_server_without_models_raises(emulator, data):
    emulator.models = {"data": data}
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
