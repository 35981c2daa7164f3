"""The training script with models of many families, from directories."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from reference import train
from reference.training.tasks import tasks
from tests.helpers.model_directories import save_family


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *flags):
    """Train for a step; return the exit code."""
    reward = tmp_path / "reward.py"  # no group has equal rewards
    reward.write_text("def rank(completions):\n    return list(range(len(completions)))\n")
    flags = [*flags, "--reward", f"{reward}:rank"]
    start = ["--model", str(tmp_path / "base"), "--output-dir", str(tmp_path / "run")]
    sizes = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--max-new-tokens", "4"]
    output = ["--eval-questions", "1", "--no-tensorboard", "--checkpoint-every", "None"]
    return train.main([*start, *sizes, *output, "--threads", "1", *flags])


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("sampler", ["shared-prompt", "generate"])
def test_mixture_of_experts_with_router_logits_trains(tmp_path, sampler, impl):
    save_family(tmp_path / "base", "Qwen3Moe", output_router_logits=True)
    assert run(tmp_path, "--sampler", sampler, "--loss-impl", impl) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["output_router_logits"] is True


@pytest.mark.parametrize("family", ["FalconH1", "Mamba", "Jamba", "Qwen3Next", "Gemma2", "GPT2"])
def test_family_trains_on_the_log_probs_that_it_samples(tmp_path, family, capsys):
    save_family(tmp_path / "base", family)
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out.count("--sampler generate: MambaForCausalLM cannot share")
    assert printed == int(family == "Mamba")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["sampling/sampling_logp_difference/max"] < 1e-4


def test_model_that_cannot_take_padding_is_one_line(tmp_path, capsys):
    save_family(tmp_path / "base", "Rwkv")
    assert run(tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: RwkvForCausalLM cannot be trained here: beside padding")


def test_prompt_beyond_the_learned_positions_is_one_line(tmp_path, capsys):
    save_family(tmp_path / "base", "GPT2", n_positions=128)
    assert run(tmp_path, "--system", "x" * 100) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: GPT2LMHeadModel has 128 positions")


def test_chat_goes_on_from_the_prompt_of_the_run(tmp_path, monkeypatch):
    save_family(tmp_path / "base", "Llama")
    example = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]

    def load_task(config):
        task = tasks.load_task(config)
        train, held_out = (
            [replace(question, prompt=[*example, *question.messages]) for question in part]
            for part in (task.train, task.held_out)
        )
        return replace(task, train=train, held_out=held_out)

    monkeypatch.setattr(train, "load_task", load_task)
    assert run(tmp_path, "--system", "Add.") == 0

    chats, handler = [], signal.getsignal(signal.SIGINT)  # ignored in a job of the background

    def chat(policy, temperature, *_):
        chats.append((policy.system, policy.opening, temperature))
        assert signal.getsignal(signal.SIGINT) is handler

    monkeypatch.setattr(train, "chat", chat)
    start = ["--model", str(tmp_path / "run" / "model"), "--threads", "1", "--chat"]
    assert train.main(start) == 0
    assert train.main([*start, "--system", "Be brief.", "--temperature", "0.2"]) == 0
    assert chats == [("Add.", example, 0.7), ("Be brief.", example, 0.2)]
