"""--sampler URL with a real vLLM server, which takes over weights over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from reference import train
from reference.training.config import SamplingSettings
from reference.training.rollout import vllm_client, weight_push
from reference.training.rollout.vllm_client import ServerSampler
from reference.training.rollout.weight_push import AdapterPush, CheckpointPush
from tests.helpers.model_directories import save_family
from tests.helpers.vllm import (
    MAX_DIFFERENCE,
    SERVED_SIZES,
    assert_draws_from,
    largest_difference,
    load_policy,
    needs_vllm,
    perturb,
    smollm2_directory,
)

pytestmark = needs_vllm

KEY = "a key"
CONTEXT = 512
QUESTIONS = ["3 + 4", "What is 12 - 5?"]
GROUP = 4
START_S = 240
COMMAND = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
COMMAND += ["--dtype", "float32", "--max-model-len", str(CONTEXT), "--enforce-eager"]
COMMAND += ["--no-enable-chunked-prefill", "--logprobs-mode", "processed_logprobs"]
COMMAND += ["--enable-lora", "--max-lora-rank", "8", "--api-key", KEY]
COMMAND += ["--hf-overrides", '{"tie_word_embeddings": false}']
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
ENVIRONMENT |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENT |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
TRAIN = ["--steps", "4", "--prompts", "2", "--group-size", "4", "--eval-questions", "4"]
TRAIN += ["--no-tensorboard", "--loss-impl", "reference"]
TRAIN += ["--learning-rate", "1e-3", "--warmup-steps", "0"]


@pytest.fixture(scope="module", params=["smollm2", "llama"])
def served(request, tmp_path_factory):
    """Start a server; a server that is killed leaves workers behind, so end its process group."""
    scratch = tmp_path_factory.mktemp("served")
    if request.param == "llama":
        directory = save_family(scratch / "m", "Llama", tie_word_embeddings=True, **SERVED_SIZES)
    else:
        directory = smollm2_directory()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "--model", str(directory), "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            cwd=scratch,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(url + "/health", timeout=10)
                break
            except OSError:
                text = (scratch / "log").read_text()[-2000:]
                assert process.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.5)
        yield SimpleNamespace(url=url, directory=directory, process=process, name=request.param)
    finally:
        end(process)


def end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def run(served, run_directory, *flags):
    start = ["--model", str(served.directory), "--sampler", served.url, *TRAIN]
    return train.main([*start, "--output-dir", str(run_directory), *flags])


@pytest.mark.parametrize(
    ("lora_rank", "way", "kind"),
    [
        (None, "all weights", CheckpointPush),
        (4, "an adapter", AdapterPush),
        (4, "merged", CheckpointPush),
    ],
)
def test_synced_server_draws_from_the_policy(served, tmp_path, lora_rank, way, kind, monkeypatch):
    if way == "merged":  # as for a server without adapters
        monkeypatch.setattr(weight_push, "LOAD_ADAPTER", "/nowhere")
    policy = load_policy(served.directory, lora_rank=lora_rank)
    prompts = policy.encode(QUESTIONS)
    sampler = ServerSampler(SamplingSettings(sampler=served.url))
    sampler.start(policy, tmp_path)
    assert type(sampler._push) is kind and sampler.dtype == torch.float32
    perturb(policy.model, seed=1)
    stale = sampler.sample(policy, prompts, GROUP, 1.0)
    assert largest_difference(policy, prompts, stale) > 100 * MAX_DIFFERENCE

    started = time.perf_counter()
    sampler.sync(policy)
    print(f"{served.name}, {way}: a sync of {time.perf_counter() - started:.2f} s")
    assert_draws_from(sampler, policy, prompts)
    sampler.close()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("wrong", ["key", "model", "context"])
def test_wrong_server_is_one_line_before_the_first_step(
    served, tmp_path, wrong, monkeypatch, capsys
):
    flags = []
    if wrong == "key":
        monkeypatch.setenv("VLLM_API_KEY", "another")
        expected = "/v1/models answered 401: Unauthorized (set $VLLM_API_KEY to the --api-key of"
    elif wrong == "model":
        other = save_family(tmp_path / "other", "Llama", **SERVED_SIZES)
        flags = ["--model", str(other)]
        expected = f" serves {served.directory}: expected --model, which is {other}"
    else:
        flags = ["--max-new-tokens", str(CONTEXT - 1)]
        expected = f" has --max-model-len {CONTEXT}: expected at least the longest prompt, "
    assert run(served, tmp_path / "run", *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {served.url}{expected}")
    assert not (tmp_path / "run").exists()


def test_update_without_the_head_stops_the_run(served, tmp_path, monkeypatch, capsys):
    if served.name != "llama":
        pytest.skip("a run of the small model shows it")
    whole, pushes = weight_push.synced_weights, []

    def without_head(policy):
        pushes.append(1)
        for name, weight in whole(policy):
            if name != "lm_head.weight" or len(pushes) <= 2:  # at the start and in step 1
                yield name, weight

    monkeypatch.setattr(weight_push, "synced_weights", without_head)
    flags = ["--entropy-coef", "0.01"]  # the rewards of random completions are all 0
    assert run(served, tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert "error: step 2: the log-probs of the sampler differ from the trainer's by" in said
    assert "These look old: the tied LM head (lm_head)" in said


def test_server_that_is_killed_ends_the_run_with_a_checkpoint(
    served, tmp_path, monkeypatch, capsys
):
    if served.name != "llama":
        pytest.skip("a run of the small model shows it")
    post_all, rounds = vllm_client.ServerSampler._post_all, []

    def killed_in_step_3(sampler, path, bodies):
        rounds.append(time.monotonic())
        if len(rounds) == 3:
            end(served.process)
        return post_all(sampler, path, bodies)

    monkeypatch.setattr(vllm_client.ServerSampler, "_post_all", killed_in_step_3)
    assert run(served, tmp_path / "run", "--checkpoint-every", "None") == 2
    assert time.monotonic() - rounds[-1] < 60
    said = capsys.readouterr().err.splitlines()
    print(*said[-3:], sep="\n")
    assert said[-1].startswith(f"error: {served.url}/v1/completions is out of reach: ")
    assert f"to go on after step 2: python reference/train.py --resume {tmp_path}/run" in said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 2
